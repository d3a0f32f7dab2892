"""How far two predictions are apart: pure functions of logits."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32, anything else stays what it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def log_probabilities(logits: Tensor, dim: int = -1) -> Tensor:
    """Log-softmax in float32 or better, whatever autocast does."""
    return torch.log_softmax(at_least_float32(logits), dim)


def symmetric_kl(first: Tensor, second: Tensor, dim: int = -1) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of two categorical predictions, row by row.

    .. math::
        \tfrac12 \left[ KL(p \| q) + KL(q \| p) \right] = \tfrac12 \sum_c (p_c - q_c)(\log p_c - \log q_c)

    with p and q the softmax of ``first`` and ``second``. Computed from log-probabilities in float32 or better. The
    shorter :math:`(p - q)(z_1 - z_2)` on raw logits is the same on paper, but loses every digit as soon as a
    constant separates the two views.

    Args:
        first: logits, shape (..., C, ...).
        second: logits, same shape.
        dim: the dimension of the classes.

    Returns:
        nats per row, the shape of ``first`` without ``dim``; float32, or float64 for float64 logits. Exactly 0 for
        identical rows. A class that is masked with -inf in both views adds nothing; one that is masked in a single
        view makes the divergence infinite, as it is.

    Raises:
        ValueError: the shapes differ.

    Source: Liang et al., R-Drop, 2021, equation 2 (arXiv 2106.14448), which Jeffreys introduced in 1946.

    Example:
        >>> from torch import tensor
        >>> first, second = tensor([[0.5, 0.2, 0.3]]).log(), tensor([[0.5, 0.3, 0.2]]).log()
        >>> symmetric_kl(first, second)  # (0.1 * ln 1.5 + 0.1 * ln 1.5) / 2
        tensor([0.0405])
    """
    if first.shape != second.shape:
        raise ValueError(
            f"symmetric_kl compares two predictions of one shape, got first {tuple(first.shape)} and second "
            f"{tuple(second.shape)}; nothing broadcasts here."
        )
    log_p, log_q = log_probabilities(first, dim), log_probabilities(second, dim)
    # -inf - -inf is NaN: a class that neither view allows has no part in the sum
    masked = (log_p == -torch.inf) & (log_q == -torch.inf)
    difference = log_p.masked_fill(masked, 0) - log_q.masked_fill(masked, 0)
    return ((log_p.exp() - log_q.exp()) * difference).sum(dim) / 2
