"""Factors of the rows in the two terms, which include the division by the number of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rdrop import _compat
from lightning_rdrop._fused.chunk import Factors
from lightning_rdrop.labels import Labels, RowWeights, moved
from lightning_rdrop.terms import Terms


class Rows(NamedTuple):
    """Factors of n rows in the two terms."""

    ignored: Tensor | None  # (n, 1), the rows ignored in both terms; None if there are none
    label: Tensor  # (n, 1); 0 for rows without a label
    nll: Tensor | float  # the factor of log p(y) of each view in ce, <= 0; (n, 1), or one for all rows
    smoothing: Tensor | float | None  # the factor of w_c log p_c for every c in ce; None without label smoothing
    kl: Tensor | float  # the factor of J in kl; a scalar for all rows that count, or (n, 1) with row weights

    @property
    def weighted(self) -> bool:
        """Whether rows have weights, so that a row may count in one term only."""
        return isinstance(self.kl, Tensor) and self.kl.dim() > 0

    def factors(self, class_weight: Tensor | None, dtype: torch.dtype) -> Factors:
        """The same factors for the pure functions, each as a contiguous column."""

        def column(part: Tensor | float) -> Tensor:
            if not isinstance(part, Tensor):
                return torch.full(self.label.shape, part, dtype=dtype, device=self.label.device)
            return part.expand(self.label.shape).contiguous()

        kl = column(self.kl)
        return Factors(
            ignored=None if self.ignored is None else self.ignored.contiguous(),
            label=self.label.contiguous(),
            nll=column(self.nll),
            kl=kl if self.ignored is None or self.weighted else kl.masked_fill(self.ignored, 0),
            smoothing=None if self.smoothing is None else column(self.smoothing),
            class_weight=class_weight,
        )

    def of(self, start: int, stop: int) -> Rows:
        """The rows from ``start`` to ``stop``."""
        if stop - start >= len(self.label):
            return self
        parts: list[Any] = [part[start:stop] if isinstance(part, Tensor) and part.dim() else part for part in self]
        return Rows(*parts)


class Counted(NamedTuple):
    """The rows of a target, and the number of rows that each term is a mean over."""

    rows: Rows
    class_weight: Tensor | None  # (C,)
    n_labels: Tensor
    ce_rows: Tensor
    kl_rows: Tensor

    def terms(self, loss: Tensor, ce: Tensor, kl: Tensor) -> Terms:
        """The terms with the number of rows that each is a mean over; ``kl_rows`` only if it may differ."""
        return Terms(loss, ce, kl, rows=self.ce_rows, kl_rows=None if self.kl_rows is self.ce_rows else self.kl_rows)


def counted(target: Tensor, labels: Labels, weights: RowWeights, classes: int, dtype: torch.dtype) -> Counted:
    """The factors of the rows of a target, and the number of rows that count.

    Args:
        target: shape (N,) of class indices.
        labels: the other arguments of the cross-entropy.
        weights: the weight of each row in each term.
        classes: C.
        dtype: of the factors.
    """
    n = target.numel()
    label = target.unsqueeze(-1)
    has_label = label != labels.ignore_index
    n_labels = ce_rows = kl_rows = has_label.sum(dtype=dtype)
    in_ce: Tensor | float = 1.0
    ignored: Tensor | None = None
    if not _compat.is_readable(target) or n_labels.item() < n:
        in_ce, ignored = has_label, ~has_label
        label = label.masked_fill(ignored, 0)
    in_kl: Tensor | float = 1.0
    if weights.given:
        in_ce, in_kl = (
            torch.ones_like(label, dtype=dtype) * mask * (1.0 if weight is None else weight.to(dtype).unsqueeze(-1))
            for mask, weight in ((in_ce, weights.ce), (1.0 if weights.everywhere else in_ce, weights.kl))
        )
        ignored = (in_ce == 0) & (in_kl == 0)
        ce_rows, kl_rows = in_ce.sum(), in_kl.sum()
    smoothed = in_ce
    class_weight = None if labels.weight is None else moved(labels.weight, target.device, dtype)
    if class_weight is not None:
        in_ce = class_weight[label] * in_ce
        ce_rows = in_ce.sum()

    def over(total: Tensor) -> Tensor | float:
        if total is not n_labels:
            return 1 / total.where(total != 0, 1)
        return 1 / max(1, n) if ignored is None else 1 / total.clamp(min=1)

    ce_mean = over(ce_rows)
    kl_mean = ce_mean if kl_rows is ce_rows else over(kl_rows)
    nll = in_ce * ce_mean * ((labels.label_smoothing - 1) / 2)
    smoothing = None
    if labels.label_smoothing:
        smoothing = smoothed * ce_mean * (-labels.label_smoothing / (2 * classes))
    rows = Rows(ignored, label, nll, smoothing, in_kl * kl_mean / 4)
    return Counted(rows, class_weight, n_labels, ce_rows, kl_rows)
