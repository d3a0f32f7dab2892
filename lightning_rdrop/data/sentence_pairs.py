"""Tables of sentence pairs, whose sentences are encoded separately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_rdrop.data.regression import TextRegressionDataModule
from lightning_rdrop.data.table import Row


class SentencePairDataModule(TextRegressionDataModule):
    """Batches for sentence embeddings: training uses each sentence of both columns, without labels.

    Validation and test use scored pairs, ``{"first": ..., "second": ..., "labels": ...}``, whose sentences are encoded
    separately; :class:`TextRegressionDataModule` encodes a pair as one text. Prediction uses the first column.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``text`` and ``pair`` are the columns of the sentences, and
            ``label`` that of the score, which a training table does not need.
    """

    without_labels = ("train", "unlabeled", "predict")

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        first, second = self.columns(rows)
        if second is None:
            return dict(self.encode(first, None))
        sides = {"first": dict(self.encode(first, None)), "second": dict(self.encode(second, None))}
        return {**sides, "labels": self.targets(rows, None)}

    def columns(self, rows: Sequence[Row]) -> tuple[list[Any], list[Any] | None]:
        first = [row[self.text] for row in rows]
        pair: Any = self.pair
        return first, [row[pair] for row in rows] if all(pair in row for row in rows) else None

    def remember(self, rows: Sequence[Row]) -> None:
        for sentences in self.columns(rows):
            self.tokens.remember(sentences or [])

    def table(self, split: str) -> Sequence[Row]:
        rows = super().table(split)
        if split not in self.without_labels:
            return rows
        columns = [self.text] if self.pair is None or split == "predict" else [self.text, self.pair]
        return [{self.text: row[column]} for row in rows for column in columns]
