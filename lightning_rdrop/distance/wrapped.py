"""Wrappers of a distance, whose target has an additional number for each row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.terms import Average


class Wrapped(Distance):
    """Base class for wrappers of a distance: the target is a pair of its target and a number for each row.

    Args:
        distance: the distance to wrap; the terms keep its names.

    Raises:
        TypeError: it is not a distance.
    """

    number: str
    """Name of the second part of the target."""

    allowed: str
    """Its allowed values, and what to do about others; part of an error message."""

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        if not isinstance(distance, Distance):
            raise TypeError(f"distance must be a Distance, such as Categorical(), got {distance!r}.")
        self.distance = distance
        self.term_names = distance.term_names

    @property
    def ignore_index(self) -> Any:
        """The ``ignore_index`` of the wrapped distance, if it has one."""
        return self.distance.ignore_index

    @property
    def unwrapped(self) -> Distance:
        return self.distance.unwrapped

    def unwrapped_target(self, target: Any) -> Any:
        return self.distance.unwrapped_target(self.pair(target)[0])

    def between(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._consistency(partial(self.distance.between, first, second), target)

    def directed(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._consistency(partial(self.distance.directed, first, second), target)

    def with_row_weights(self, measure: Callable[[Any], Average], target: Any) -> Average:
        return self._consistency(partial(self.distance.with_row_weights, measure), target)

    def over_rows(self, measure: Callable[[Any], Average], target: Any, numbers: Tensor) -> Average:
        """The consistency of the rows, weighted or masked by ``numbers``.

        Args:
            measure: of the wrapped distance; takes a target, which tells which rows count; None if all do.
            target: what the wrapped distance takes.
            numbers: the second part of the target.
        """
        raise NotImplementedError

    def wrong(self, numbers: Tensor) -> Tensor:
        """Mask of the invalid values in the second part of a target."""
        raise NotImplementedError

    def pair(self, target: Any) -> tuple[Any, Tensor]:
        """Both parts of a target.

        Raises:
            TypeError: it is not a pair, or its second part is not a real tensor.
        """
        if isinstance(target, (tuple, list)) and len(target) == 2:
            first, numbers = target
            if isinstance(numbers, Tensor) and not numbers.is_complex():
                return first, numbers
        raise TypeError(
            f"{type(self).__name__} takes a target (target, {self.number}) whose second part is a tensor, got a "
            f"{type(target).__name__}. Return such a pair as the target from rdrop_unpack."
        )

    def check(self, prediction: Any, target: Any) -> None:
        target, numbers = self.pair(target)
        self.distance.check(prediction, target)
        if len(found := numbers[self.wrong(numbers)]):
            raise ValueError(f"The {self.number} contains {found[0].item()}; {self.allowed}")

    def has_invalid(self, prediction: Any, target: Any) -> Tensor:
        target, numbers = self.pair(target)
        within, wrong = self.distance.has_invalid(prediction, target), self.wrong(numbers).any()
        return wrong if within is None else wrong | within

    def prediction_warning(self, prediction: Any) -> str | None:
        return self.distance.prediction_warning(prediction)

    def _consistency(self, measure: Callable[[Any], Average], target: Any) -> Average:
        if target is None or isinstance(target, Tensor):  # unlabeled rows: a tensor tells which of them count
            return measure(target)
        return self.over_rows(measure, *self.pair(target))


def product(one: Tensor, other: Tensor | None) -> Tensor:
    """Multiply two numbers for each row, of which one may be per example, (N,), and the other per token, (N, T).

    Example:
        >>> from torch import tensor
        >>> product(tensor([1, 2]), tensor([[1, 0], [1, 1]]))
        tensor([[1, 0],
                [2, 2]])
    """
    if other is None:
        return one
    less, more = sorted((one, other), key=Tensor.dim)
    return less[(..., *[None] * (more.dim() - less.dim()))] * more
