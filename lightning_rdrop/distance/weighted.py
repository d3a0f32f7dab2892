"""Rows that count more than others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_rdrop.distance.wrapped import Wrapped, both
from lightning_rdrop.labels import RowWeights
from lightning_rdrop.terms import Average, Terms


class Weighted(Wrapped):
    r"""Any distance with a weight for each row, in both of its terms.

    .. math::
        \text{ce} = \frac{\sum_n w_n D(y_n, f_n)}{\sum_n w_n}, \qquad
        \text{kl} = \tfrac12\,\frac{\sum_n w_n \tfrac12 [D(f'_n, f_n) + D(f_n, f'_n)]}{\sum_n w_n}

    A row of weight 2 is a row that is there twice, and one of weight 0 is not there. So the scale of the loss does not
    depend on that of the weights, which is also that of a batch of light rows: what matters is their ratio within a
    batch, and with :class:`~lightning_rdrop.callbacks.ExactAccumulation` within all those of an optimizer step.
    Weights may be learned: a gradient flows to them, for which the logits of a ``head`` are held as a whole.

    Args:
        distance: what is weighted. Class weights of its own are multiplied with these, in ce, as it has them.

    Shapes:
        prediction as for ``distance``; target a pair (target, weight): what ``distance`` takes, and (N,), a weight for
        each example, or more of the dimensions of its rows, as (N, T), a weight for each token.

    Raises:
        TypeError: a target that is no such pair, or a distance that keeps no rows, such as
            :class:`~lightning_rdrop.Together`, each part of which can be weighted.
        ValueError: a weight of another shape; on the first batch one that is negative, infinite or NaN.

    Example:
        >>> from torch import tensor
        >>> from lightning_rdrop import Categorical
        >>> logits = tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> Weighted(Categorical()).to_target(logits, (tensor([0, 0]), tensor([3.0, 1.0]))).mean  # (3 ln 2 + ln 4) / 4
        tensor(0.8664)
    """

    number = "weight"
    allowed = "a weight is a finite number >= 0. A row of weight 0 counts in neither term."

    def to_target(self, prediction: Any, target: Any) -> Average:
        target, weight = self.pair(target)
        return self.distance.to_target(prediction, target).weighted(weight)

    def weighted_terms(
        self, predictions: Any, target: Any, alpha: float | Tensor, head: Any, weights: RowWeights
    ) -> Terms:
        target, weight = self.pair(target)
        kl = weights.kl if weights.everywhere else both(weight, weights.kl)
        weights = weights._replace(ce=both(weight, weights.ce), kl=kl)
        return self.distance.weighted_terms(predictions, target, alpha, head, weights)

    def over_rows(self, measure: Callable[[Any], Average], target: Any, numbers: Tensor) -> Average:
        return measure(target).weighted(numbers)

    def wrong(self, numbers: Tensor) -> Tensor:
        return ~((numbers >= 0) & (numbers < math.inf))
