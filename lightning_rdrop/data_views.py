"""Views that come with the data, such as two crops of an image, instead of copies of the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rdrop import views


@dataclass(init=False)
class Views:
    """K inputs for the same B examples, such as two augmentations, returned by ``rdrop_unpack`` as the inputs.

    View k of R-Drop is then the prediction for the k-th input, under its own dropout masks if there are any. All views
    share the target. Single passes, such as those of a regularizer, of validation, or with ``rdrop_views=1``, use the
    first view, so make it the least augmented one.

    Args:
        inputs: the inputs of each view, as for ``rdrop_predict``; as many as ``rdrop_views``.

    Raises:
        ValueError: no inputs.

    Example:
        >>> import torch
        >>> both = Views({"x": torch.tensor([1, 2])}, {"x": torch.tensor([10, 20])})
        >>> joined(both, 2, examples=2)
        {'x': tensor([ 1,  2, 10, 20])}

        For a data set whose items are ``((first, second), label)``:

        >>> def rdrop_unpack(self, batch):
        ...     (first, second), target = batch
        ...     return Views(first, second), target
    """

    inputs: tuple[Any, ...]

    def __init__(self, *inputs: Any) -> None:
        if not inputs:
            raise ValueError("Views needs the inputs of each view, as in Views(first, second), got none.")
        self.inputs = inputs


def first_view(inputs: Any) -> Any:
    """The inputs of a single pass: those of the first view if the data has several.

    Example:
        >>> first_view(Views("weak", "strong")), first_view("one")
        ('weak', 'one')
    """
    return inputs.inputs[0] if isinstance(inputs, Views) else inputs


def each_view(inputs: Any, count: int) -> Sequence[Any]:
    """The inputs of each of K views: those of the data, or the same inputs K times.

    Raises:
        ValueError: the data has another number of views.

    Example:
        >>> each_view("x", 3), each_view(Views("x", "y"), 2)
        (['x', 'x', 'x'], ('x', 'y'))
    """
    if not isinstance(inputs, Views):
        return [inputs] * count
    if count == 1:
        return inputs.inputs[:1]
    if len(inputs.inputs) != count:
        raise ValueError(
            f"The batch was unpacked into {len(inputs.inputs)} Views, but rdrop_views={count}. Return {count} inputs, "
            f"or train with rdrop_views={len(inputs.inputs)}."
        )
    return inputs.inputs


def joined(inputs: Any, count: int, examples: int) -> Any:
    """The inputs of K views as one batch of K * B rows, view after view.

    Args:
        inputs: inputs of B examples, as for :func:`~lightning_rdrop.views.duplicate`, or :class:`Views` of them.
        count: K.
        examples: B.

    Raises:
        ValueError: the data has another number of views, or the views differ in structure or shape.
    """
    if isinstance(inputs, Views):
        return views.concatenate(each_view(inputs, count), examples)
    return views.duplicate(inputs, count, examples)
