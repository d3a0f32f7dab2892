"""What every distance has: two measures, and the loss that is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_rdrop import views
from lightning_rdrop.description import Described
from lightning_rdrop.distance.predictive import Predictive
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.labels import EVENLY, RowWeights
from lightning_rdrop.terms import Average, Terms


class RowMask(NamedTuple):
    """In the place of a target: which rows count between two predictions, for a distance with no value that says so."""

    mask: Tensor
    """(N,), or further dimensions of the rows, as (N, T) of tokens; where a row is a whole text, all count."""


def measured(measure: Callable[[Any, Any, Any], Average], first: Any, second: Any, target: Any) -> Average:
    """What ``between`` or ``directed`` of a distance says of two predictions.

    Args:
        measure: that method.
        first, second: shape (N, ...).
        target: as for it, or a :class:`RowMask`.

    Example:
        >>> from torch import ones, tensor, zeros
        >>> from lightning_rdrop import Gaussian
        >>> measured(Gaussian().between, zeros(1, 3, 2), ones(1, 3, 2), RowMask(tensor([[1, 1, 0]]))).weight
        tensor(4.)
    """
    if not isinstance(target, RowMask):
        return measure(first, second, target)
    average, mask = measure(first, second, None), target.mask
    fits = average.rows is not None and average.rows[0].shape[: mask.dim()] == mask.shape
    return average.weighted(mask) if fits else average


class Distance(Described, Predictive):
    r"""A measure D of a prediction f against a target y, and of two predictions against each other.

    R-Drop for any task: :math:`\text{mean } D(y, f) + \alpha \cdot \tfrac12 \text{ mean } \tfrac12 [D(f_2, f_1) +
    D(f_1, f_2)]`. A subclass defines :meth:`to_target` and :meth:`between`, the two sums; :meth:`terms` makes the loss
    of them. A subclass that knows a faster way to the same loss overrides :meth:`terms` as well, or
    :meth:`weighted_terms`, which it calls, and its subclasses inherit that, unless they measure something else.

    Source: Su Jianlin, spaces.ac.cn/archives/8496.
    """

    term_names: tuple[str, str] = ("ce", "kl")
    """The names under which the two terms are logged."""

    ignore_value: float | None = None
    """A target with this value (NaN matches NaN) counts in neither term; with None every target counts."""

    measures: ClassVar[tuple[str, ...]] = ("to_target", "between", "counted")
    """The methods that say what D is and of which rows; who overrides one goes back to the general ``terms``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def depth(name: str) -> int:
            return next(place for place, base in enumerate(cls.__mro__) if name in vars(base))

        for way in ("terms", "weighted_terms"):
            if any(depth(measure) < depth(way) for measure in cls.measures):
                setattr(cls, way, getattr(Distance, way))

    def to_target(self, prediction: Any, target: Any) -> Average:
        """D(target, prediction), summed over the rows that count, with their weight.

        Args:
            prediction: shape (N, ...).
            target: shape (N, ...).
        """
        raise NotImplementedError

    def between(self, first: Any, second: Any, target: Any = None) -> Average:
        """1/2 [D(second, first) + D(first, second)], summed over the rows that count, with their number.

        Args:
            first: shape (N, ...), the prediction of one view.
            second: same shape, that of another.
            target: tells which rows count; without it all do.
        """
        raise NotImplementedError

    def directed(self, first: Any, second: Any, target: Any = None) -> Average:
        """D(first, second), in this direction only, for a ``first`` that is held fixed; :meth:`between` by default.

        Args:
            first, second, target: as for :meth:`between`.
        """
        return self.between(first, second, target)

    def part(self, name: str) -> Distance:
        """The distance of one of several predictions; see :class:`~lightning_rdrop.Together`."""
        raise KeyError(name)

    @property
    def reader(self) -> Distance:
        """What reads a prediction and the :meth:`truth` of a target: the distance itself, or the one that it wraps."""
        return self

    def truth(self, target: Any) -> Any:
        """The part of a target that a metric compares with predictions: all of it, unless a weight comes with it."""
        return target

    def as_counted(self, measure: Callable[[Any], Average], target: Any) -> Average:
        """What is measured of rows, each as often as it counts in the consistency.

        Args:
            measure: its argument, a target of :attr:`reader`, tells which rows count; None if all do.
            target: as for :meth:`to_target`.
        """
        return measure(target)

    def counted(self, prediction: Any, target: Any) -> Tensor | None:
        """A mask of the rows that count, in both terms; None if all do.

        A subclass that overrides it goes back to the general :meth:`terms`, and counts these rows. Not so one of
        :class:`~lightning_rdrop.CTC`, whose lengths say what counts.

        Args:
            prediction, target: as for :meth:`to_target`.
        """
        if self.ignore_value is None:
            return None
        counted: Tensor = ~target.isnan() if math.isnan(self.ignore_value) else target != self.ignore_value
        return counted

    def impossible(self, prediction: Any, target: Any) -> Tensor | None:
        """A mask of the values of the target that make no sense to this distance; None if any value does.

        Args:
            prediction, target: as for :meth:`to_target`.
        """
        return None

    def invalid(self, prediction: Any, target: Any) -> Tensor | None:
        """Whether any value of the target is impossible: a bool tensor on its device, without a synchronisation.

        Args:
            prediction, target: as for :meth:`to_target`.
        """
        wrong = self.impossible(prediction, target)
        return None if wrong is None else wrong.any()

    def check(self, prediction: Any, target: Any) -> None:
        """Refuse a target that holds an impossible value. Synchronises the device, so it is for a first batch.

        Args:
            prediction, target: as for :meth:`to_target`.

        Raises:
            ValueError: there is such a value; the message names it.
        """

    def suspicious(self, prediction: Any) -> str | None:
        """What is probably wrong with a prediction, such as a softmax where logits are expected; None if nothing is.

        Synchronises the device, so it is for a first batch.

        Args:
            prediction: shape (N, ...).
        """
        return None

    def terms(self, predictions: Any, target: Any, alpha: float | Tensor, head: Any = None) -> Terms:
        r"""The R-Drop loss of K views.

        .. math::
            \operatorname*{mean}_{k,n} D(y_n, f_{kn})
                + \alpha\,\tfrac12 \operatorname*{mean}_{n,\,j<k} \tfrac12 [D(f_{jn}, f_{kn}) + D(f_{kn}, f_{jn})]

        Args:
            predictions: shape (K, N, ...), views first; with a ``head`` hidden states (K, N, ..., D).
            target: shape (N, ...).
            alpha: the weight of kl.
            head: the linear output layer that makes the predictions of hidden states, a
                :class:`~lightning_rdrop.Head`; several by name for :class:`~lightning_rdrop.Together`.

        Raises:
            TypeError: a head, which only :class:`~lightning_rdrop.Categorical` takes, alone or within another; or a
                :meth:`to_target` or :meth:`between` that returns no :class:`~lightning_rdrop.Average`.
        """
        return self.weighted_terms(predictions, target, alpha, head, EVENLY)

    def weighted_terms(
        self, predictions: Any, target: Any, alpha: float | Tensor, head: Any, weights: RowWeights
    ) -> Terms:
        """The same of rows that count as often as their weights say, for :class:`~lightning_rdrop.Weighted`.

        Args:
            predictions, target, alpha, head: as for :meth:`terms`.
            weights: how often each row counts in each term, (N,) or further dimensions of the rows.
        """
        if head is not None:
            raise TypeError(f"A fused head needs the distance Categorical(class_dim=-1), got {self!r}.")
        count = views.count(predictions)
        task = _average(self, "to_target", self.to_target(views.merge(predictions), views.repeat(target, count)))
        if weights.ce is not None:
            task = task.weighted(views.repeat(weights.ce, count))
        between = self.over_pairs(predictions, None if weights.everywhere else target, weights.kl)
        rows = task.weight.detach() / count
        kl_rows = between.weight.detach() / math.comb(count, 2) if count > 1 else None
        return Terms.of(task, between, alpha, prediction=views.view(predictions, 0), rows=rows, kl_rows=kl_rows)

    def consistency(self, predictions: Any, alpha: float | Tensor, target: Any = None) -> Terms:
        """The terms of unlabelled rows, which have no ce: loss = alpha kl.

        Args:
            predictions: shape (K, N, ...), views first.
            alpha: the weight of kl.
            target: shape (N, ...), or a :class:`RowMask`; tells which rows count, and nothing else; without it all do.
        """
        zero = _zero(predictions)
        between = self.over_pairs(predictions, target)
        return Terms.of(Average(zero, zero), between, alpha, prediction=views.view(predictions, 0))

    def over_pairs(self, predictions: Any, target: Any = None, weight: Tensor | None = None) -> Average:
        """:meth:`between` over all pairs of K views, summed over pairs and rows, with their number.

        Args:
            predictions: shape (K, N, ...), views first.
            target: as for :meth:`between`, or a :class:`RowMask`.
            weight: how often each row counts, (N,) or further dimensions of the rows; None is once.
        """
        apart = [views.view(predictions, number) for number in range(views.count(predictions))]
        zero = _zero(predictions)

        def between(first: Any, second: Any, target: Any) -> Average:
            return _average(self, "between", self.between(first, second, target))

        pairs = (measured(between, first, second, target) for first, second in combinations(apart, 2))
        weighted = pairs if weight is None else (pair.weighted(weight) for pair in pairs)
        return sum(weighted, start=Average(zero, zero))


def _average(distance: Distance, method: str, value: Any) -> Average:
    if not isinstance(value, Average):
        raise TypeError(
            f"{type(distance).__name__}.{method} must return an Average, got a {type(value).__name__}. Wrap it: "
            "Average.of(values), with one value for each row."
        )
    return value


def _zero(predictions: Any) -> Tensor:
    return at_least_float32(views.first_tensor(predictions).new_zeros(()))
