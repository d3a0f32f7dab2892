"""The views of a batch: double whatever is in it, and take the predictions of the views apart."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Layout = Literal["block", "interleaved"]

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_ATOMS = (*_CONSTANTS, Tensor, PackedSequence)  # never looked into, although some are tuples
_SEPARATE = 'Or give each view a pass over the batch as it is: rdrop_passes="separate".'


def batch_size(batch: Any) -> int:
    """B, the number of examples: the one leading size of all tensors in a batch.

    Raises:
        ValueError: no tensor has rows, or two of them differ in their number.
        TypeError: something in the batch cannot be doubled (see :func:`duplicate`).

    Example:
        >>> batch_size({"x": torch.zeros(4, 8), "scale": torch.tensor(2.0), "name": "train"})
        4
    """
    sizes: dict[str, int] = {}
    lists: dict[str, Any] = {}
    for path, leaf in _leaves(batch, "batch"):
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.is_nested:
                raise _cannot_double(leaf, path, f"is a {'nested' if leaf.is_nested else leaf.layout} tensor")
            if leaf.dim():
                sizes[path] = len(leaf)
        elif _is_list(leaf):
            lists[path] = leaf
        elif not isinstance(leaf, _CONSTANTS):
            raise _cannot_double(leaf, path, "is nothing whose rows are known")
    if not sizes:
        raise ValueError(
            f"No tensor in the batch, a {type(batch).__name__}, has rows: a batch is at least (B, ...). {_SEPARATE}"
        )
    (path, size), *others = sizes.items()
    for other, its_size in others:
        if its_size != size:
            raise ValueError(
                f"{path} has {size} rows and {other} has {its_size}, so what belongs to an example is unclear. Every "
                f"tensor of a batch is (B, ...): keep constants in the module, pad what is of different lengths. "
                f"{_SEPARATE}"
            )
    for path, items in lists.items():
        unknown = [] if len(items) == size else [item for item in _flat(items) if not isinstance(item, _ATOMS)]
        if unknown:
            found = type(unknown[0]).__name__
            raise _cannot_double(items, path, f"holds a {found}, but not one thing for each of the {size} examples")
    return size


def duplicate(batch: Any, views: int, *, layout: Layout = "block") -> Any:
    """A batch of B examples as one of K * B rows, K views an example, in the same nesting.

    Tensors are repeated along their first dimension, also those in a list: each is (B, ...), none is an example.
    Lists of B other things, such as strings, are repeated in the same order. Tensors without dimensions, other lists,
    numbers, strings and None are constants. Nothing of the caller's is changed.

    Args:
        batch: any nesting of tensors, dicts (and UserDicts), lists, tuples, named tuples and dataclasses.
        views: K >= 1.
        layout: ``"block"`` is [x; x], a view after the other; ``"interleaved"`` puts the views of an example side by
            side, so that a cut into micro-batches keeps them together.

    Raises:
        TypeError: something that cannot be doubled safely, such as a PackedSequence, a sparse tensor or a graph.
        ValueError: tensors with different numbers of rows.

    Example:
        >>> duplicate((torch.tensor([1, 2]), ["a", "b"]), 2)
        (tensor([1, 2, 1, 2]), ['a', 'b', 'a', 'b'])
        >>> duplicate(torch.tensor([1, 2]), 2, layout="interleaved")
        tensor([1, 1, 2, 2])
    """
    _check(views, layout)
    return batch if views == 1 else _repeat(batch, views, batch_size(batch), layout)


def split(prediction: Any, views: int, examples: int, *, layout: Layout = "block") -> Tensor:
    """The views of a prediction, (K, N, ...), from the (K * N, ...) that a model made of a doubled batch.

    Args:
        prediction: K * B rows, or a multiple where a model flattens tokens into rows.
        views: K.
        examples: B.
        layout: that of :func:`duplicate`.

    Raises:
        TypeError: the prediction is not a tensor.
        ValueError: its number of rows is no multiple of K * B, or B is 0.

    Example:
        >>> split(torch.tensor([1, 2, 10, 20]), 2, 2)
        tensor([[ 1,  2],
                [10, 20]])
    """
    _check(views, layout)
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"The prediction is a {type(prediction).__name__}, where a tensor is needed: return logits, or an object "
            "with .logits, from forward, or override rdrop_predict(self, inputs) to return the tensor."
        )
    if examples < 1:
        raise ValueError(f"examples must be >= 1, got {examples}: an empty batch has no views; leave it out.")
    rows = len(prediction) if prediction.dim() else 0
    if rows % (views * examples) or rows == 0:
        raise ValueError(
            f"The forward returned {rows} rows (shape {tuple(prediction.shape)}) for {views} views of {examples} "
            f"examples, where {views * examples} or a multiple are needed: each row of the inputs must have a row in "
            f"the prediction, in the same order. {_SEPARATE}"
        )
    if layout == "block":
        return prediction.reshape(views, rows // views, *prediction.shape[1:])
    each = rows // (views * examples)
    return prediction.reshape(examples, views, each, *prediction.shape[1:]).movedim(1, 0).flatten(1, 2)


def _check(views: int, layout: Layout) -> None:
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        raise ValueError(f"views must be an int >= 1, got {views!r}.")
    if layout not in ("block", "interleaved"):
        raise ValueError(f"layout must be 'block' or 'interleaved', got {layout!r}.")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What the structure of a batch holds, each with its place."""
    parts = _structure(value)
    if parts is None:
        yield path, value
        return
    for key, part in parts.items():
        yield from _leaves(part, f"{path}.{key}" if _is_dataclass(value) else f"{path}[{key!r}]")


