"""Duplicate a batch into views, and split a prediction into its views again.

Three terms have the same meaning throughout the package:

- An *example* is an item of the data set: a text or an image, with its target. A batch has B of them, and B is the
  batch size that is logged.
- A *view* is one prediction for the whole batch, under its own dropout masks. There are K of each batch.
- A *row* is an entry of a tensor's first dimension. The inputs of a batch have B rows, those of a duplicated batch
  K * B. In a prediction, a row is what the loss averages over: N rows per view, one for each example or each token.

Views come first: K views of N rows are one tensor (K, N, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_rdrop.arguments import whole
from lightning_rdrop.nesting import (
    ATOMS,
    CONSTANTS,
    copied,
    has_attributes,
    map_tensors,
    parts_of,
    tensors_of,
    with_parts,
)

_SEPARATE = 'Or run one forward pass for each view, which needs no duplication: rdrop_passes="separate".'


def batch_size(batch: Any, target: Any = None) -> int:
    """B, the number of examples: the common leading size of all tensors in a batch.

    Args:
        batch: see :func:`duplicate`.
        target: its target, if there is one. If a list in the batch has as many tensors as there are targets, each of
            these is a single example, such as an image, and not (B, ...).

    Raises:
        ValueError: no tensor has rows, or two tensors differ in their number of rows.
        TypeError: something in the batch cannot be duplicated (see :func:`duplicate`).

    Example:
        >>> batch_size({"x": torch.zeros(4, 8), "scale": torch.tensor(2.0), "name": "train"})
        4
    """
    sizes: dict[str, int] = {}
    lists: dict[str, Any] = {}
    for path, value in _walk(batch, "batch"):
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_nested:
                raise _not_duplicable(value, path, f"is a {'nested' if value.is_nested else value.layout} tensor")
            if value.dim():
                sizes[path] = len(value)
        elif _is_list(value):
            lists[path] = value
        elif _structure(value) is None and not isinstance(value, CONSTANTS):
            raise _not_duplicable(value, path, "is of a type whose rows are unknown")
    if not sizes:
        raise ValueError(f"The batch, a {type(batch).__name__}, has no tensor that has rows, (B, ...). {_SEPARATE}")
    (path, size), *others = sizes.items()
    for other, its_size in others:
        if its_size != size:
            raise ValueError(
                f"{path} has {size} rows and {other} has {its_size}, so it is unclear which rows belong together. "
                "Every tensor of a batch must be (B, ...): keep constants in the module, and pad sequences to one "
                f"length. {_SEPARATE}"
            )
    targets = _count(target)
    for path, items in lists.items():
        if targets == len(items) != size and all(isinstance(item, Tensor) for item in items):
            shape = tuple(items[0].shape)
            why = f"has one tensor for each of {targets} targets, such as an image {shape}, instead of tensors (B, ...)"
            raise _not_duplicable(items, path, why)
        unknown = [item for item in _flat(items) if not isinstance(item, ATOMS)]
        if unknown and _structure(items) is None and len(items) != size:
            found = type(unknown[0]).__name__
            raise _not_duplicable(items, path, f"contains a {found}, but not one item for each of the {size} examples")
        for inner, rows in _walk(items, path, size) if _structure(items) is None else ():
            if _is_list(rows) and len(rows) == size and _has_columns(rows, size):
                reason = f"contains {size} lists of {size} items, so it is unclear which of them are the examples"
                raise _not_duplicable(rows, inner, reason)
    return size


def duplicate(batch: Any, views: int, examples: int | None = None) -> Any:
    """Repeat a batch of B examples to K * B rows, view after view, in the same containers.

    Tensors are repeated along their first dimension, also those in a list: each must be (B, ...), not a single example.
    Lists of B other items, such as strings, are repeated in the same order, also each of several such lists in a list,
    as ``default_collate`` makes them. Tensors without dimensions, other lists, numbers, strings and None are constants.
    The result shares no memory with the caller's batch.

    Args:
        batch: any nesting of tensors, dicts (and UserDicts), lists, tuples, named tuples and dataclasses.
        views: K >= 1.
        examples: B, if known from :func:`batch_size`.

    Raises:
        TypeError: the batch contains something that cannot be duplicated safely, such as a PackedSequence, a sparse
            tensor or a graph.
        ValueError: tensors have different numbers of rows.

    Example:
        >>> duplicate((torch.tensor([1, 2]), ["a", "b"]), 2)
        (tensor([1, 2, 1, 2]), ['a', 'b', 'a', 'b'])
    """
    if whole("views", views) == 1:
        return copied(batch)
    examples = batch_size(batch) if examples is None else examples
    return _map_rows(batch, examples, lambda tensor: torch.cat([tensor] * views), lambda items: [*items] * views)


def concatenate(batches: Sequence[Any], examples: int) -> Any:
    """Concatenate K batches of B examples to K * B rows, batch after batch, in the containers of the first.

    What :func:`duplicate` repeats is concatenated here; constants are taken from the first batch.

    Args:
        batches: K batches, as for :func:`duplicate`.
        examples: B.

    Raises:
        ValueError: the batches do not have the same tensors with the same shapes.

    Example:
        >>> concatenate([{"x": torch.tensor([1, 2])}, {"x": torch.tensor([10, 20])}], 2)
        {'x': tensor([ 1,  2, 10, 20])}
    """
    columns = [dict(_columns(batch, examples)) for batch in batches]
    shapes = [{path: getattr(rows, "shape", None) for path, rows in column.items()} for column in columns]
    for number, other in enumerate(shapes):
        if other != shapes[0]:
            path = next(path for path in (*shapes[0], *other) if shapes[0].get(path) != other.get(path))
            found = [tuple(each[path] or ()) if path in each else "nothing" for each in (shapes[0], other)]
            raise ValueError(
                f"View 0 has {path} of shape {found[0]}, and view {number} has {found[1]} there, but views in one pass "
                f"must have the same structure and shapes. Pad them to one length. {_SEPARATE}"
            )
    rows = zip(*(column.values() for column in columns), strict=True)
    return _map_rows(
        batches[0], examples, lambda _: torch.cat(next(rows)), lambda _: [item for each in next(rows) for item in each]
    )


def repeat(target: Any, views: int) -> Any:
    """Repeat every tensor (N, ...) of a target to (K * N, ...), view after view; scalar tensors are constants.

    Example:
        >>> repeat((torch.tensor([1, 2]), torch.tensor(7)), 2)
        (tensor([1, 2, 1, 2]), tensor(7))
    """
    return map_tensors(target, lambda tensor: torch.cat([tensor] * views) if tensor.dim() else tensor)


def take(batch: Any, rows: Sequence[int], examples: int) -> Any:
    """Select rows of a batch by index, in the given order and in the same containers.

    Args:
        batch: as for :func:`duplicate`.
        rows: their indices, possibly repeated.
        examples: B.

    Example:
        >>> take((torch.tensor([1, 2]), ["a", "b"]), [1, 1, 0], 2)
        (tensor([2, 2, 1]), ['b', 'b', 'a'])
    """
    return _map_rows(batch, examples, lambda tensor: tensor[list(rows)], lambda items: [items[row] for row in rows])


def split(prediction: Any, views: int, examples: int) -> Any:
    """Split a prediction (K * N, ...) for a duplicated batch into its views (K, N, ...), tensor by tensor.

    Args:
        prediction: a tensor with K * B rows, or a multiple if the model flattens tokens into rows; or any nesting of
            such tensors, in which scalar tensors are constants.
        views: K.
        examples: B.

    Raises:
        TypeError: the prediction contains no tensor.
        ValueError: its number of rows is not a multiple of K * B, or B is 0.

    Example:
        >>> split(torch.tensor([1, 2, 10, 20]), 2, 2)
        tensor([[ 1,  2],
                [10, 20]])
    """
    whole("views", views)
    if examples < 1:
        raise ValueError(f"examples must be >= 1, got {examples}: an empty batch has no views. Skip it.")

    def split_rows(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 and tensor is not prediction:
            return tensor
        rows = len(tensor) if tensor.dim() else 0
        if rows % (views * examples) or rows == 0:
            raise ValueError(
                f"forward returned {rows} rows (shape {tuple(tensor.shape)}) for {views} views of {examples} "
                f"examples, but must return {views * examples} or a multiple: one row for each row of the inputs, "
                f"in the same order. {_SEPARATE}"
            )
        return tensor.reshape(views, rows // views, *tensor.shape[1:])

    return map_tensors(_with_tensors(prediction), split_rows)


def stack(predictions: Sequence[Any]) -> Any:
    """Stack K predictions (N, ...), each from its own pass, into views (K, N, ...).

    Raises:
        TypeError: a prediction contains no tensor.

    Example:
        >>> stack([{"logits": torch.tensor([1, 2])}, {"logits": torch.tensor([10, 20])}])
        {'logits': tensor([[ 1,  2],
                [10, 20]])}
    """
    rows = [iter([tensor for _, tensor in tensors_of(prediction)]) for prediction in predictions]
    return map_tensors(_with_tensors(predictions[0]), lambda _: torch.stack([next(each) for each in rows]))


def join(parts: Sequence[Any]) -> Any:
    """Concatenate predictions (K, N, ...) that were drawn a few views at a time.

    Example:
        >>> join([torch.tensor([[1, 2], [3, 4]]), torch.tensor([[10, 20]])])
        tensor([[ 1,  2],
                [ 3,  4],
                [10, 20]])
    """
    tensors = [iter([tensor for _, tensor in tensors_of(part)]) for part in parts]

    def joined(first: Tensor) -> Tensor:
        same = [next(each) for each in tensors]
        return torch.cat(same) if first.dim() else first

    return map_tensors(parts[0], joined)


def view(predictions: Any, number: int) -> Any:
    """Select one of K views (K, N, ...).

    Example:
        >>> view(torch.tensor([[1, 2], [10, 20]]), 1)
        tensor([10, 20])
    """
    return map_tensors(predictions, lambda tensor: tensor[number] if tensor.dim() else tensor)


def merge(predictions: Any) -> Any:
    """Flatten predictions (K, N, ...) into the rows of all views, (K * N, ...).

    Example:
        >>> merge(torch.tensor([[1, 2], [10, 20]]))
        tensor([ 1,  2, 10, 20])
    """
    return map_tensors(predictions, lambda tensor: tensor.flatten(0, 1) if tensor.dim() else tensor)


def count(predictions: Any) -> int:
    """K, the number of views of predictions (K, N, ...).

    Example:
        >>> count({"logits": torch.zeros(3, 5)})
        3
    """
    return len(first_tensor(predictions))


def first_tensor(predictions: Any) -> Tensor:
    """The first tensor with dimensions, for the number of views, the dtype and the device."""
    return next(tensor for _, tensor in tensors_of(predictions) if tensor.dim())


def device_of(network: nn.Module, inputs: Any) -> torch.device:
    """The device of a LightningModule, or of its inputs for a plain ``nn.Module``, which has none."""
    device: torch.device | None = getattr(network, "device", None)
    return device or first_tensor(inputs).device


def _with_tensors(prediction: Any) -> Any:
    if isinstance(prediction, Tensor) or any(tensor.dim() for _, tensor in tensors_of(prediction)):
        return prediction
    raise TypeError(
        f"The prediction, a {type(prediction).__name__}, contains no tensor: return logits, or an object with .logits, "
        "from forward, or override rdrop_predict(self, inputs) to return the prediction."
    )


def _walk(value: Any, path: str, examples: int | None = None) -> Iterator[tuple[str, Any]]:
    """Everything in a batch, containers before their parts, with the expression that accesses it."""
    yield path, value
    for key, part in (_structure(value, examples) or {}).items():
        yield from _walk(part, f"{path}.{key}" if has_attributes(value) else f"{path}[{key!r}]", examples)


def _columns(batch: Any, examples: int) -> Iterator[tuple[str, Any]]:
    """The tensors and lists that have one row or item for each example, with their paths."""
    for path, value in _walk(batch, "inputs", examples):
        leaf = isinstance(value, Tensor) or _structure(value, examples) is None
        if leaf and (value.dim() if isinstance(value, Tensor) else _is_list(value) and len(value) == examples):
            yield path, value


def _count(target: Any) -> int | None:
    """The number of targets in a tensor, or in a list without tensors; else None."""
    if isinstance(target, Tensor):
        return len(target) if target.dim() else None
    return len(target) if _is_list(target) and not any(isinstance(part, Tensor) for part in target) else None


def _map_rows(value: Any, examples: int, tensor: Callable[[Tensor], Tensor], items: Callable[[Any], list[Any]]) -> Any:
    """Map the tensors, and the lists with one item for each example, within the same containers."""
    if isinstance(value, Tensor):
        return tensor(value) if value.dim() else value.clone()
    parts = _structure(value, examples)
    if parts is not None:
        return with_parts(value, {key: _map_rows(part, examples, tensor, items) for key, part in parts.items()})
    return type(value)(items(value)) if _is_list(value) and len(value) == examples else value


def _structure(value: Any, examples: int | None = None) -> dict[Any, Any] | None:
    """The parts of a container; None for a leaf, including a list without tensors, unless it has a list per column."""
    if _is_list(value) and not any(map(_has_rows, _flat(value))):
        return parts_of(value) if len(value) != examples and _has_columns(value, examples) else None
    return parts_of(value)


def _has_columns(items: Any, examples: int | None) -> bool:
    """Whether a list holds lists of one item for each example, as ``default_collate`` makes of lists of strings."""
    return (
        len(items) > 0
        and not all(isinstance(item, (int, float, complex)) for item in _flat(items))  # of which it makes tensors
        and all(_is_list(item) and (len(item) == examples or _has_columns(item, examples)) for item in items)
    )


def _flat(value: Any) -> Iterator[Any]:
    """The leaves of a container, at any depth."""
    parts = parts_of(value)
    if parts is None:
        yield value
    else:
        for part in parts.values():
            yield from _flat(part)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence) or (isinstance(leaf, Tensor) and leaf.dim() > 0)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not isinstance(value, ATOMS) and not hasattr(value, "_fields")


def _not_duplicable(value: Any, path: str, why: str) -> TypeError:
    return TypeError(
        f"{path}, a {type(value).__name__}, cannot be duplicated: it {why}. Convert it to tensors (B, ...) in "
        f"rdrop_unpack. {_SEPARATE}"
    )
