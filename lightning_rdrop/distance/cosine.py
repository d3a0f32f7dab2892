"""A direction: one minus the cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import alike, blank, counted_between
from lightning_rdrop.terms import Average


class Cosine(Distance):
    r"""A direction, such as an embedding: one minus the cosine.

    .. math:: D(y, f) = 1 - \cos(y, f) = \tfrac12 \left\| \frac{y}{\|y\|} - \frac{f}{\|f\|} \right\|^2

    A vector of zeros has no direction: it is 1/2 from any other, and gets no gradient.

    Args:
        ignore_value: a target with this value in all its D numbers, such as NaN, is not known, and its row counts in
            neither term.

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
        return self._far(*alike(self, prediction, target), self.counted(prediction, target))

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self._far(*alike(self, first, second), counted_between(self, first, target))

    def counted(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        known = super().counted(prediction, target)
        return None if known is None else known.any(-1)

    def impossible(self, prediction: Tensor, target: Tensor) -> Tensor:
        wrong = ~target.isfinite()
        counted = self.counted(prediction, target)
        return wrong if counted is None else wrong & counted.unsqueeze(-1)

    def check(self, prediction: Tensor, target: Tensor) -> None:
        alike(self, prediction, target)
        if len(wrong := target[self.impossible(prediction, target)]):
            raise ValueError(
                f"The target holds {float(wrong[0])}; Cosine takes vectors of finite numbers. Leave such examples out, "
                "or let vectors that are not known count in neither term: Cosine(ignore_value=float('nan'))."
            )

    def _far(self, first: Tensor, second: Tensor, counted: Tensor | None) -> Average:
        first, second = blank(None if counted is None else counted.unsqueeze(-1), first, second)
        # the difference of directions, unlike the cosine, keeps its digits where they are nearly the same
        return Average.of((_direction(first) - _direction(second)).square().sum(-1) / 2, counted)


def _direction(vector: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return vector / norm.where(norm > 1e-12, torch.inf)
