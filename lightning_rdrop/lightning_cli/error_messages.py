"""Turn an error message of jsonargparse into one line, with the name that was probably meant.

jsonargparse prints many lines, most of them about types. A message that matches no rule is kept, joined to one line.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_rdrop.data.read import similar_file

_KEY = re.compile(r'Parser key "(.+?)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '(.+)':")
_BASES = re.compile(r"Subtypes: (.*)")
_VALUE = re.compile(r"Given value: (.*)")
_NOISE = re.compile(
    r"Does not validate against any|Errors:|Given value type:|Expected a <class '(NoneType|collections.*)'>|"
    r"Expected a path but .* not accessible|Expected a <class 'dict'>|"
    r"Not a valid subclass of \w+\.?|Subclass types expect one of:|a class path \(str\)|a dict with"
)
_BASE_CLASSES = ("pytorch_lightning.LightningModule", "pytorch_lightning.LightningDataModule")
"""The classes that jsonargparse names if no class was given."""
_EXPECTED = re.compile(r"Expected a (.+?)(?:\. Got value: (.*))?")


@dataclass
class _Message:
    """A parsed message of jsonargparse."""

    parser: ArgumentParser | None
    keys: list[str] = field(default_factory=list)
    owner: str = ""
    bases: str = ""
    value: str = ""
    causes: list[str] = field(default_factory=list)

    @property
    def options(self) -> list[str]:
        return [] if self.parser is None else list(self.parser.get_defaults(skip_validation=True).keys())

    @property
    def key(self) -> str:
        return ".".join(self.keys)


def explain(message: str, parser: ArgumentParser | None = None) -> str:
    """Shorten a message of jsonargparse to one line.

    Args:
        message: the argument of its ``ArgumentParser.error``.
        parser: the parser that raised it, which knows the options.

    Example:
        >>> parser = ArgumentParser()
        >>> _ = parser.add_argument("--trainer.max_epochs", type=int)
        >>> explain("unrecognized arguments: --trainer.max_epcohs=3", parser)
        'there is no option --trainer.max_epcohs. Did you mean --trainer.max_epochs?'
    """
    found = _read(message, parser)
    for pattern, say in _RULES:
        for cause in found.causes:
            if match := pattern.search(cause):
                return _placed(found, say(found, *match.groups()))
    if found.key == "callbacks" and not found.causes:
        return "callbacks: each needs a name. Write --callbacks.NAME=CLASS, such as --callbacks.alpha=AlphaScheduler."
    return _placed(found, _expected(found) or " ".join(found.causes) or " ".join(message.split()))


def near(name: str, candidates: Iterable[str]) -> str:
    """Suggest the candidate closest to a name; empty if none is similar.

    Example:
        >>> near("alhpa", ["alpha", "beta"])
        ' Did you mean alpha?'
    """
    found = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def _read(message: str, parser: ArgumentParser | None) -> _Message:
    found = _Message(parser)
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if key := _KEY.match(line):
            found.keys.append(key[1])
            line = key[2]
        if owner := _CLASS.match(line):
            found.owner = owner[1]
        elif bases := _BASES.match(line):
            found.bases = bases[1]
        elif value := _VALUE.match(line):
            found.value = found.value or value[1]
        elif line and not _NOISE.match(line):
            found.causes.append(line)
    return found


def _placed(found: _Message, said: str) -> str:
    return f"{found.key}: {said}" if found.keys else said


def _no_argument(found: _Message, name: str) -> str:
    if found.owner == "pytorch_lightning.Callback":
        return f"{name} comes before the class of its callback. Pass the class first: --callbacks.NAME=CLASS."
    hint = near(name, _arguments(found.owner))
    if found.owner in _BASE_CLASSES:
        hint = f" Pass --{found.key}=CLASS before its arguments."
    return f"{found.owner.rpartition('.')[2]} has no argument {name}.{hint}"


def _no_option(found: _Message, given: str) -> str:
    option = given.split()[0].partition("=")[0]
    if not option.startswith("-"):
        return f"unexpected argument {option!r}: options begin with --."
    name = option.lstrip("-")
    if "subcommand" in found.options:
        return f"options come after the subcommand, as in lightning-rdrop fit {option}."
    return f"there is no option {option}.{_near_option(name, found.options)}"


def _no_key(found: _Message, name: str) -> str:
    return f"there is no option {name}.{_near_option(name, found.options, '')}"


def _near_option(name: str, known: Iterable[str], dashes: str = "--") -> str:
    """Suggest a similar option; if the first part of the name is unknown, correct only that: ``callback.alpha``."""
    known = list(known)
    head, dot, rest = name.partition(".")
    heads = {key.partition(".")[0] for key in known}
    if head in heads:
        meant = difflib.get_close_matches(name, known, n=1)
    else:
        meant = [one + dot + rest for one in difflib.get_close_matches(head, heads, n=1)]
    return f" Did you mean {dashes}{meant[0]}?" if meant else ""


def _no_class(found: _Message, name: str) -> str:
    for bases in (found.bases, "torch.nn.Module, pytorch_lightning.Callback"):
        names = {one.__name__ for base in _classes(bases) for one in _subclasses(base)}
        if hint := near(name, sorted(names)):
            return f"there is no class {name}.{hint}"
    return f"there is no class {name}. Write your own classes with their module, as module.{name}."


def _no_attribute(found: _Message, module: str, name: str) -> str:
    hint = difflib.get_close_matches(name, vars(sys.modules.get(module, sys)), n=1)
    return f"there is no {name} in {module}.{f' Did you mean {module}.{hint[0]}?' if hint else ''}"


def _no_module(found: _Message, name: str) -> str:
    return f"there is no module {name}.{near(name, [path.stem for path in Path.cwd().glob('*.py')])}"


def _no_subclass(found: _Message, base: str) -> str:
    one = _load(found.value)
    if isinstance(one, type) and any(parent.__module__.startswith("lightning.pytorch") for parent in one.__mro__):
        return (
            f"{found.value} uses lightning.pytorch, but this command needs pytorch_lightning: write import "
            "pytorch_lightning as pl in its file."
        )
    return f"{found.value} is not a subclass of {base}."


def _required(found: _Message, *names: str) -> str:
    name = next(filter(None, names))
    if found.owner:
        return f"{found.owner.rpartition('.')[2]} needs {name}."
    return f"--{name.partition('.')[2] or name} is required."


def _no_choice(found: _Message, name: str, choices: str) -> str:
    names = re.findall(r"[\w-]+", choices)
    return f"there is no {name!r}, only {', '.join(names)}.{near(name, names)}"


def _no_file(found: _Message, path: str) -> str:
    return f"there is no file {path}.{similar_file(Path(path))}"


def _no_subcommand(found: _Message, names: str) -> str:
    return f"a subcommand is required: {names.replace(',', ', ')}."


def _expected(found: _Message) -> str:
    """What a value may be."""
    matches = [match for cause in found.causes if (match := _EXPECTED.fullmatch(cause))]
    if not matches or len(matches) < len(found.causes):
        return ""
    kinds, words = [], []
    for match in matches:
        literal = re.findall(r"'([^']*)'", match[1]) if "Literal[" in match[1] else []
        words += literal
        kinds += literal or [match[1].removeprefix("<class '").removesuffix("'>")]
    value = found.value if matches[0][2] is None else matches[0][2]
    return f"must be {' or '.join(dict.fromkeys(kinds))}, got {value!r}.{near(value, words)}"


def _arguments(path: str) -> list[str]:
    """The arguments of a class, including those of its bases."""
    owner = _load(path)
    if not isinstance(owner, type):
        return []
    parser = ArgumentParser(exit_on_error=False)
    return [name.removeprefix("x.") for name in parser.add_class_arguments(owner, "x", fail_untyped=False)]


def _classes(bases: str) -> list[type]:
    loaded = [_load(path) for path in re.findall(r"[\w.]+\.\w+", bases)]
    return [one for one in loaded if isinstance(one, type)]


def _subclasses(base: Any) -> Iterator[type]:
    for one in type.__subclasses__(base):
        yield one
        yield from _subclasses(one)


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None


_RULES: list[tuple[re.Pattern[str], Callable[..., str]]] = [
    (re.compile(r"Option '([\w.]+)' is not accepted"), _no_argument),
    (re.compile(r"does not accept option '([\w.]+)'"), _no_key),
    (re.compile(r"[Uu]nrecognized arguments: (.+)"), _no_option),
    (re.compile(r"Expected a dot import path string: (.+)"), _no_class),
    (re.compile(r"module '([\w.]+)' has no attribute '(\w+)'"), _no_attribute),
    (re.compile(r"No module named '([\w.]+)'"), _no_module),
    (re.compile(r"does not correspond to a subclass of (\w+)"), _no_subclass),
    (re.compile(r"arguments are required: (.+)|Option '([\w.]+)' is required"), _required),
    (re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)"), _no_choice),
    (re.compile(r"File does not exist: '(.+)'"), _no_file),
    (re.compile(r'expected "subcommand" to be one of \{(.*)\}'), _no_subcommand),
]
