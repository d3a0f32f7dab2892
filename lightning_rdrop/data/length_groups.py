"""A random order in which neighbours have about the same length, so that batches are padded little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 50
"""So many batches are sorted at a time: more would pad less, and leave less to chance."""


class LengthGroups(Sampler[int]):
    """Indices in groups of about one length; groups, and what is in them, are drawn anew in each epoch.

    Args:
        lengths: of the examples.
        group: the examples of a group: of a batch, times the processes that take turns.
        seed: of the order, the same on all ranks.

    Example:
        >>> groups = LengthGroups([5, 1, 5, 1, 5, 1], group=3, seed=0)
        >>> sorted(sorted(batch) for batch in torch.tensor([*groups]).view(2, 3).tolist())
        [[0, 2, 4], [1, 3, 5]]
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.group = group
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins, except to a sampler that it wraps."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self), generator=generator)
        groups: list[torch.Tensor] = []
        for pool in torch.split(order, _POOL * self.group):
            groups += torch.split(pool[self.lengths[pool].argsort(descending=True)], self.group)
        last = [groups.pop()] if groups and len(groups[-1]) < self.group else []  # a smaller batch ends the epoch
        drawn = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
        return iter(torch.cat([*drawn, *last, order[:0]]).tolist())
