"""Tables of texts with a number each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop.data import cells
from lightning_rdrop.data.table import Row
from lightning_rdrop.data.text import TextDataModule


class TextRegressionDataModule(TextDataModule):
    """Batches for regression on texts, or pairs of texts: ``labels`` are floats.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is the column of the number.

    Shapes:
        ``input_ids`` and ``attention_mask`` (B, T); ``labels`` (B,), float32.
    """

    has_classes = False

    def classes(self, row: Row) -> Sequence[Any]:
        cells.number(row, self.label)
        return ()

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        return torch.tensor([cells.number(row, self.label) for row in rows])
