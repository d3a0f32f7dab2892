"""Divergences between predictions, as pure functions of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rdrop import _compat


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half precision to float32; leave anything else unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def log_probabilities(logits: Tensor, dim: int = -1) -> Tensor:
    """Log-softmax in float32 or better, regardless of autocast."""
    return torch.log_softmax(at_least_float32(logits), dim)


def symmetric_kl(first: Tensor, second: Tensor, dim: int = -1) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of two categorical predictions, row by row.

    .. math::
        \tfrac12 \left[ KL(p \| q) + KL(q \| p) \right] = \tfrac12 \sum_c (p_c - q_c)(\log p_c - \log q_c)

    with p and q the softmax of ``first`` and ``second``. Computed from log-probabilities in float32 or better. The
    shorter :math:`(p - q)(z_1 - z_2)` on raw logits is equal mathematically, but loses all precision if the views
    differ by a large constant.

    Args:
        first: logits, shape (..., C, ...).
        second: logits, same shape.
        dim: the dimension of the classes.

    Returns:
        nats per row, the shape of ``first`` without ``dim``; float32, or float64 for float64 logits. Exactly 0 for
        identical rows. A class that is masked with -inf in both views adds nothing; one that is masked in only one
        view makes the divergence infinite.

    Raises:
        ValueError: the shapes differ.

    Source: Liang et al., R-Drop, 2021, equation 2 (arXiv 2106.14448); introduced by Jeffreys in 1946.

    Example:
        >>> from torch import tensor
        >>> first, second = tensor([[0.5, 0.2, 0.3]]).log(), tensor([[0.5, 0.3, 0.2]]).log()
        >>> symmetric_kl(first, second)  # (0.1 * ln 1.5 + 0.1 * ln 1.5) / 2
        tensor([0.0405])
    """
    _check_shapes("symmetric_kl", first, second)
    log_p, log_q = log_probabilities(first, dim), log_probabilities(second, dim)
    # -inf - -inf is NaN: leave out classes that both views mask
    masked = (log_p == -torch.inf) & (log_q == -torch.inf)
    difference = log_p.masked_fill(masked, 0) - log_q.masked_fill(masked, 0)
    rows = ((log_p.exp() - log_q.exp()) * difference).sum(dim) / 2
    return _infinite_not_nan(rows, log_p, log_q, dim)


def kl(first: Tensor, second: Tensor, dim: int = -1) -> Tensor:
    r"""Kullback-Leibler divergence of two categorical predictions in one direction, row by row.

    .. math::
        KL(p \| q) = \sum_c p_c (\log p_c - \log q_c)

    Args:
        first: logits of p, shape (..., C, ...).
        second: logits of q, same shape.
        dim: the dimension of the classes.

    Returns:
        nats per row, as :func:`symmetric_kl`. A class that is masked with -inf in ``first`` adds nothing; one that is
        masked only in ``second`` makes the divergence infinite.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> from torch import tensor
        >>> kl(tensor([[0.5, 0.5]]).log(), tensor([[0.75, 0.25]]).log())  # ln(4 / 3) / 2
        tensor([0.1438])
    """
    _check_shapes("kl", first, second)
    log_p, log_q = log_probabilities(first, dim), log_probabilities(second, dim)
    masked = log_p == -torch.inf
    rows = (log_p.exp() * (log_p.masked_fill(masked, 0) - log_q.masked_fill(masked, 0))).sum(dim)
    return _infinite_not_nan(rows, log_p, log_q, dim)


def dispersion(log_p: Tensor) -> Tensor:
    r"""Divergence of K categorical predictions of the same rows, class by class.

    .. math::
        \operatorname*{mean}_{j<k} \tfrac12 (p_{jc} - p_{kc})(\log p_{jc} - \log p_{kc})
            = \operatorname*{Cov}_k(p_{kc}, \log p_{kc})

    with the sample covariance, divided by K - 1. Summed over the classes, it is the mean of :func:`symmetric_kl` over
    all pairs of predictions.

    Args:
        log_p: log-probabilities, shape (K, N, ..., C), K >= 2.

    Returns:
        nats, shape (N, ..., C); exactly 0 where all predictions are equal. A class that is masked with -inf in all of
        them adds nothing; one that is masked in only some makes the divergence infinite.

    Example:
        >>> from torch import tensor
        >>> dispersion(tensor([[0.5, 0.2, 0.3], [0.5, 0.3, 0.2]]).log())  # 0.1 * ln 1.5 / 2
        tensor([0.0000, 0.0203, 0.0203])
    """
    masked = log_p == -torch.inf
    somewhere, everywhere = masked.any(0), masked.all(0)
    log_p = log_p.masked_fill(somewhere, 0)
    p, log_p = log_p.exp() - log_p[0].exp(), log_p - log_p[0]  # so that equal predictions give exactly 0
    covariance = ((p - p.mean(0)) * (log_p - log_p.mean(0))).sum(0) / (len(p) - 1)
    return covariance.masked_fill(somewhere & ~everywhere, torch.inf)


