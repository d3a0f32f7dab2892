"""The submodules of a user's module by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn


def named(network: nn.Module) -> dict[str, nn.Module]:
    """Every submodule but the network itself, and what the mixin adds to it."""
    return {name: part for name, part in network.named_modules() if name and not name.startswith("rdrop_")}


def unknown(argument: str, name: str, network: nn.Module, names: Iterable[str]) -> ValueError:
    """What to say of a name that none of these is.

    Example:
        >>> print(unknown("at", "embeding", nn.Linear(2, 2), ["embedding", "head"]))
        at='embeding' is no submodule of Linear. Did you mean embedding?
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(names[:5])}, ..."
    return ValueError(f"{argument}={name!r} is no submodule of {type(network).__name__}. {hint}")


def few(names: Iterable[str]) -> str:
    """At most five names, and how many more there are.

    Example:
        >>> few("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
