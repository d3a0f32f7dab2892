"""The arithmetic of a chunk as pure functions without a loop and without a look at values, to be compiled or traced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """How n rows count, all in tensors. A row whose factors are all 0 is not looked at."""

    label: Tensor  # (n, 1)
    nll: Tensor  # (n, 1): the factor of log p(y) of each view in ce, not positive
    kl: Tensor  # (n, 1): that of J in kl
    smoothing: Tensor | None = None  # (n, 1): that of w_c log p_c for every c in ce, likewise
    class_weight: Tensor | None = None  # (C,)


class Normalizer(NamedTuple):
    """What makes log-probabilities of the logits of n rows: their largest, and the logarithm of the rest."""

    peak: Tensor  # (n, 1)
    log_sum: Tensor  # (n, 1)


class Moments(NamedTuple):
    """What the gradient of n rows takes besides their logits."""

    first: Normalizer
    second: Normalizer
    first_mean: Tensor  # (n, 1): E_p[log p - log q]
    second_mean: Tensor  # (n, 1): E_q[log p - log q]


def terms_of(first: Tensor, second: Tensor, factors: Factors) -> tuple[Tensor, Tensor, Moments]:
    """What some rows add to ce and kl, and their moments.

    Args:
        first: shape (n, C), the logits of the first view.
        second: same shape, of the second.
        factors: how the rows count.
    """
    normalizers = _normalizer(_counted(first, factors)), _normalizer(_counted(second, factors))
    log_p, log_q = (_log_probs(z, n, factors) for z, n in zip((first, second), normalizers, strict=True))
    p, q, log_ratio = log_p.exp(), log_q.exp(), _log_ratio(log_p, log_q)
    first_mean = (p * log_ratio).sum(-1, keepdim=True)
    divergence = ((p - q) * log_ratio).sum(-1, keepdim=True)
    kl = torch.where(factors.kl != 0, factors.kl * divergence, 0).sum()
    label = factors.label
    ce = torch.where(factors.nll != 0, factors.nll * (log_p.gather(-1, label) + log_q.gather(-1, label)), 0).sum()
    if factors.smoothing is not None:
        both = log_p + log_q if factors.class_weight is None else (log_p + log_q) * factors.class_weight
        ce = ce + torch.where(factors.smoothing != 0, factors.smoothing * both.sum(-1, keepdim=True), 0).sum()
    return ce, kl, Moments(*normalizers, first_mean, first_mean - divergence)


def gradient_of(
    first: Tensor, second: Tensor, factors: Factors, moments: Moments, ce_weight: Tensor, kl_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients (n, C) of ``ce_weight * ce + kl_weight * kl``, in the dtype of the factors.

    Args:
        first, second, factors: as for :func:`terms_of`.
        moments: what that returned.
        ce_weight: shape ().
        kl_weight: shape ().
    """
    log_p, log_q = _log_probs(first, moments.first, factors), _log_probs(second, moments.second, factors)
    p, q, log_ratio = log_p.exp(), log_q.exp(), _log_ratio(log_p, log_q)
    classes = torch.arange(first.shape[-1], device=first.device, dtype=torch.int32)
    to_log_probs = torch.where(classes == factors.label.to(torch.int32), factors.nll * ce_weight, 0)
    total = factors.nll * ce_weight
    if factors.smoothing is not None:
        smoothing, weight = factors.smoothing * ce_weight, factors.class_weight
        to_log_probs = to_log_probs + (smoothing if weight is None else smoothing * weight)
        total = total + smoothing * (first.shape[-1] if weight is None else weight.sum())
    pull = factors.kl * kl_weight
    to_first = torch.where(pull != 0, pull * (1 + log_ratio - moments.first_mean), 0)  # also where views are inf apart
    to_second = torch.where(pull != 0, pull * (1 - log_ratio + moments.second_mean), 0)
    return p * (to_first - total) - pull * q + to_log_probs, q * (to_second - total) - pull * p + to_log_probs


def _counted(logits: Tensor, factors: Factors) -> Tensor:
    """In the dtype of the factors, with 0 where a row does not count, whatever stands there."""
    counts = (factors.nll != 0) | (factors.kl != 0)
    if factors.smoothing is not None:
        counts = counts | (factors.smoothing != 0)
    return torch.where(counts, logits.to(factors.nll.dtype), 0)


def _normalizer(logits: Tensor) -> Normalizer:
    peak = logits.amax(-1, keepdim=True)
    return Normalizer(peak, (logits - peak).exp().sum(-1, keepdim=True).log())


def _log_probs(logits: Tensor, normalizer: Normalizer, factors: Factors) -> Tensor:
    return _counted(logits, factors) - normalizer.peak - normalizer.log_sum


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """0 for a class that neither view allows, which has no part in the sum."""
    log_ratio = log_p - log_q
    return torch.where(log_ratio != log_ratio, 0, log_ratio)  # -inf - -inf