def symmetric_bernoulli_kl(first: Tensor, second: Tensor) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of two Bernoulli predictions, element by element.

    .. math::
        \tfrac12 \left[ KL(p \| q) + KL(q \| p) \right] = \tfrac12 (p - q)(z_1 - z_2)

    with p and q the sigmoid of the logits :math:`z_1, z_2`. It includes the (1 - p) part of the KL.

    Args:
        first: logits, any shape.
        second: logits, same shape.

    Returns:
        nats per element; float32, or float64 for float64 logits. Exactly 0 for equal logits, including infinite ones;
        infinite if the logits differ and one of them is infinite.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> from torch import tensor
        >>> symmetric_bernoulli_kl(tensor([0.0]), tensor([3.0]).log())  # p = 1/2, q = 3/4: ln 3 / 8
        tensor([0.1373])
    """
    _check_shapes("symmetric_bernoulli_kl", first, second)
    first, second = at_least_float32(first), at_least_float32(second)
    equal = first == second  # also where both are infinite
    first, second = first.masked_fill(equal, 0), second.masked_fill(equal, 0)
    # near 1, differences of 1 - p are more accurate
    near_one = (second.neg().sigmoid() - first.neg().sigmoid(), first.sigmoid() - second.sigmoid())
    gap = first - second
    elements = torch.where(first + second > 0, *near_one) * gap / 2
    return elements.masked_fill(gap.isinf(), torch.inf) if _may_hold_nan(elements) else elements


def jensen_shannon(first: Tensor, second: Tensor, dim: int = -1) -> Tensor:
    r"""Jensen-Shannon divergence of two categorical predictions, row by row.

    .. math::
        \tfrac12 \left[ KL(p \| m) + KL(q \| m) \right], \qquad m = \tfrac12 (p + q)

    Args:
        first: logits, shape (..., C, ...).
        second: logits, same shape.
        dim: the dimension of the classes.

    Returns:
        nats per row, the shape of ``first`` without ``dim``; at most ln 2, even if -inf masks a class in one view.

    Raises:
        ValueError: the shapes differ.

    Source: Lin, Divergence measures based on the Shannon entropy, 1991.

    Example:
        >>> from torch import tensor, inf
        >>> jensen_shannon(tensor([0.0, -inf]), tensor([-inf, 0.0]))  # nothing in common: ln 2
        tensor(0.6931)
    """
    _check_shapes("jensen_shannon", first, second)
    log_p, log_q = log_probabilities(first, dim).clamp(min=-1e30), log_probabilities(second, dim).clamp(min=-1e30)

    def to_middle(log_p: Tensor, log_q: Tensor) -> Tensor:
        gap = log_q - log_p  # KL(p || m) = -sum p log((1 + exp(gap)) / 2), computed so that a gap of 0 gives exactly 0
        log_ratio = torch.where(gap > 15, gap - math.log(2), torch.log1p(torch.expm1(gap.clamp(max=15)) / 2))
        return -(log_p.exp() * log_ratio).sum(dim)

    return (to_middle(log_p, log_q) + to_middle(log_q, log_p)) / 2


def _may_hold_nan(values: Tensor) -> bool:
    return not _compat.is_readable(values) or bool(values.sum().isnan())


def _infinite_not_nan(rows: Tensor, log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """Return inf instead of NaN if one view masks a class whose probability in the other underflows: 0 * inf."""
    if not _may_hold_nan(rows):
        return rows
    is_nan = log_p.select(dim, 0).isnan() | log_q.select(dim, 0).isnan()  # a NaN logit makes its whole row NaN
    return rows.masked_fill(rows.isnan() & ~is_nan, torch.inf)


def _check_shapes(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{name} takes two predictions of the same shape, got first {tuple(first.shape)} and second "
            f"{tuple(second.shape)}; nothing broadcasts here."
        )
