"""The arithmetic of a chunk for eager mode, in place in the memory of few tensors.

Without a compiler that fuses them, the equivalent pure functions of :mod:`lightning_rdrop._fused.chunk` take 1.5 to 3
times as long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rdrop._fused.rows import Rows
from lightning_rdrop.terms import is_off

_FEW_CLASSES = 512
"""Below, log-softmax followed by exp is fastest; from here on, a softmax and the logarithm of its largest value."""


class Scratch(NamedTuple):
    """Memory shared by chunks of one shape: allocating it for each chunk would fragment it."""

    both: Tensor | None = None  # (2, n, C)
    one: Tensor | None = None  # (n, C)
    other: Tensor | None = None  # (n, C)

    @classmethod
    def like(cls, logits: Tensor) -> Scratch:
        """Memory for logits (2, n, C)."""
        return cls(torch.empty_like(logits), torch.empty_like(logits[0]), torch.empty_like(logits[0]))

    def fits(self, logits: Tensor) -> bool:
        """Whether it is allocated, for logits of this shape."""
        return self.both is not None and self.both.shape == logits.shape


def in_place(
    logits: Tensor,
    rows: Rows,
    class_weight: Tensor | None,
    ce_weight: float | Tensor,
    kl_weight: float | Tensor,
    out: Tensor | None,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """What n rows add to ce and kl; the gradient of ``ce_weight * ce + kl_weight * kl`` is written to ``out``.

    Args:
        logits: shape (2, n, C), in the dtype of the factors.
        rows: their factors.
        class_weight: shape (C,), or None.
        ce_weight, kl_weight: a number or a tensor ().
        out: same shape and dtype as the logits, may be the logits themselves; None if no gradient is needed.
        scratch: for the shape of the logits, or empty.
    """
    if logits.shape[2] < _FEW_CLASSES:
        log_probs = _blank(torch.log_softmax(logits, -1, out=scratch.both), rows.ignored)
        probs = torch.exp(log_probs, out=out)
    else:
        log_probs = _blank(torch.sub(logits, logits.amax(-1, keepdim=True), out=scratch.both), rows.ignored)
        probs = torch.empty_like(log_probs) if out is None else out
        for shifted, prob in zip(log_probs, probs, strict=True):
            torch.softmax(shifted, -1, out=prob)
        log_probs += probs.amax(-1, keepdim=True).log_()  # exp(0) / sum(exp)
    log_p, log_q = log_probs.unbind(0)
    p, q = probs.unbind(0)

    label = rows.label.expand(2, -1, -1)
    ce = _sum(log_probs.gather(-1, label), rows.nll, rows)
    if rows.smoothing is not None:
        weighted = log_probs if class_weight is None else log_probs * class_weight
        ce += _sum(weighted.sum(-1, keepdim=True), rows.smoothing, rows)
    # -inf - -inf is NaN: leave out classes that both views mask
    log_ratio = torch.sub(log_p, log_q, out=scratch.one).nan_to_num_(0.0, torch.inf, -torch.inf)
    difference = torch.sub(p, q, out=scratch.other)
    if rows.weighted:
        log_ratio.masked_fill_(torch.as_tensor(rows.kl == 0), 0)  # even if it is infinite
        kl = (torch.linalg.vecdot(difference, log_ratio).unsqueeze(-1) * rows.kl).sum()
    else:
        kl = difference.flatten().dot(log_ratio.flatten()) * rows.kl
    if out is not None:
        # overwrite log p and log q with their gradients, then backpropagate through the softmax
        if is_off(kl_weight):
            log_probs.zero_()
        else:
            torch.addcmul(difference, probs, log_ratio, out=log_probs)
            log_q.neg_()
            log_probs.mul_(rows.kl * kl_weight)
        nll = rows.nll * ce_weight
        if isinstance(nll, Tensor):
            log_probs.scatter_add_(-1, label, nll.expand(label.shape))
        else:
            log_probs.scatter_(-1, label, nll, reduce="add")
        if rows.smoothing is not None:
            smoothing = rows.smoothing * ce_weight
            log_probs += smoothing if class_weight is None else smoothing * class_weight
        torch.addcmul(log_probs, probs, log_probs.sum(-1, keepdim=True), value=-1, out=probs)
    return ce, kl


def _blank(values: Tensor, ignored: Tensor | None) -> Tensor:
    """Set ignored rows to 0 in place, even if inf or NaN."""
    return values if ignored is None else values.masked_fill_(ignored, 0)


def _sum(values: Tensor, factor: Tensor | float, rows: Rows) -> Tensor:
    """The sum of the products, to which rows with factor 0 add nothing, even if inf or NaN."""
    if not isinstance(factor, Tensor):
        return values.sum() * factor
    products = values * factor
    return products.masked_fill_(factor == 0, 0).sum() if rows.weighted else products.sum()
