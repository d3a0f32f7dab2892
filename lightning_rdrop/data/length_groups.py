"""A random order in which neighbours have about the same length, so that batches are padded little."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain

import pytorch_lightning as pl
import torch
from torch.utils.data import DistributedSampler

_POOL = 50
"""So many batches are sorted at a time: more would pad less, and leave less to chance."""


class LengthGroups(DistributedSampler[int]):
    """Indices in groups of about one length; groups, and what is in them, are drawn anew in each epoch.

    It shares them out among ranks by itself: by a sampler around it, Lightning would mix the groups.

    Args:
        lengths: of the examples.
        batch_size: B, the examples of a rank's batch.
        num_replicas: the number of ranks.
        rank: which of them this is.
        seed: of the order, the same on all ranks.

    Example:
        >>> groups = LengthGroups([5, 1, 5, 1, 5, 1], batch_size=3)
        >>> sorted(sorted(batch) for batch in torch.tensor([*groups]).view(2, 3).tolist())
        [[0, 2, 4], [1, 3, 5]]
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]  # it has a length
        self.lengths = torch.tensor(lengths)
        self.group = batch_size * num_replicas

    @classmethod
    def of(cls, data: pl.LightningDataModule, lengths: Sequence[int], batch_size: int) -> LengthGroups:
        """Those of a training: for the ranks of its Trainer, in an order by the seed of ``seed_everything``."""
        ranks = getattr(data.trainer and data.trainer.strategy, "distributed_sampler_kwargs", {})
        return cls(lengths, batch_size, **ranks, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        groups: list[torch.Tensor] = []
        for pool in torch.split(order, _POOL * self.group):
            groups += torch.split(pool[self.lengths[pool].argsort(descending=True)], self.group)
        last = [groups.pop()] if groups and len(groups[-1]) < self.group else []  # smaller batches end the epoch
        drawn = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
        indices: list[int] = list(chain.from_iterable(group.tolist() for group in (*drawn, *last)))
        even = (indices * self.num_replicas)[: self.total_size]  # as many for each rank: some come twice
        return iter(even[self.rank :: self.num_replicas])
