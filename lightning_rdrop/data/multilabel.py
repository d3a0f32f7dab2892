"""Tables of texts with several labels each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop.data import cells
from lightning_rdrop.data.table import Row
from lightning_rdrop.data.text import TextDataModule


class MultilabelTextDataModule(TextDataModule):
    """Batches for multi-label classification: ``labels`` (B, L) are 1 for the classes of a text and 0 elsewhere.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is a column of lists of classes, which may be empty.
    """

    fewest_classes = 1

    def classes(self, row: Row) -> Sequence[Any]:
        return cells.items(row, self.label, "classes")

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        assert self.labels is not None
        targets = torch.zeros(len(rows), len(self.labels))
        for number, row in enumerate(rows):
            targets[number, [self.index(label) for label in row[self.label]]] = 1
        return targets
