"""A kl that never was more than a rounding beside ce: noted in the first steps, read where it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 100
"""So many steps are looked at: an adapter that starts at zero has begun to act by then."""
_NEGLIGIBLE = 1e-4
"""The share of ce below which a kl does nothing. A weak dropout makes 1e-3, that of a trained network 1e-2 and more."""


class NegligibleWatch:
    """Whether kl has been negligible beside ce since the training began.

    A kl that was larger once, and is small because R-Drop has done its work, is not its business.

    Example:
        >>> from torch import tensor
        >>> watch = NegligibleWatch()
        >>> for _ in range(STEPS):
        ...     watch.note(tensor(8e-6), tensor(4.0))
        >>> f"{watch.share():.0e}", watch.share()  # it is said once
        ('2e-06', None)
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Tensor]] = []
        self._decided = False

    def note(self, kl: Tensor, ce: Tensor) -> None:
        """Keep the terms of a step, without waiting for the device."""
        if not self._decided and len(self._noted) < STEPS:
            self._noted.append((kl.detach(), ce.detach()))

    def share(self) -> float | None:
        """The largest kl as a share of its ce, where all are negligible and enough are known; waits for the device."""
        if len(self._noted) < STEPS:
            return None
        kl, ce = (torch.stack(terms).double().cpu() for terms in zip(*self._noted, strict=True))
        self._noted.clear()
        self._decided = True
        if not (kl <= _NEGLIGIBLE * ce.abs()).all():
            return None
        return float((kl / ce.abs()).nan_to_num().max())
