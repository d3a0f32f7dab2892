"""Detect a kl that has always been negligible compared to ce; recorded in the first steps, read on demand."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 100
"""The number of steps that are recorded: by then an adapter initialized with zero has an effect."""
_NEGLIGIBLE = 1e-4
"""Below this fraction of ce, kl has no effect. Weak dropout reaches 1e-3, a trained network 1e-2 or more."""


class NegligibleWatch:
    """Detects a kl that has been negligible compared to ce since the start of training.

    A kl that was larger before and is now small because of R-Drop is not reported.

    Example:
        >>> from torch import tensor
        >>> watch = NegligibleWatch()
        >>> for _ in range(STEPS):
        ...     watch.note(tensor(8e-6), tensor(4.0))
        >>> f"{watch.share():.0e}", watch.share()  # returned only once
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
        """The largest kl as a fraction of its ce, once, if all recorded steps are negligible; waits for the device."""
        if len(self._noted) < STEPS:
            return None
        kl, ce = (torch.stack(terms).double().cpu() for terms in zip(*self._noted, strict=True))
        self._noted.clear()
        self._decided = True
        if not (kl <= _NEGLIGIBLE * ce.abs()).all():
            return None
        return float((kl / ce.abs()).nan_to_num().max())
