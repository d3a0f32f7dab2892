"""Row weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_rdrop.distance.wrapped import Wrapped, product
from lightning_rdrop.labels import RowWeights
from lightning_rdrop.terms import Average, Terms


class Weighted(Wrapped):
    r"""Any distance with a weight for each row, in both terms.

    .. math::
        \text{ce} = \frac{\sum_n w_n D(y_n, f_n)}{\sum_n w_n}, \qquad
        \text{kl} = \tfrac12\,\frac{\sum_n w_n \tfrac12 [D(f'_n, f_n) + D(f_n, f'_n)]}{\sum_n w_n}

    A row of weight 2 counts like two equal rows, and one of weight 0 like none. Only the ratios of the weights within a
    batch matter, not their scale (with :class:`~lightning_rdrop.callbacks.ExactAccumulation`, the ratios within all
    batches of an optimizer step). So a batch in which all weights are small counts as much as any other. Weights may
    be learned: they get a gradient, for which a ``head`` stores all its logits.

    Args:
        distance: the distance to wrap. Its class weights, if any, are multiplied with the row weights in ce.

    Shapes:
        prediction as for ``distance``; target a pair (target, weight): what ``distance`` takes, and weights of shape
        (N,), or with more dimensions of the rows, such as (N, T) for tokens.

    Raises:
        TypeError: a target that is not such a pair, or a distance that does not keep its rows, such as
            :class:`~lightning_rdrop.Together`: wrap its parts instead.
        ValueError: weights of another shape; on the first batch also a negative, infinite or NaN weight.

    Example:
        >>> from torch import tensor
        >>> from lightning_rdrop import Categorical
        >>> logits = tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> Weighted(Categorical()).to_target(logits, (tensor([0, 0]), tensor([3.0, 1.0]))).mean  # (3 ln 2 + ln 4) / 4
        tensor(0.8664)
    """

    number = "weight"
    allowed = "a weight is a finite number >= 0. A row of weight 0 is ignored in both terms."

    def to_target(self, prediction: Any, target: Any) -> Average:
        target, weight = self.pair(target)
        return self.distance.to_target(prediction, target).weighted(weight)

    def weighted_terms(
        self, predictions: Any, target: Any, alpha: float | Tensor, head: Any, weights: RowWeights
    ) -> Terms:
        target, weight = self.pair(target)
        kl = weights.kl if weights.everywhere else product(weight, weights.kl)
        weights = weights._replace(ce=product(weight, weights.ce), kl=kl)
        return self.distance.weighted_terms(predictions, target, alpha, head, weights)

    def over_rows(self, measure: Callable[[Any], Average], target: Any, numbers: Tensor) -> Average:
        return measure(target).weighted(numbers)

    def wrong(self, numbers: Tensor) -> Tensor:
        return ~((numbers >= 0) & (numbers < math.inf))
