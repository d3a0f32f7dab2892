"""The arithmetic of a chunk as pure functions without a loop and without a look at values, to be compiled or traced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """How n rows count, all in tensors."""

    ignored: Tensor | None  # (n, 1), the rows that count in neither term; None where all count
    label: Tensor  # (n, 1)
    nll: Tensor  # (n, 1): the factor of log p(y) of each view in ce, not positive
    kl: Tensor  # (n, 1): that of J in kl
    smoothing: Tensor | None  # (n, 1): that of w_c log p_c for every c in ce, likewise
    class_weight: Tensor | None  # (C,)


class Normalizer(NamedTuple):
    """What makes probabilities of the logits of a view: the largest, and the sum of exp(logits - largest)."""

    peak: Tensor  # (n, 1)
    total: Tensor  # (n, 1)


class Pair(NamedTuple):
    """The probabilities of two views of n rows, (n, C) each."""

    p: Tensor
    q: Tensor
    log_ratio: Tensor  # log p - log q


def blanked(logits: Tensor, factors: Factors) -> Tensor:
    """Logits (n, C) in the dtype of the factors, with 0 where a row does not count, whatever stands there."""
    logits = logits.to(factors.nll.dtype)
    return logits if factors.ignored is None else torch.where(factors.ignored, 0, logits)


def normalized(first: Tensor, second: Tensor) -> tuple[Pair, Normalizer, Normalizer]:
    """Two views of blanked logits (n, C), and their normalizers. Each exponential is made once."""
    peaks = first.amax(-1, keepdim=True), second.amax(-1, keepdim=True)
    powers = (first - peaks[0]).exp(), (second - peaks[1]).exp()
    one, other = (Normalizer(peak, power.sum(-1, keepdim=True)) for peak, power in zip(peaks, powers, strict=True))
    return Pair(powers[0] / one.total, powers[1] / other.total, _log_ratio(first, second, one, other)), one, other


def normalizer(logits: Tensor) -> Normalizer:
    """That of blanked logits (n, C)."""
    peak = logits.amax(-1, keepdim=True)
    return Normalizer(peak, (logits - peak).exp().sum(-1, keepdim=True))


def normalized_by(first: Tensor, second: Tensor, one: Normalizer, other: Normalizer) -> Pair:
    """Two views of blanked logits (n, C), whose normalizers are known.

    An exponential that is used twice would be stored, which in a graph of all rows takes as much memory as the logits:
    so those here are others than those of :func:`normalizer`.
    """
    p, q = ((z - n.peak - n.total.log()).exp() for z, n in ((first, one), (second, other)))
    return Pair(p, q, _log_ratio(first, second, one, other))


def terms_of(
    first: Tensor, second: Tensor, views: Pair, one: Normalizer, other: Normalizer, factors: Factors
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What some rows add to ce and kl, and the means of the log-ratio under p and under q, (n, 1) each.

    Args:
        first, second: blanked logits (n, C).
        views, one, other: what :func:`normalized` makes of them.
        factors: how the rows count.
    """
    p, q, log_ratio = views
    first_mean = (p * log_ratio).sum(-1, keepdim=True)
    divergence = ((p - q) * log_ratio).sum(-1, keepdim=True)
    kl = torch.where(factors.kl != 0, factors.kl * divergence, 0).sum()
    pairs = ((first, one), (second, other))
    own, other_own = (z.gather(-1, factors.label) - n.peak - n.total.log() for z, n in pairs)
    ce = torch.where(factors.nll != 0, factors.nll * (own + other_own), 0).sum()
    if factors.smoothing is not None:
        log_p, log_q = (z - n.peak - n.total.log() for z, n in pairs)
        every = log_p + log_q if factors.class_weight is None else (log_p + log_q) * factors.class_weight
        ce = ce + torch.where(factors.smoothing != 0, factors.smoothing * every.sum(-1, keepdim=True), 0).sum()
    return ce, kl, first_mean, first_mean - divergence


def infinite(ce: Tensor, kl: Tensor) -> Tensor:
    """kl of views of which one masks a class: infinite, even where the other's underflows and 0 * inf made it NaN."""
    return kl.where(~kl.isnan() | ce.isnan(), torch.inf)


def gradient_of(
    views: Pair, first_mean: Tensor, second_mean: Tensor, factors: Factors, ce_weight: Tensor, kl_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients (n, C) of ``ce_weight * ce + kl_weight * kl`` for the logits of both views.

    Args:
        views: the probabilities.
        first_mean, second_mean: the means of :func:`terms_of`.
        factors: how the rows count.
        ce_weight: shape ().
        kl_weight: shape ().
    """
    p, q, log_ratio = views
    total = factors.nll * ce_weight
    classes = torch.arange(p.shape[-1], device=p.device, dtype=torch.int32)
    direct = torch.where(classes == factors.label.to(torch.int32), total, 0)
    if factors.smoothing is not None:
        smoothing, weight = factors.smoothing * ce_weight, factors.class_weight
        direct = direct + (smoothing if weight is None else smoothing * weight)
        total = total + smoothing * (p.shape[-1] if weight is None else weight.sum())
    pull = factors.kl * kl_weight
    # p - q is exact where views are near; where kl is switched off, views that are infinitely far do not pull either
    to_first, to_second = (
        direct - own * total + torch.where(pull != 0, pull * ((own - other) + own * away), 0)
        for own, other, away in ((p, q, log_ratio - first_mean), (q, p, second_mean - log_ratio))
    )
    return to_first, to_second


def _log_ratio(first: Tensor, second: Tensor, one: Normalizer, other: Normalizer) -> Tensor:
    log_ratio = (first - one.peak) - (second - other.peak) - (one.total.log() - other.total.log())
    return torch.where(log_ratio != log_ratio, 0, log_ratio)  # -inf - -inf: a class that neither view allows
