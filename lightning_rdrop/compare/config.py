"""Resolve configs as ``lightning-rdrop fit`` does, without running anything."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import yaml

from lightning_rdrop.lightning_cli import RDropCLI

Config = dict[str, Any]


def resolve(arguments: Sequence[str]) -> Config:
    """The config that ``fit`` would run with these arguments.

    Args:
        arguments: of the command line.

    Raises:
        ValueError: ``fit`` does not accept them.
    """
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        try:
            RDropCLI(args=["fit", *arguments, "--print_config=skip_default"])
        except SystemExit as stopped:
            if stopped.code:
                raise ValueError(_reason(errors.getvalue())) from None
    config: Config = yaml.safe_load(printed.getvalue())
    return config


def arguments_of(overlay: str) -> list[str]:
    """The arguments of ``fit`` in a variant such as ``"few.yaml --model.rdrop_alpha=1"``: config files come first."""
    words = shlex.split(overlay)
    files = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [argument for file in words[:files] for argument in ("--config", file)] + words[files:]


def changes(old: Config, new: Config) -> list[str]:
    """The differences between two configs, a line for each value.

    Example:
        >>> changes({"model": {"p": 0.1, "views": 2}}, {"model": {"p": 0.3, "views": 2, "weight": None}})
        ['model.p: 0.1 -> 0.3', 'model.weight: not there -> None']
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key, 'not there')} -> {after.get(key, 'not there')}"
        for key in before | after
        if key not in before or key not in after or before[key] != after[key]
    ]


def instances(config: Config, key: str) -> Iterator[Config]:
    """The class configs under a key such as ``trainer.logger``, which has one, a list, or several by name."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict) and "class_path" not in value:
        value = list(value.values())
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict) and "class_path" in one:
            yield one


def callbacks(config: Config) -> Iterator[Config]:
    """All callbacks of a config, in the order of the Trainer."""
    yield from instances(config, "trainer.callbacks")
    yield from instances(config, "callbacks")


def checkpointed(config: Config) -> tuple[str, str] | None:
    """The metric that selects checkpoints, and its mode, ``"max"`` or ``"min"``; None if there is none."""
    for callback in callbacks(config):
        arguments = callback.get("init_args", {})
        if callback["class_path"].endswith("Checkpoint") and arguments.get("monitor"):
            return arguments["monitor"], arguments.get("mode", "min")
    return None


def _reason(printed: str) -> str:
    """The error in the output of a parser, without usage and types."""
    said = printed.rpartition("error: ")[2].strip()
    option = re.search(r"class_path '([\w.]+)':\s+(Option '[\w.]+' is not accepted)", said)
    return f"{option[2]} by {option[1]}." if option else said


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
