"""The R-Drop loss as a formula for autograd, where the fused one does not apply."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from lightning_rdrop.divergence import symmetric_kl
from lightning_rdrop.labels import UNIT_WEIGHTS, Labels, RowWeights, blank_rows
from lightning_rdrop.terms import Average, Terms


def composite(
    logits: Tensor, target: Tensor, alpha: float | Tensor, labels: Labels, weights: RowWeights = UNIT_WEIGHTS
) -> Terms:
    r"""The R-Drop loss by its formula and autograd, for any number of views, any target and any torch transform.

    .. math::
        \operatorname*{mean}_{k,n} -\log p_{kn}(y_n)
            + \alpha\,\tfrac12 \operatorname*{mean}_{n,\,j<k} \tfrac12 [KL(p_{jn} \| p_{kn}) + KL(p_{kn} \| p_{jn})]

    Args:
        logits: shape (K, N, C), views first.
        target: shape (N,) of class indices, or (N, C) of class probabilities.
        alpha: the weight of kl.
        labels: the other arguments of the cross-entropy.
        weights: the weight of each row in each term.

    Example:
        >>> from torch import tensor
        >>> logits = tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log()  # K = 2, N = 1, C = 3
        >>> composite(logits, tensor([0]), 4.0, Labels()).loss  # ln 2 + 4 ln(1.5) / 20
        tensor(0.7742)
    """
    views, in_ce = len(logits), labels.counted(target)
    in_kl = torch.ones_like(in_ce) if weights.everywhere else in_ce
    in_ce, in_kl = (
        counted if weight is None else counted & (weight != 0)
        for counted, weight in ((in_ce, weights.ce), (in_kl, weights.kl))
    )
    flat, target = blank_rows(logits, in_ce, -1).flatten(0, 1), target.repeat(views, *[1] * (target.dim() - 1))
    ce = labels.average(flat, target, in_ce.repeat(views))
    ce = ce if weights.ce is None else ce.weighted(weights.ce.repeat(views))
    zero = torch.zeros_like(ce.total)
    between = Average(zero, zero)
    logits = blank_rows(logits, in_kl, -1)
    for j, k in combinations(range(views), 2):
        pair = Average.of(symmetric_kl(logits[j], logits[k]), in_kl)
        between += pair if weights.kl is None else pair.weighted(weights.kl)
    kl_rows = None
    if labels.weight is not None or weights.given:
        kl_rows = (in_kl if weights.kl is None else weights.kl.detach().where(in_kl, 0)).sum().to(zero)
    return Terms.of(ce, between, alpha, rows=ce.weight.detach() / views, kl_rows=kl_rows)
