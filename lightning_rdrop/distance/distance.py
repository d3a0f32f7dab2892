"""The base class of distances: two measures, and the loss computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from lightning_rdrop import views
from lightning_rdrop.description import Described
from lightning_rdrop.distance.predictive import Predictive
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.labels import UNIT_WEIGHTS, RowWeights, equals
from lightning_rdrop.nesting import map_tensors
from lightning_rdrop.terms import Average, Terms, fitted


class RowMask(NamedTuple):
    """Replaces a target to tell which rows count between two predictions, if no target value can tell."""

    mask: Tensor
    """(N,), or with more dimensions of the rows, such as (N, T) for tokens. If it does not fit the rows, as when each
    row is a whole text, all rows count."""


def measured(measure: Callable[[Any, Any, Any], Average], first: Any, second: Any, target: Any) -> Average:
    """Call ``between`` or ``directed`` of a distance with a target or a :class:`RowMask`.

    Args:
        measure: the bound method.
        first, second: shape (N, ...).
        target: what the method takes, or a :class:`RowMask`.

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
    D(f_1, f_2)]`. A subclass defines :meth:`to_target` and :meth:`between`, the two sums; :meth:`terms` computes the
    loss from them. A subclass with a faster way to the same loss also overrides :meth:`terms`, or
    :meth:`weighted_terms`, which it calls. Its own subclasses inherit that, unless they override one of ``measures``.

    Source: Su Jianlin, spaces.ac.cn/archives/8496.
    """

    term_names: tuple[str, str] = ("ce", "kl")
    """The names under which the two terms are logged."""

    ignore_value: float | None = None
    """Targets with this value, rounded to their dtype, are ignored in both terms; NaN matches NaN, None nothing."""

    measures: ClassVar[tuple[str, ...]] = ("to_target", "between", "counted")
    """Methods that define D and its rows; a subclass that overrides one falls back to the general ``terms``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def depth(name: str) -> int:
            return next(place for place, base in enumerate(cls.__mro__) if name in vars(base))

        for way in ("terms", "weighted_terms"):
            if any(depth(measure) < depth(way) for measure in cls.measures):
                setattr(cls, way, getattr(Distance, way))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move tensor attributes, such as class weights, to the device of the module, but never cast them.

        They are not buffers: ``precision="bf16-true"`` would round those, and weight averaging would average them.
        FSDPStrategy leaves them on the CPU. On the meta device they would lose their values.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor) and not (moved := fn(value)).is_meta:
                vars(self)[name] = value.to(moved.device)
        return self

    def to_target(self, prediction: Any, target: Any) -> Average:
        """Sum D(target, prediction) over the rows that count, and return it with their weight.

        Args:
            prediction: shape (N, ...).
            target: shape (N, ...).
        """
        raise NotImplementedError

    def between(self, first: Any, second: Any, target: Any = None) -> Average:
        """Sum 1/2 [D(second, first) + D(first, second)] over the rows that count, and return it with their number.

        Args:
            first: shape (N, ...), the prediction of one view.
            second: same shape, the prediction of another view.
            target: tells which rows count; all if not given.
        """
        raise NotImplementedError

    def directed(self, first: Any, second: Any, target: Any = None) -> Average:
        """Sum D(first, second), in this direction only, with ``first`` held fixed; :meth:`between` by default.

        Args:
            first, second, target: as for :meth:`between`.
        """
        return self.between(first, second, target)

    def part(self, name: str) -> Distance:
        """The distance of one of several named predictions; see :class:`~lightning_rdrop.Together`."""
        raise KeyError(name)

    @property
    def unwrapped(self) -> Distance:
        """The distance without wrappers, which takes the :meth:`unwrapped_target`."""
        return self

    def unwrapped_target(self, target: Any) -> Any:
        """The part of a target that a metric compares with predictions: the target without row weights or mask."""
        return target

    def with_row_weights(self, measure: Callable[[Any], Average], target: Any) -> Average:
        """Measure rows with the weights that they have in the consistency.

        Args:
            measure: takes a target of :attr:`unwrapped`, which tells which rows count; None if all do.
            target: as for :meth:`to_target`.
        """
        return measure(target)

    def counted(self, prediction: Any, target: Any) -> Tensor | None:
        """Mask of the rows that count, in both terms; None if all do.

        A subclass that overrides it falls back to the general :meth:`terms`, which counts these rows, except for
        :class:`~lightning_rdrop.CTC`, where the lengths tell what counts.

        Args:
            prediction: as for :meth:`to_target`.
            target: likewise, in its own dtype: after a cast, ``ignore_value`` may be rounded differently.
        """
        return None if self.ignore_value is None else ~equals(target, self.ignore_value)

    def invalid_mask(self, prediction: Any, target: Any) -> Tensor | None:
        """Mask of the invalid values of the target; None if every value is valid.

        Args:
            prediction, target: as for :meth:`to_target`.
        """
        return None

    def has_invalid(self, prediction: Any, target: Any) -> Tensor | None:
        """Whether any value of the target is invalid, as a bool tensor on its device, without synchronization.

        Args:
            prediction, target: as for :meth:`to_target`.
        """
        wrong = self.invalid_mask(prediction, target)
        return None if wrong is None else wrong.any()

    def check(self, prediction: Any, target: Any) -> None:
        """Raise an error if the target contains an invalid value. Synchronizes the device; for the first batch only.

        Args:
            prediction, target: as for :meth:`to_target`.

        Raises:
            ValueError: there is such a value; the message names it.
        """

    def prediction_warning(self, prediction: Any) -> str | None:
        """Describe what is probably wrong with a prediction, such as a softmax instead of logits; None if nothing is.

        Synchronizes the device; for the first batch only.

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
            head: the linear output layer that maps hidden states to predictions, a
                :class:`~lightning_rdrop.Head`; a mapping by name for :class:`~lightning_rdrop.Together`.

        Raises:
            TypeError: a head, if the distance is not :class:`~lightning_rdrop.Categorical` or a wrapper of it; or a
                :meth:`to_target` or :meth:`between` that does not return an :class:`~lightning_rdrop.Average`.
        """
        return self.weighted_terms(predictions, target, alpha, head, UNIT_WEIGHTS)

    def weighted_terms(
        self, predictions: Any, target: Any, alpha: float | Tensor, head: Any, weights: RowWeights
    ) -> Terms:
        """Same as :meth:`terms`, with row weights, as :class:`~lightning_rdrop.Weighted` needs it.

        Args:
            predictions, target, alpha, head: as for :meth:`terms`.
            weights: the weight of each row in each term, (N,) or with more dimensions of the rows.
        """
        if head is not None:
            raise TypeError(f"A fused head needs the distance Categorical(class_dim=-1), got {self!r}.")
        count = views.count(predictions)
        merged = views.merge(_held(predictions, weights.ce))
        task = _average(self, "to_target", self.to_target(merged, views.repeat(target, count)))
        if weights.ce is not None:
            task = task.weighted(views.repeat(weights.ce, count))
        held = _held(predictions, weights.kl)
        between = self.over_pairs(held, None if weights.everywhere else target, weights.kl)
        rows = task.weight.detach() / count
        kl_rows = between.weight.detach() / math.comb(count, 2) if count > 1 else None
        return Terms.of(task, between, alpha, prediction=views.view(predictions, 0), rows=rows, kl_rows=kl_rows)

    def consistency(self, predictions: Any, alpha: float | Tensor, target: Any = None) -> Terms:
        """The terms of unlabeled rows, which have no ce: loss = alpha kl.

        Args:
            predictions: shape (K, N, ...), views first.
            alpha: the weight of kl.
            target: shape (N, ...), or a :class:`RowMask`; only tells which rows count; all if not given.
        """
        zero = _zero(predictions)
        between = self.over_pairs(predictions, target)
        return Terms.of(Average(zero, zero), between, alpha, prediction=views.view(predictions, 0))

    def over_pairs(self, predictions: Any, target: Any = None, weight: Tensor | None = None) -> Average:
        """Sum :meth:`between` over all pairs of K views, and return it with the number of rows summed.

        Args:
            predictions: shape (K, N, ...), views first.
            target: as for :meth:`between`, or a :class:`RowMask`.
            weight: the weight of each row, (N,) or with more dimensions of the rows; None is 1.
        """
        by_view = [views.view(predictions, number) for number in range(views.count(predictions))]
        zero = _zero(predictions)

        def between(first: Any, second: Any, target: Any) -> Average:
            return _average(self, "between", self.between(first, second, target))

        pairs = (measured(between, first, second, target) for first, second in combinations(by_view, 2))
        weighted = pairs if weight is None else (pair.weighted(weight) for pair in pairs)
        return sum(weighted, start=Average(zero, zero))


def _average(distance: Distance, method: str, value: Any) -> Average:
    if not isinstance(value, Average):
        raise TypeError(
            f"{type(distance).__name__}.{method} must return an Average, got a {type(value).__name__}. Wrap it: "
            "Average.of(values), with one value per row."
        )
    return value


def _held(predictions: Any, weight: Tensor | None) -> Any:
    """Detach the examples of weight 0 in predictions (K, N, ...), whose gradient may be NaN if they are not finite."""
    if weight is None:
        return predictions
    examples = weight.shape[:1]
    counted = (weight != 0).unsqueeze(-1).flatten(len(examples)).any(-1)

    def held(tensor: Tensor) -> Tensor:
        fits = tensor.shape[1:2] == examples  # otherwise there is an error later
        return tensor.where(fitted(counted, tensor.shape[1:]), tensor.detach()) if fits else tensor

    return map_tensors(predictions, held)


def _zero(predictions: Any) -> Tensor:
    return at_least_float32(views.first_tensor(predictions).new_zeros(()))
