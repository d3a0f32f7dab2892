"""A direction: one minus the cosine."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import alike
from lightning_rdrop.terms import Average


class Cosine(Distance):
    r"""A direction, such as an embedding: one minus the cosine.

    .. math:: D(y, f) = 1 - \cos(y, f) = \tfrac12 \left\| \frac{y}{\|y\|} - \frac{f}{\|f\|} \right\|^2

    Shapes:
        prediction and target (N, ..., D).

    Example:
        >>> from torch import tensor
        >>> Cosine().between(tensor([[1.0, 0.0]]), tensor([[1.0, 1.0]])).mean  # 1 - 1 / sqrt 2
        tensor(0.2929)
    """

    term_names = ("cosine", "consistency")

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        prediction, target = alike(self, prediction, target)
        # the difference of directions, unlike the cosine, keeps its digits where they are nearly the same
        gap = F.normalize(prediction, dim=-1) - F.normalize(target, dim=-1)
        return Average.of(gap.square().sum(-1) / 2)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self.to_target(first, second)
