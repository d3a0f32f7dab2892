"""The views of a batch: double whatever is in it, and take the predictions of the views apart."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Layout = Literal["block", "interleaved"]

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
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
    sizes = dict(_leading_sizes(batch, "batch"))
    if not sizes:
        raise ValueError(f"No tensor in the batch, a {type(batch).__name__}, has rows: a batch is at least (B, ...).")
    (path, size), *others = sizes.items()
    for other, its_size in others:
        if its_size != size:
            raise ValueError(
                f"{path} has {size} rows and {other} has {its_size}, so what belongs to an example is unclear. Every "
                f"tensor of a batch is (B, ...): keep constants in the module, pad what is of different lengths. "
                f"{_SEPARATE}"
            )
    return size


def duplicate(batch: Any, views: int, *, layout: Layout = "block") -> Any:
    """A batch of B examples as one of K * B rows, K views an example, in the same nesting.

    Tensors are repeated along their first dimension, and so are lists of B other things, such as strings. Tensors
    without dimensions, other lists, numbers, strings and None are constants. Nothing of the caller's is changed.

    Args:
        batch: any nesting of tensors, mappings, lists, tuples, named tuples and dataclasses.
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
        ValueError: its number of rows is no multiple of K * B.

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
    rows = len(prediction) if prediction.dim() else 0
    if rows % (views * examples) or rows == 0:
        raise ValueError(
            f"The forward returned {rows} rows (shape {tuple(prediction.shape)}) for {views} views of {examples} "
            f"examples, where {views * examples} or a multiple are needed: each row of the inputs must have a row in "
            f"the prediction, in the same order. {_SEPARATE}"
        )
    if layout == "block":
        return prediction.reshape(views, -1, *prediction.shape[1:])
    return prediction.reshape(examples, views, -1, *prediction.shape[1:]).movedim(1, 0).flatten(1, 2)


def _check(views: int, layout: Layout) -> None:
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        raise ValueError(f"views must be an int >= 1, got {views!r}.")
    if layout not in ("block", "interleaved"):
        raise ValueError(f"layout must be 'block' or 'interleaved', got {layout!r}.")


def _leading_sizes(value: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            raise _cannot_double(value, path, "is no plain, dense tensor")
        if value.dim():
            yield path, len(value)
        return
    parts = _parts(value)
    if parts is None:
        if not isinstance(value, _CONSTANTS):
            raise _cannot_double(value, path, "is nothing whose rows are known")
    elif _is_container(value):
        for key, part in parts:
            yield from _leading_sizes(part, f"{path}{key}")


def _repeat(value: Any, views: int, examples: int, layout: Layout) -> Any:
    if isinstance(value, Tensor):
        if not value.dim():
            return value
        return torch.cat([value] * views) if layout == "block" else value.repeat_interleave(views, 0)
    if isinstance(value, Mapping):
        clone: Any = copy.copy(value)
        for key in value:
            clone[key] = _repeat(value[key], views, examples, layout)
        return clone
    if dataclasses.is_dataclass(value):
        clone = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(clone, field.name, _repeat(getattr(value, field.name), views, examples, layout))
        return clone
    if not isinstance(value, (list, tuple)) or isinstance(value, torch.Size):
        return value
    if _is_container(value):
        items = [_repeat(item, views, examples, layout) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if len(value) != examples:
        return value
    rows = range(examples * views)
    return type(value)(value[row % examples if layout == "block" else row // views] for row in rows)


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """What a nesting holds, each with the way to write where; None for what holds nothing that is known."""
    if isinstance(value, PackedSequence):
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", value[key]) for key in value]
    if dataclasses.is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    return None


def _is_container(value: Any) -> bool:
    """Whether a nesting is part of the batch's structure, rather than a list with one thing for each example."""
    return type(value) not in (list, tuple) or any(_holds_rows(item) for item in value)


def _holds_rows(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0
    return isinstance(value, PackedSequence) or any(_holds_rows(part) for _, part in _parts(value) or ())


def _cannot_double(value: Any, path: str, why: str) -> TypeError:
    return TypeError(
        f"{path}, a {type(value).__name__}, cannot be doubled: it {why}. Make it a tensor (B, ...) in rdrop_unpack. "
        f"{_SEPARATE}"
    )
