"""Look up the submodules of a user's module by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn


def named(network: nn.Module) -> dict[str, nn.Module]:
    """Every submodule except the network itself and those that the mixin adds.

    Example:
        >>> list(named(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        ['0', '1']
    """
    return {name: part for name, part in network.named_modules() if name and not name.startswith("rdrop_")}


def expression(name: str) -> str:
    """The Python expression for a submodule in a method of its module.

    Example:
        >>> expression("network.0.drop")
        'self.network[0].drop'
    """
    return re.sub(r"\.(\d+)", r"[\1]", f"self.{name}")


def matching(argument: str, network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The full names of the submodules that match some patterns.

    Args:
        argument: the name of the argument with the patterns, for the message.
        network: the network to search.
        patterns: dotted names, or the ends of such; with ``*``, ``?`` or ``[``, globs, each of which may match several.

    Raises:
        ValueError: a pattern matches nothing, or a name matches several submodules.

    Example:
        >>> matching("at", nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())), ["1.*"])
        ['1.0']
    """
    names = list(named(network))
    found = []
    for pattern in patterns:
        parts = pattern.split(".")
        ends = {name: name.split(".")[-len(parts) :] for name in names if name.count(".") >= len(parts) - 1}
        fitting = [name for name, end in ends.items() if all(map(fnmatchcase, end, parts))]
        if pattern in names:
            fitting = [pattern]
        if not fitting:
            raise unknown(argument, pattern, network, names)
        if len(fitting) > 1 and not any(sign in pattern for sign in "*?["):
            raise ValueError(
                f"{argument}={pattern!r} matches {', '.join(fitting)}: use a longer name, or a list of names to "
                "choose several."
            )
        found += fitting
    return found


def unknown(argument: str, name: str, network: nn.Module, names: Iterable[str]) -> ValueError:
    """The error for a name that is not in ``names``, with the closest of them.

    Example:
        >>> print(unknown("at", "embeding", nn.Linear(2, 2), ["embedding", "head"]))
        at='embeding' is not a submodule of Linear. Did you mean embedding?
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Its submodules are {', '.join(names[:5])}, ..."
    return ValueError(f"{argument}={name!r} is not a submodule of {type(network).__name__}. {hint}")


def few(names: Iterable[str]) -> str:
    """At most five of the names, and the number of further ones.

    Example:
        >>> few("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
