"""Targets that hold impossible values: noted in every step, read where it is asked for."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lightning_rdrop.guard.equal_watch import KEPT


class TargetWatch:
    """Which batch's target held a value that its distance cannot take.

    Example:
        >>> watch = TargetWatch()
        >>> for invalid in (False, True, False):
        ...     watch.note(torch.tensor(invalid))
        >>> print(watch.reason())
        The target of batch 1 holds a value that is impossible for the distance: ...
    """

    def __init__(self) -> None:
        self._batches = 0
        self._noted: deque[tuple[int, Tensor]] = deque(maxlen=KEPT)

    def note(self, invalid: Tensor | None) -> None:
        """Keep what was found in a batch, without waiting for the device; None is nothing to be found."""
        if invalid is not None:
            self._noted.append((self._batches, invalid))
        self._batches += 1

    def reason(self) -> str | None:
        """What to say of the first such batch since the last look; ``None`` if there is none. Waits for the device."""
        noted = [*self._noted]
        self._noted.clear()
        flags = torch.stack([invalid for _, invalid in noted]).tolist() if noted else []
        for (batch, _), invalid in zip(noted, flags, strict=True):
            if invalid:
                return (
                    f"The target of batch {batch} holds a value that is impossible for the distance: a class out of "
                    "range, a label outside [0, 1], a negative weight, more tokens than frames, or NaN. Mend the data, "
                    "or mark what does not count by the distance's ignore_index or ignore_value."
                )
        return None
