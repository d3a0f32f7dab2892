"""A distance around another one, whose target says more of each row than the other takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.terms import Average


class Wrapped(Distance):
    """A distance around another one, whose target is a pair: that of the other, and a number for each of its rows.

    Args:
        distance: the other one, whose names the terms have.

    Raises:
        TypeError: it is no distance.
    """

    number: str
    """What the second part of the target is called."""

    allowed: str
    """What it may hold, and what to do about all else."""

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        if not isinstance(distance, Distance):
            raise TypeError(f"distance must be a Distance, such as Categorical(), got {distance!r}.")
        self.distance = distance
        self.term_names = distance.term_names

    @property
    def ignore_index(self) -> Any:
        """That of the distance within, if it has one."""
        return self.distance.ignore_index

    @property
    def reader(self) -> Distance:
        return self.distance.reader

    def truth(self, target: Any) -> Any:
        return self.distance.truth(self.pair(target)[0])

    def between(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._consistency(partial(self.distance.between, first, second), target)

    def directed(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._consistency(partial(self.distance.directed, first, second), target)

    def as_counted(self, measure: Callable[[Any], Average], target: Any) -> Average:
        return self._consistency(partial(self.distance.as_counted, measure), target)

    def over_rows(self, measure: Callable[[Any], Average], target: Any, numbers: Tensor) -> Average:
        """The consistency of the rows that count, and as they do.

        Args:
            measure: that of the distance within, whose argument tells which rows count; None if all do.
            target: what the distance within takes.
            numbers: the second part of the target.
        """
        raise NotImplementedError

    def wrong(self, numbers: Tensor) -> Tensor:
        """A mask of the impossible ones in the second part of a target."""
        raise NotImplementedError

    def pair(self, target: Any) -> tuple[Any, Tensor]:
        """Both parts of a target.

        Raises:
            TypeError: it is no pair, or its second part no tensor of numbers.
        """
        if isinstance(target, (tuple, list)) and len(target) == 2:
            first, numbers = target
            if isinstance(numbers, Tensor) and not numbers.is_complex():
                return first, numbers
        raise TypeError(
            f"{type(self).__name__} takes the target (target, {self.number}), the latter a tensor, got a "
            f"{type(target).__name__}. Return both as the target from rdrop_unpack."
        )

    def check(self, prediction: Any, target: Any) -> None:
        target, numbers = self.pair(target)
        self.distance.check(prediction, target)
        if len(found := numbers[self.wrong(numbers)]):
            raise ValueError(f"The {self.number} holds {found[0].item()}; {self.allowed}")

    def invalid(self, prediction: Any, target: Any) -> Tensor:
        target, numbers = self.pair(target)
        within, wrong = self.distance.invalid(prediction, target), self.wrong(numbers).any()
        return wrong if within is None else wrong | within

    def suspicious(self, prediction: Any) -> str | None:
        return self.distance.suspicious(prediction)

    def _consistency(self, measure: Callable[[Any], Average], target: Any) -> Average:
        if target is None or isinstance(target, Tensor):  # unlabelled rows, and which of them count
            return measure(target)
        return self.over_rows(measure, *self.pair(target))


def both(one: Tensor, other: Tensor | None) -> Tensor:
    """The product of two numbers for each row, of which one may be of examples, (N,), and the other of tokens, (N, T).

    Example:
        >>> from torch import tensor
        >>> both(tensor([1, 2]), tensor([[1, 0], [1, 1]]))
        tensor([[1, 0],
                [2, 2]])
    """
    if other is None:
        return one
    less, more = sorted((one, other), key=Tensor.dim)
    return less[(..., *[None] * (more.dim() - less.dim()))] * more
