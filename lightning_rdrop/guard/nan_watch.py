"""Detect predictions that are NaN; recorded in every batch, read on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop.nesting import tensors_of


class NanWatch:
    """Records on the device since which batch a view is NaN.

    It is reset when the view is no longer NaN: the learning rate finder continues until the loss diverges and then
    restores the weights, and GradScaler skips steps in which float16 overflows.

    Args:
        part: the part of the batch, for the message; empty for the labeled part.

    Example:
        >>> watch = NanWatch()
        >>> watch.look(torch.zeros(2, 3))
        >>> watch.look(torch.tensor([[0.0], [torch.nan]]))
        >>> print(watch.reason())
        The prediction of view 1 is NaN since batch 1. ...
    """

    def __init__(self, part: str = "") -> None:
        self.part = part
        self.batches = 0
        self._since: Tensor | None = None

    def look(self, predictions: Any, counted: Any = None) -> None:
        """Record which of the K views are NaN in rows that count, without waiting for the device.

        Args:
            predictions: shape (K, N, ...).
            counted: mask of the rows that count, (N, ...), broadcast over further dimensions; a mapping by name for
                several predictions; None if all do.
        """
        sums = [
            _sums(tensor, counted.get(path[0]) if isinstance(counted, Mapping) else counted)
            for path, tensor in tensors_of(predictions)
            if tensor.dim()
        ]
        nan = sums[0].isnan() if len(sums) == 1 else torch.stack(sums).isnan().any(0)
        if self._since is None or len(self._since) != len(nan):  # the number of views may change between steps
            self._since = torch.full_like(nan, -1, dtype=torch.long)
        since = self._since.to(nan.device)
        self._since = torch.where(nan, torch.where(since < 0, self.batches, since), -1)
        self.batches += 1

    def reason(self) -> str | None:
        """The message for a view that is NaN; ``None`` if none is. Waits for the device."""
        for view, batch in enumerate([] if self._since is None else self._since.tolist()):
            if batch >= 0:
                return (
                    f"The prediction of view {view}{self.part} is NaN since batch {batch}. Usual causes are a high "
                    "learning rate, an attention mask with a row of zeros, or an overflow in half precision."
                )
        return None


def _sums(views: Tensor, counted: Tensor | None) -> Tensor:
    """One number per view, NaN if any value is. Infinite logits are allowed, since they mask classes."""
    views, wide = views.detach(), torch.promote_types(views.dtype, torch.float32)
    if counted is not None and counted.dim() < views.dim():
        counted = counted[(..., *[None] * (views.dim() - 1 - counted.dim()))]
        sizes = list(zip(counted.shape, views.shape[1:], strict=True))
        if all(size in (1, own) for size, own in sizes):  # otherwise the distance raises an error
            within = [dim for dim, (size, own) in enumerate(sizes, start=1) if size < own]
            rows = views.sum(within, keepdim=True, dtype=wide) if within else views  # before a copy of the logits
            views = rows.where(counted, 0)
    return views.flatten(1).sum(1, dtype=wide)
