"""A random order that keeps examples of similar length together, so that batches need little padding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain

import pytorch_lightning as pl
import torch
from torch.utils.data import DistributedSampler

_POOL = 50
"""Maximum number of batches sorted at a time; more would reduce padding, but also randomness."""
_FEWEST_POOLS = 4
"""With a single pool, every epoch would have the same groups."""


class LengthGroups(DistributedSampler[int]):
    """Indices in groups of similar length; the groups and their order are redrawn in each pass.

    Examples are shuffled, and then sorted by length within pools of up to 50 batches, at most a quarter of all. Fewer
    than eight batches are therefore only shuffled. The orders of an epoch are reproducible; a loader that restarts
    within an epoch gets a new one each time.

    It distributes indices among ranks itself, because a sampler that Lightning wraps around it would mix the groups.

    Args:
        lengths: of the examples.
        batch_size: B, the number of examples in a rank's batch.
        num_replicas: the number of ranks.
        rank: index of this rank.
        seed: of the order, the same on all ranks.

    Example:
        >>> lengths = torch.arange(100)
        >>> batches = lengths[[*LengthGroups(lengths.tolist(), batch_size=2)]].view(50, 2)
        >>> bool((batches.amax(1) - batches.amin(1)).float().mean() < 10)  # shuffled, it would be 33
        True
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]  # it has a length
        self.lengths = torch.tensor(lengths)
        self.group = batch_size * num_replicas
        self.generator = torch.Generator().manual_seed(seed)

    @classmethod
    def of(cls, data: pl.LightningDataModule, lengths: Sequence[int], batch_size: int) -> LengthGroups:
        """The groups for the ranks of the data's Trainer, with the seed of ``seed_everything``."""
        ranks = getattr(data.trainer and data.trainer.strategy, "distributed_sampler_kwargs", {})
        return cls(lengths, batch_size, **ranks, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))

    def set_epoch(self, epoch: int) -> None:
        """Seed the orders of an epoch."""
        if epoch != self.epoch:  # with workers, Lightning sets the first epoch when its first pass has already begun
            super().set_epoch(epoch)
            self.generator.manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths), generator=self.generator)
        batches = max(1, min(_POOL, len(order) // (_FEWEST_POOLS * self.group)))
        groups: list[torch.Tensor] = []
        for pool in torch.split(order, batches * self.group):
            groups += torch.split(pool[self.lengths[pool].argsort(descending=True)], self.group)
        last = [groups.pop()] if groups and len(groups[-1]) < self.group else []  # the incomplete group comes last
        drawn = [groups[index] for index in torch.randperm(len(groups), generator=self.generator).tolist()]
        indices: list[int] = list(chain.from_iterable(group.tolist() for group in (*drawn, *last)))
        even = (indices * self.num_replicas)[: self.total_size]  # the same number for each rank, so some come twice
        return iter(even[self.rank :: self.num_replicas])
