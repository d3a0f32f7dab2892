"""What a cross-entropy is told besides logits and target, and the R-Drop loss written out for autograd."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop.divergence import at_least_float32, symmetric_kl
from lightning_rdrop.terms import Average, Terms


@dataclass(frozen=True)
class Labels:
    """The arguments of ``F.cross_entropy`` besides logits and target.

    Args:
        ignore_index: a row with this target does not count.
        label_smoothing: in [0, 1).
        weight: shape (C,), one weight a class.

    Raises:
        ValueError: a label smoothing out of its range.

    Example:
        >>> Labels().average(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([0, -100]))  # ln 2, of one row
        Average(total=tensor(0.6931), weight=tensor(1.))
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")

    def check(self, classes: int) -> None:
        """Refuse class weights that do not belong to this number of classes.

        Raises:
            ValueError: they are more or fewer.
        """
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"The class weight must have the shape ({classes},), got {tuple(self.weight.shape)}.")

    def average(self, logits: Tensor, target: Tensor) -> Average:
        """The cross-entropy of logits (N, C, ...) to class indices (N, ...) or class probabilities (N, C, ...)."""
        logits = at_least_float32(logits)
        weight = None if self.weight is None else self.weight.to(logits)
        total = F.cross_entropy(
            logits,
            target.to(logits) if target.is_floating_point() else target,
            weight=weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        if target.is_floating_point():  # F.cross_entropy divides a sum over probabilities by the plain number of rows
            return Average(total, total.new_tensor(logits.numel() // logits.shape[1]))
        counted = target != self.ignore_index
        if weight is None:
            return Average(total, counted.sum().to(total))
        return Average(total, weight[target.where(counted, 0)].where(counted, 0).sum())


def composite(logits: Tensor, target: Tensor, alpha: float | Tensor, labels: Labels) -> Terms:
    r"""The R-Drop loss as its formula says it, for any number of views, any target and any transform of torch.

    .. math::
        \operatorname*{mean}_{k,n} -\log p_{kn}(y_n)
            + \alpha\,\tfrac12 \operatorname*{mean}_{n,\,j<k} \tfrac12 [KL(p_{jn} \| p_{kn}) + KL(p_{kn} \| p_{jn})]

    Args:
        logits: shape (K, N, C), views first.
        target: shape (N,) of class indices, or (N, C) of class probabilities.
        alpha: the weight of kl.
        labels: what else the cross-entropy is told.

    Example:
        >>> from torch import tensor
        >>> logits = tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log()  # K = 2, N = 1, C = 3
        >>> composite(logits, tensor([0]), 4.0, Labels()).loss  # ln 2 + 4 ln(1.5) / 20
        tensor(0.7742)
    """
    views = len(logits)
    ce = labels.average(logits.flatten(0, 1), target.repeat(views, *[1] * (target.dim() - 1)))
    zero = torch.zeros_like(ce.total)
    between = Average(zero, zero)
    pairs = [symmetric_kl(logits[j], logits[k]) for j, k in combinations(range(views), 2)]
    if pairs:
        rows = torch.stack(pairs)
        counted = target != labels.ignore_index if target.dim() == 1 else rows.new_ones(rows.shape[1], dtype=torch.bool)
        between = Average(rows.where(counted, 0).sum(), counted.sum().to(rows) * len(pairs))
    return Terms.of(ce, between, alpha, rows=ce.weight / views)
