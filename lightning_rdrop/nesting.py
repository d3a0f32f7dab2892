"""Nested containers, such as batches and predictions: read their parts, and rebuild them with other parts."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
ATOMS = (*CONSTANTS, Tensor, PackedSequence)  # leaves, although some are tuples


def parts_of(value: Any) -> dict[Any, Any] | None:
    """The parts of a container by key, index or attribute; None if it is not a known container."""
    if isinstance(value, ATOMS):
        return None
    if isinstance(value, (dict, UserDict)):
        return {key: value[key] for key in value}
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if has_attributes(value):
        # attributes derived by __post_init__ or a cached property have rows as well
        names = [field.name for field in dataclasses.fields(value)] + list(getattr(value, "__dict__", ()))
        return {name: getattr(value, name) for name in dict.fromkeys(names) if hasattr(value, name)}
    return None


def with_parts(value: Any, parts: dict[Any, Any]) -> Any:
    """A new container of the same type with these parts."""
    if type(value) is dict:  # torch.compile cannot trace copy.copy of a dict
        return parts
    if isinstance(value, (list, tuple)):
        return value._make(parts.values()) if hasattr(value, "_make") else type(value)(list(parts.values()))
    clone = copy.copy(value)
    for key, part in parts.items():
        if has_attributes(value):
            object.__setattr__(clone, key, part)  # it may be frozen
        else:
            clone[key] = part
    return clone


def tensors_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in a container, at any depth, with its path of keys.

    Example:
        >>> [path for path, _ in tensors_of({"x": [torch.ones(2), 3.0], "y": torch.ones(2)})]
        [('x', 0), ('y',)]
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in (parts_of(value) or {}).items():
        yield from tensors_of(part, (*path, key))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in a container, or to a single tensor.

    Example:
        >>> map_tensors({"x": torch.ones(1), "name": "a"}, lambda tensor: tensor + 1)
        {'x': tensor([2.]), 'name': 'a'}
    """
    if isinstance(value, Tensor):
        return change(value)
    parts = parts_of(value)
    return value if parts is None else with_parts(value, {key: map_tensors(parts[key], change) for key in parts})


def copied(value: Any) -> Any:
    """Copy the tensors of a container, for a forward pass that may change its inputs in place.

    A PackedSequence and objects of other types are not copied.

    Example:
        >>> batch = {"x": torch.ones(1)}
        >>> copied(batch)["x"].mul_(2), batch["x"]
        (tensor([2.]), tensor([1.]))
    """
    return map_tensors(value, Tensor.clone)


def has_attributes(value: Any) -> bool:
    """Whether the parts of a value are its attributes. A ModelOutput is a dataclass but used as a dict."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, dict, UserDict))
