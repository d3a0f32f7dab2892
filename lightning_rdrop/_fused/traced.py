"""The terms inside a compiled step: two small graphs, which save nothing as large as the logits except the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rdrop._fused.chunk import (
    Factors,
    Normalizer,
    blanked,
    gradient_of,
    infinite,
    normalized_by,
    normalizer,
    terms_of,
)
from lightning_rdrop._fused.rows import counted
from lightning_rdrop.labels import Labels, RowWeights
from lightning_rdrop.terms import Terms, combined


def traced(logits: Tensor, target: Tensor, alpha: float | Tensor, labels: Labels, weights: RowWeights) -> Terms:
    """The terms of two views; the gradient is computed in the backward pass from the logits and a few numbers per row.

    Args:
        logits: shape (2, N, C).
        target: shape (N,) of class indices.
        alpha: the weight of kl.
        labels: the other arguments of the cross-entropy.
        weights: the weight of each row in each term.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    known = counted(target, labels, weights, logits.shape[2], dtype)
    ce, kl = _Traced.apply(logits, *known.rows.factors(known.class_weight, dtype))  # type: ignore[no-untyped-call]
    return known.terms(combined(ce, kl, alpha), ce, kl)


class _Traced(torch.autograd.Function):
    """ce and kl of logits (2, N, C)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *factors: Any) -> tuple[Tensor, Tensor]:
        known = Factors(*factors)
        first, second = blanked(logits[0], known), blanked(logits[1], known)
        one, other = normalizer(first), normalizer(second)
        views = normalized_by(first, second, one, other)
        ce, kl, first_mean, second_mean = terms_of(first, second, views, one, other, known)
        ctx.save_for_backward(logits, *factors, *one, *other, first_mean, second_mean)
        return ce, infinite(ce, kl)

    @staticmethod
    def backward(ctx: Any, to_ce: Tensor, to_kl: Tensor) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        factors, one, other = Factors(*saved[:6]), Normalizer(*saved[6:8]), Normalizer(*saved[8:10])
        views = normalized_by(blanked(logits[0], factors), blanked(logits[1], factors), one, other)
        gradient = torch.stack(gradient_of(views, saved[10], saved[11], factors, to_ce, to_kl))
        return gradient.to(logits.dtype), *[None] * len(factors)
