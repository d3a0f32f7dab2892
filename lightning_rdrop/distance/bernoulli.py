"""Several labels, each there or not: binary cross-entropy and the KL of its answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import alike
from lightning_rdrop.divergence import at_least_float32, kl, symmetric_bernoulli_kl
from lightning_rdrop.terms import Average


class Bernoulli(Distance):
    r"""Several labels, each there or not: binary cross-entropy, and the full symmetric KL, (1 - p) part included.

    .. math::
        D(y, f) = -y \log p - (1 - y) \log (1 - p), \qquad
        D(f', f) = p' \log \frac{p'}{p} + (1 - p') \log \frac{1 - p'}{1 - p}

    Both are means over rows and labels, with p the sigmoid of the logits.

    Args:
        pos_weight: shape (L,), the weight of the positive answers to each label, in the cross-entropy only. Kept out
            of checkpoints.

    Shapes:
        prediction (N, ..., L) logits; target (N, ..., L), 0 or 1 or a probability.

    Example:
        >>> from torch import tensor
        >>> distance = Bernoulli()
        >>> distance.to_target(tensor([[0.0, 3.0]]), tensor([[1, 1]])).mean  # (ln 2 + ln(1 + exp(-3))) / 2
        tensor(0.3709)
        >>> distance.between(tensor([[0.0]]), tensor([[3.0]]).log()).mean  # p = 1/2 and 3/4: ln 3 / 8
        tensor(0.1373)
    """

    term_names = ("bce", "kl")
    pos_weight: Tensor | None

    def __init__(self, *, pos_weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        prediction, target = alike(self, prediction, target)
        weight = None if self.pos_weight is None else self.pos_weight.to(prediction)
        elements = F.binary_cross_entropy_with_logits(prediction, target, pos_weight=weight, reduction="none")
        return Average.of(elements)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return Average.of(symmetric_bernoulli_kl(first, second))

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        p, q = (torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1) for z in map(at_least_float32, (first, second)))
        return Average.of(kl(p, q))

    def check(self, prediction: Tensor, target: Tensor) -> None:
        if len(wrong := target[~((target >= 0) & (target <= 1))]):
            raise ValueError(f"The target holds {float(wrong[0])}; a label of Bernoulli is 0, 1 or a probability.")
