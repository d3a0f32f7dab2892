"""Detect views that have become equal; recorded in every step, read on demand."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop.guard.agreement import agree
from lightning_rdrop.nesting import tensors_of

_EQUAL = 1e-9
"""A kl, in nats, that is only rounding; dropout causes 1e-7 or more."""
_STEPS = 16
"""This many equal steps in a row are not chance; fewer may be, with one row per batch and a small p."""
KEPT = 1024
"""The number of steps that are kept until they are read."""
_SAMPLE = 1024
"""The number of values compared per row: kl may also be 0 because both views are certain of a class."""


class EqualWatch:
    """Detects views that used to differ and have been equal for some steps.

    Views that never differed are checked on the first batch instead.

    Example:
        >>> watch = EqualWatch()
        >>> for kl in [0.1] + [0.0] * 16:
        ...     watch.note(torch.tensor(kl))
        >>> watch.became_equal()
        True
    """

    def __init__(self) -> None:
        self._noted: deque[Tensor] = deque(maxlen=KEPT)
        self._alive, self._equal = False, 0
        self._sample: list[Tensor] = []

    def look(self, predictions: Any) -> None:
        """Keep the first values of each of the K views (K, N, ...), without waiting for the device."""
        tensors = (tensor.detach() for _, tensor in tensors_of(predictions) if tensor.dim())
        self._sample = [tensor[:, :1].flatten(1)[:, :_SAMPLE].clone() for tensor in tensors]

    def note(self, kl: Tensor) -> None:
        """Keep the kl of a step, without waiting for the device."""
        self._noted.append(kl.detach())

    def became_equal(self) -> bool:
        """Whether the views have become equal; True only once. Waits for the device."""
        for kl in torch.stack(tuple(self._noted)).tolist() if self._noted else []:
            equal = kl <= _EQUAL
            self._alive = self._alive or not equal
            self._equal = self._equal + 1 if equal else 0
        self._noted.clear()
        died = self._alive and self._equal >= _STEPS
        if died:
            self._alive = False
        return died and agree(self._sample)
