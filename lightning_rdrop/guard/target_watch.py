"""Detect targets with invalid values; recorded in every step, read on demand."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lightning_rdrop.guard.equal_watch import KEPT


class TargetWatch:
    """Records which batch had a target with a value that the distance does not accept.

    Example:
        >>> watch = TargetWatch()
        >>> for invalid in (False, True, False):
        ...     watch.note(torch.tensor(invalid))
        >>> print(watch.reason())
        The target of batch 1 contains a value that is invalid for the distance: ...
    """

    def __init__(self) -> None:
        self._batches, self._reported = 0, False
        self._noted: deque[tuple[int, Tensor]] = deque(maxlen=KEPT)

    def note(self, invalid: Tensor | None) -> None:
        """Keep whether the target of a batch is invalid, without waiting for the device; None if it cannot be."""
        if invalid is not None and not self._reported:
            self._noted.append((self._batches, invalid))
        self._batches += 1

    def reason(self) -> str | None:
        """The message for the first such batch, only once; ``None`` if there is none. Waits for the device."""
        noted = [*self._noted]
        self._noted.clear()
        flags = torch.stack([invalid for _, invalid in noted]).tolist() if noted else []
        for (batch, _), invalid in zip(noted, flags, strict=True):
            if invalid:
                self._reported = True  # another message for each batch would never end
                return (
                    f"The target of batch {batch} contains a value that is invalid for the distance: a class out of "
                    "range, a label outside [0, 1], a negative weight, more tokens than frames, or NaN. Fix the data, "
                    "or mark what should not count with the distance's ignore_index or ignore_value."
                )
        return None
