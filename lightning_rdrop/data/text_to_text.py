"""Tables of texts with a target text each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_rdrop.data import cells
from lightning_rdrop.data.table import Row
from lightning_rdrop.data.text import TextDataModule


class TextToTextDataModule(TextDataModule):
    """Batches for sequence-to-sequence models: ``labels`` are the tokens of the target text, padded with -100.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is the column of the target text.

    Shapes:
        ``input_ids`` and ``attention_mask`` (B, T); ``labels`` (B, T'), padded with -100.
    """

    has_classes = False

    def classes(self, row: Row) -> Sequence[Any]:
        cells.text(row, self.label)
        return ()

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        return self.tokens.targets([row[self.label] for row in rows])

    def remember(self, rows: Sequence[Row]) -> None:
        super().remember(rows)
        self.tokens.remember([row[self.label] for row in rows if self.label in row], target=True)
