"""Embeddings: one minus the cosine similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import blank, counted_between, same_shape
from lightning_rdrop.terms import Average


class Cosine(Distance):
    r"""Embeddings, whose direction matters: one minus the cosine similarity.

    .. math:: D(y, f) = 1 - \cos(y, f) = \tfrac12 \left\| \frac{y}{\|y\|} - \frac{f}{\|f\|} \right\|^2

    A zero vector has no direction: its distance to any nonzero vector is 1/2, and it gets no gradient.

    Args:
        ignore_value: target vectors with this value in all D entries, such as NaN, are unknown and ignored in both
            terms.

    Shapes:
        prediction and target (N, ..., D).

    Example:
        >>> from torch import tensor
        >>> Cosine().between(tensor([[1.0, 0.0]]), tensor([[1.0, 1.0]])).mean  # 1 - 1 / sqrt 2
        tensor(0.2929)
    """

    term_names = ("cosine", "consistency")

    def __init__(self, *, ignore_value: float | None = None) -> None:
        super().__init__()
        self.ignore_value = ignore_value

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        return self._average(*same_shape(self, prediction, target), self.counted(prediction, target))

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self._average(*same_shape(self, first, second), counted_between(self, first, target))

    def counted(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        known = super().counted(prediction, target)
        return None if known is None else known.any(-1)

    def invalid_mask(self, prediction: Tensor, target: Tensor) -> Tensor:
        wrong = ~target.isfinite()
        counted = self.counted(prediction, target)
        return wrong if counted is None else wrong & counted.unsqueeze(-1)

    def check(self, prediction: Tensor, target: Tensor) -> None:
        same_shape(self, prediction, target)
        if len(wrong := target[self.invalid_mask(prediction, target)]):
            raise ValueError(
                f"The target contains {float(wrong[0])}; Cosine takes vectors of finite numbers. Remove such examples, "
                "or ignore unknown vectors with Cosine(ignore_value=float('nan'))."
            )

    def _average(self, first: Tensor, second: Tensor, counted: Tensor | None) -> Average:
        first, second = blank(None if counted is None else counted.unsqueeze(-1), first, second)
        # unlike 1 - cosine, the difference of unit vectors is accurate for nearly equal directions
        return Average.of((_direction(first) - _direction(second)).square().sum(-1) / 2, counted)


def _direction(vector: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return vector / norm.where(norm > 1e-12, torch.inf)
