"""Describe a module by plain values that a checkpoint can hold, and rebuild it from them."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made", bound="Described")
_PLAIN = (type(None), bool, int, float, str)
_UNKNOWN = "not plain"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Described(nn.Module):
    """A module that keeps the arguments it was created with."""

    init_args: dict[str, Any]
    """The arguments that were passed, by name."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            given = dict(signature.bind(made, *args, **kwargs).arguments)
        except TypeError:  # unpickling passes none, and __init__ rejects wrong ones
            given = {}
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        # setattr fails before nn.Module.__init__
        made.__dict__["init_args"] = dict(list(given.items())[1:])  # without self
        return made


def describe(value: Any) -> Any:
    """Describe a value by plain values, which load under ``weights_only=True``.

    Example:
        >>> from lightning_rdrop import Categorical
        >>> describe(Categorical(label_smoothing=0.1))
        {'class': 'lightning_rdrop.distance.categorical.Categorical', 'init_args': {'label_smoothing': 0.1}}
    """
    if isinstance(value, Described):
        return {"class": _path(type(value)), "init_args": describe(value.init_args)}
    if isinstance(value, dict):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(part) for part in value]
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if hasattr(value, "tolist") and type(plain := value.tolist()) is not type(value):  # a NumPy array or number
        return describe(plain)
    return value if type(value) in _PLAIN else {_UNKNOWN: repr(value)}


def rebuild(description: Any, kind: type[Made]) -> Made:
    """Rebuild a module from its description.

    Args:
        description: returned by :func:`describe`.
        kind: a base of its class. The class must be imported already: loading a checkpoint imports nothing.

    Raises:
        ValueError: it cannot be rebuilt, with the reason.

    Example:
        >>> from lightning_rdrop import Distance, JensenShannon
        >>> rebuild(describe(JensenShannon()), Distance)
        JensenShannon()
    """
    made = _rebuilt(description, kind)
    assert isinstance(made, kind)
    return made


def same_description(first: Any, second: Any) -> bool:
    """Whether two descriptions are equal.

    NaN equals NaN, and values that are not plain are compared by their repr without memory addresses.

    Example:
        >>> same_description({"weight": torch.ones(2)}, {"weight": torch.ones(2)})
        True
    """
    if isinstance(first, dict) and isinstance(second, dict):
        if set(first) == set(second) == {_UNKNOWN}:
            return _ADDRESS.sub("", first[_UNKNOWN]) == _ADDRESS.sub("", second[_UNKNOWN])
        return first.keys() == second.keys() and all(same_description(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_description, first, second))
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first.cpu(), second.cpu())
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first):
        return math.isnan(second)
    return type(first) is type(second) and bool(first == second)


def spell(description: Any) -> str:
    """Format a description as Python code.

    Example:
        >>> from lightning_rdrop import VAT
        >>> spell(describe([VAT(epsilon=2.0)]))
        '[VAT(epsilon=2.0)]'
    """
    if isinstance(description, list):
        return f"[{', '.join(map(spell, description))}]"
    if isinstance(description, Tensor):
        return f"tensor({description.tolist()})"
    if isinstance(description, dict) and set(description) == {"class", "init_args"}:
        given = ", ".join(f"{name}={spell(value)}" for name, value in description["init_args"].items())
        return f"{description['class'].rpartition('.')[2]}({given})"
    if isinstance(description, dict) and set(description) == {_UNKNOWN}:
        return str(description[_UNKNOWN])
    if isinstance(description, dict):
        return "{" + ", ".join(f"{key!r}: {spell(part)}" for key, part in description.items()) + "}"
    return repr(description)


def _rebuilt(description: Any, kind: type[Made]) -> Any:
    if isinstance(description, list):
        return [_rebuilt(part, kind) for part in description]
    if not isinstance(description, dict):
        return description
    if set(description) == {_UNKNOWN}:
        raise ValueError(f"{description[_UNKNOWN]} is not a plain value")
    if set(description) != {"class", "init_args"}:
        return {key: _rebuilt(part, kind) for key, part in description.items()}
    found = next((cls for cls in _family(kind) if _path(cls) == description["class"]), None)
    if found is None:
        raise ValueError(f"{description['class']} has not been imported")
    try:
        return found(**{name: _rebuilt(value, kind) for name, value in description["init_args"].items()})
    except TypeError as error:
        raise ValueError(f"{spell(description)}: {error}") from error


def _family(kind: type[Made]) -> list[type[Made]]:
    return [kind, *(cls for child in kind.__subclasses__() for cls in _family(child))]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