def _repeat(value: Any, views: int, examples: int, layout: Layout) -> Any:
    if isinstance(value, Tensor):
        if not value.dim():
            return value
        return torch.cat([value] * views) if layout == "block" else value.repeat_interleave(views, 0)
    parts = _structure(value)
    if parts is not None:
        return with_parts(value, {key: _repeat(part, views, examples, layout) for key, part in parts.items()})
    if not _is_list(value) or len(value) != examples:
        return value
    rows = range(examples * views)
    return type(value)([value[row % examples if layout == "block" else row // views] for row in rows])


def _structure(value: Any) -> dict[Any, Any] | None:
    """The parts of a nesting; None for a leaf. A list without rows is one: a thing for each example, or a constant."""
    parts = parts_of(value)
    return None if _is_list(value) and not any(map(_has_rows, _flat(value))) else parts


def parts_of(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, index or attribute; None for what is no container that is known."""
    if isinstance(value, _ATOMS):
        return None
    if isinstance(value, (dict, UserDict)):
        return {key: value[key] for key in value}
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if _is_dataclass(value):
        # attributes that __post_init__ or a cached property derived from the fields have rows, too
        names = [field.name for field in dataclasses.fields(value)] + list(getattr(value, "__dict__", ()))
        return {name: getattr(value, name) for name in dict.fromkeys(names) if hasattr(value, name)}
    return None


def with_parts(value: Any, parts: dict[Any, Any]) -> Any:
    """Another container of the same type, with these parts."""
    if type(value) is dict:  # copy.copy of it is beyond torch.compile
        return parts
    if isinstance(value, (list, tuple)):
        return value._make(parts.values()) if hasattr(value, "_make") else type(value)(list(parts.values()))
    clone = copy.copy(value)
    for key, part in parts.items():
        if _is_dataclass(value):
            object.__setattr__(clone, key, part)  # it may be frozen
        else:
            clone[key] = part
    return clone


def _flat(value: Any) -> Iterator[Any]:
    """All that is in a nesting, however deep."""
    parts = parts_of(value)
    if parts is None:
        yield value
    else:
        for part in parts.values():
            yield from _flat(part)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence) or (isinstance(leaf, Tensor) and leaf.dim() > 0)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not isinstance(value, _ATOMS) and not hasattr(value, "_fields")


def _is_dataclass(value: Any) -> bool:
    """Whether attributes are the parts of a value; a ModelOutput is a dict before all."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, dict, UserDict))


def _cannot_double(value: Any, path: str, why: str) -> TypeError:
    return TypeError(
        f"{path}, a {type(value).__name__}, cannot be doubled: it {why}. Make it a tensor (B, ...), or a dict of such, "
        f"in rdrop_unpack. {_SEPARATE}"
    )
