"""The terms inside a step that is compiled: two small graphs, which keep nothing as large as the logits but these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rdrop._fused.chunk import Factors, Moments, Normalizer, gradient_of, terms_of
from lightning_rdrop._fused.rows import counted
from lightning_rdrop.labels import Labels, RowWeights
from lightning_rdrop.terms import Terms, combined


def traced(logits: Tensor, target: Tensor, alpha: float | Tensor, labels: Labels, weights: RowWeights) -> Terms:
    """The terms of two views, with the gradient made in the backward pass, of the logits and of a few numbers a row.

    Args:
        logits: shape (2, N, C).
        target: shape (N,) of class indices.
        alpha: the weight of kl.
        labels: the other arguments of the cross-entropy.
        weights: how often each row counts.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    known = counted(target, labels, weights, logits.shape[2], dtype)
    rows = known.rows
    ce, kl = _Traced.apply(logits, rows.label, rows.nll, rows.kl_column, rows.smoothing, known.class_weight)
    kl_rows = None if labels.weight is None and not weights.given else known.kl_rows
    return Terms(combined(ce, kl, alpha), ce, kl, rows=known.ce_rows, kl_rows=kl_rows)


class _Traced(torch.autograd.Function):
    """ce and kl of logits (2, N, C)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *factors: Any) -> tuple[Tensor, Tensor]:
        ce, kl, (first, second, *means) = terms_of(logits[0], logits[1], Factors(*factors))
        ctx.save_for_backward(logits, *factors, *first, *second, *means)
        # a class that one view masks is infinitely far, even where the other's underflows: 0 * inf
        return ce, kl.where(~kl.isnan() | ce.isnan(), torch.inf)

    @staticmethod
    def backward(ctx: Any, to_ce: Tensor, to_kl: Tensor) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        factors = Factors(*saved[:5])
        moments = Moments(Normalizer(*saved[5:7]), Normalizer(*saved[7:9]), *saved[9:])
        gradient = torch.stack(gradient_of(logits[0], logits[1], factors, moments, to_ce, to_kl))
        return gradient.to(logits.dtype), None, None, None, None, None
