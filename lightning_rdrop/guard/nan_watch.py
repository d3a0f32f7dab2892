"""A prediction that is NaN: noted in every batch, read where it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rdrop.nesting import tensors_of


class NanWatch:
    """Since which batch a view is NaN: written on the device in every batch, read only where it is asked for.

    It is forgotten when a view is a number again: a search for a learning rate goes on until the loss diverges, and
    puts the weights back; a GradScaler leaves out the steps in which float16 overflows.

    Args:
        part: the part of the batch that is watched, for the message; all of it, if there is but one.

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

    def look(self, predictions: Any) -> None:
        """Note which of the K views (K, N, ...) are NaN, without waiting for the device."""
        sums = [_sums(tensor) for _, tensor in tensors_of(predictions) if tensor.dim()]
        nan = sums[0].isnan() if len(sums) == 1 else torch.stack(sums).isnan().any(0)
        since = torch.full_like(nan, -1, dtype=torch.long) if self._since is None else self._since.to(nan.device)
        self._since = torch.where(nan, torch.where(since < 0, self.batches, since), -1)
        self.batches += 1

    def reason(self) -> str | None:
        """What to say of a view that is NaN; ``None`` if none is. Waits for the device."""
        for view, batch in enumerate([] if self._since is None else self._since.tolist()):
            if batch >= 0:
                return (
                    f"The prediction of view {view}{self.part} is NaN since batch {batch}. Too high a learning rate, "
                    "a row of the attention mask without a token, or an overflow in half precision are usual causes."
                )
        return None


def _sums(views: Tensor) -> Tensor:
    """One number a view: an infinite logit masks a class, so that it may be infinite, and NaN is NaN in any sum."""
    rows = views.detach().flatten(1)
    return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
