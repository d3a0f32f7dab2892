"""Consistency over other rows than those that have a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_rdrop.distance.wrapped import Wrapped, product
from lightning_rdrop.labels import RowWeights
from lightning_rdrop.terms import Average, Terms


class MaskedConsistency(Wrapped):
    r"""Any distance with a separate mask for kl; ce remains the mean over the rows that have a target.

    .. math::
        \text{ce} = \operatorname*{mean}_{n:\,y_n \text{ counts}} D(y_n, f_n), \qquad
        \text{kl} = \tfrac12 \operatorname*{mean}_{n:\,m_n = 1} \tfrac12 [D(f'_n, f_n) + D(f_n, f'_n)]

    For masked language modeling, where few tokens have a label but all that are not padding have two predictions: the
    target is ``(labels, attention_mask)``. Only the mask tells which rows count in kl, whatever their target is.

    Args:
        distance: the distance to wrap.

    Shapes:
        prediction as for ``distance``; target a pair (target, mask): what ``distance`` takes, and a mask of shape (N,)
        or with more dimensions of the rows, such as (N, T) for tokens; bool, or 0 and 1.

    Raises:
        TypeError: a target that is not such a pair, or a distance that does not keep its rows, such as
            :class:`~lightning_rdrop.Together`: wrap its parts instead.
        ValueError: a mask of another shape; on the first batch also values other than 0 and 1.

    Example:
        >>> from torch import tensor
        >>> from lightning_rdrop import Categorical
        >>> views = tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.75, 0.25]]]).log()
        >>> labels, mask = tensor([0, -100]), tensor([1, 1])
        >>> terms = MaskedConsistency(Categorical()).terms(views, (labels, mask), alpha=4.0)
        >>> terms.ce, terms.kl  # ln 2 of the first, and (0 + 0.25 ln 3 / 2) / 2 / 2 of both
        (tensor(0.6931), tensor(0.0343))
    """

    number = "mask"
    allowed = "a mask is bool, or 0 and 1. For row weights use Weighted(...)."

    def to_target(self, prediction: Any, target: Any) -> Average:
        return self.distance.to_target(prediction, self.pair(target)[0])

    def weighted_terms(
        self, predictions: Any, target: Any, alpha: float | Tensor, head: Any, weights: RowWeights
    ) -> Terms:
        target, mask = self.pair(target)
        kl = weights.kl if weights.everywhere else product(mask, weights.kl)
        weights = weights._replace(kl=kl, everywhere=True)
        return self.distance.weighted_terms(predictions, target, alpha, head, weights)

    def over_rows(self, measure: Callable[[Any], Average], target: Any, numbers: Tensor) -> Average:
        return measure(None).weighted(numbers)

    def wrong(self, numbers: Tensor) -> Tensor:
        return (numbers != 0) & (numbers != 1)
