"""A random order that keeps examples of similar length together, so that batches need little padding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain

import pytorch_lightning as pl
import torch
from torch.utils.data import DistributedSampler

_POOL = 50
"""Number of batches sorted at a time; more would reduce padding, but also randomness."""


class LengthGroups(DistributedSampler[int]):
    """Indices in groups of similar length; the groups and their order are redrawn in each epoch.

    It distributes indices among ranks itself, because a sampler that Lightning wraps around it would mix the groups.

    Args:
        lengths: of the examples.
        batch_size: B, the number of examples in a rank's batch.
        num_replicas: the number of ranks.
        rank: index of this rank.
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
        """The groups for the ranks of the data's Trainer, with the seed of ``seed_everything``."""
        ranks = getattr(data.trainer and data.trainer.strategy, "distributed_sampler_kwargs", {})
        return cls(lengths, batch_size, **ranks, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        groups: list[torch.Tensor] = []
        for pool in torch.split(order, _POOL * self.group):
            groups += torch.split(pool[self.lengths[pool].argsort(descending=True)], self.group)
        last = [groups.pop()] if groups and len(groups[-1]) < self.group else []  # the incomplete group comes last
        drawn = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
        indices: list[int] = list(chain.from_iterable(group.tolist() for group in (*drawn, *last)))
        even = (indices * self.num_replicas)[: self.total_size]  # the same number for each rank, so some come twice
        return iter(even[self.rank :: self.num_replicas])
