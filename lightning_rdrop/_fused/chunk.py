"""The arithmetic of a chunk as pure functions without loops or data-dependent branches, to be compiled or traced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Factors of n rows in the two terms, all as tensors."""

    ignored: Tensor | None  # (n, 1), the rows ignored in both terms; None if there are none
    label: Tensor  # (n, 1)
    nll: Tensor  # (n, 1): the factor of log p(y) of each view in ce, <= 0
    kl: Tensor  # (n, 1): the factor of J in kl
    smoothing: Tensor | None  # (n, 1): the factor of w_c log p_c for every c in ce, <= 0
    class_weight: Tensor | None  # (C,)


class Normalizer(NamedTuple):
    """Softmax normalizer of the logits of a view: the largest, and the sum of exp(logits - largest)."""

    peak: Tensor  # (n, 1)
    total: Tensor  # (n, 1)


class Pair(NamedTuple):
    """The probabilities of two views of n rows, (n, C) each."""

    p: Tensor
    q: Tensor
    log_ratio: Tensor  # log p - log q


def blanked(logits: Tensor, factors: Factors) -> Tensor:
    """Logits (n, C) in the dtype of the factors, set to 0 in ignored rows, even if inf or NaN."""
    logits = logits.to(factors.nll.dtype)
    return logits if factors.ignored is None else torch.where(factors.ignored, 0, logits)


def normalized(first: Tensor, second: Tensor) -> tuple[Pair, Normalizer, Normalizer]:
    """The probabilities of two views of blanked logits (n, C), and their normalizers, with one exp per logit."""
    peaks = first.amax(-1, keepdim=True), second.amax(-1, keepdim=True)
    powers = (first - peaks[0]).exp(), (second - peaks[1]).exp()
    one, other = (Normalizer(peak, power.sum(-1, keepdim=True)) for peak, power in zip(peaks, powers, strict=True))
    return Pair(powers[0] / one.total, powers[1] / other.total, _log_ratio(first, second, one, other)), one, other


def normalizer(logits: Tensor) -> Normalizer:
    """The normalizer of blanked logits (n, C)."""
    peak = logits.amax(-1, keepdim=True)
    return Normalizer(peak, (logits - peak).exp().sum(-1, keepdim=True))


def normalized_by(first: Tensor, second: Tensor, one: Normalizer, other: Normalizer) -> Pair:
    """The probabilities of two views of blanked logits (n, C) with known normalizers.

    A compiler would store exponentials that are used twice, as much memory as the logits in a graph of all rows. So
    these are computed differently from those of :func:`normalizer`.
    """
    p, q = ((z - n.peak - n.total.log()).exp() for z, n in ((first, one), (second, other)))
    return Pair(p, q, _log_ratio(first, second, one, other))


def terms_of(
    first: Tensor, second: Tensor, views: Pair, one: Normalizer, other: Normalizer, factors: Factors
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What n rows add to ce and kl, and the means of the log-ratio under p and under q, (n, 1) each.

    Args:
        first, second: blanked logits (n, C).
        views, one, other: what :func:`normalized` returns for them.
        factors: of the rows.
    """
    p, q, log_ratio = views
    first_mean = (p * log_ratio).sum(-1, keepdim=True)
    divergence = ((p - q) * log_ratio).sum(-1, keepdim=True)
    kl = torch.where(factors.kl != 0, factors.kl * divergence, 0).sum()
    pairs = ((first, one), (second, other))
    log_p_label, log_q_label = (z.gather(-1, factors.label) - n.peak - n.total.log() for z, n in pairs)
    ce = torch.where(factors.nll != 0, factors.nll * (log_p_label + log_q_label), 0).sum()
    if factors.smoothing is not None:
        log_p, log_q = (z - n.peak - n.total.log() for z, n in pairs)
        weighted = log_p + log_q if factors.class_weight is None else (log_p + log_q) * factors.class_weight
        ce = ce + torch.where(factors.smoothing != 0, factors.smoothing * weighted.sum(-1, keepdim=True), 0).sum()
    return ce, kl, first_mean, first_mean - divergence


def infinite(ce: Tensor, kl: Tensor) -> Tensor:
    """Return inf for a kl that is NaN by 0 * inf: one view masks a class whose probability underflows in the other."""
    return kl.where(~kl.isnan() | ce.isnan(), torch.inf)


def gradient_of(
    views: Pair, first_mean: Tensor, second_mean: Tensor, factors: Factors, ce_weight: Tensor, kl_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients (n, C) of ``ce_weight * ce + kl_weight * kl`` with respect to the logits of both views.

    Args:
        views: the probabilities.
        first_mean, second_mean: the means from :func:`terms_of`.
        factors: of the rows.
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
    factor = factors.kl * kl_weight
    # p - q is exact for nearly equal views; a factor of 0 also removes an infinite log-ratio
    to_first, to_second = (
        direct - prob * total + torch.where(factor != 0, factor * ((prob - other) + prob * centered), 0)
        for prob, other, centered in ((p, q, log_ratio - first_mean), (q, p, second_mean - log_ratio))
    )
    return to_first, to_second


def _log_ratio(first: Tensor, second: Tensor, one: Normalizer, other: Normalizer) -> Tensor:
    log_ratio = (first - one.peak) - (second - other.peak) - (one.total.log() - other.total.log())
    return torch.where(log_ratio != log_ratio, 0, log_ratio)  # -inf - -inf: a class that both views mask
