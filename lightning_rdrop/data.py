"""Tables of text as a LightningDataModule."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

Row = Mapping[str, Any]


def read_table(path: str | Path) -> list[Row]:
    """The rows of a text table: JSON lines (``.json``, ``.jsonl``), or ``.tsv`` and ``.csv`` with a header line.

    Raises:
        ValueError: another suffix, or a line that is no JSON object.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl", ".tsv", ".csv"):
        raise ValueError(f"{path}: tables are JSON lines (.json, .jsonl), .tsv or .csv, got {path.suffix!r}.")
    with path.open(encoding="utf8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        if path.suffix == ".tsv":
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows: list[Row] = []
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object: {line.strip()[:60]!r}.") from error
        return rows


class TextDataModule(pl.LightningDataModule):
    """Batches for text classification: what a tokenizer makes of the texts, and ``labels`` as class indices.

    Args:
        tokenizer: name or folder of a Hugging Face tokenizer; it pads each batch to its longest text.
        train: a table (see :func:`read_table`) to learn from; val, test, predict: likewise, each optional.
        text: the column of the text; ``pair`` that of a second one, for sentence pairs.
        label: the column of the label.
        labels: the classes in the order of their indices; ``None`` sorts those of the training table.
        batch_size: examples in a batch (R-Drop's views are not counted).
        max_length: longer texts are cut, in tokens.
        num_workers: processes that load data.

    Raises:
        ValueError: a column or a label that a table lacks, or a stage without a table.

    A subclass that gets its texts elsewhere overrides :meth:`rows`; one with a tokenization of its own,
    :meth:`encode`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        *,
        text: str = "sentence",
        pair: str | None = None,
        label: str = "label",
        labels: list[str] | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tables = {"train": train, "val": val, "test": test, "predict": predict}
        self.text, self.pair, self.label = text, pair, label
        self.labels = labels
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_workers = num_workers

    def rows(self, split: str) -> Sequence[Row] | None:
        """Hook: the rows of ``"train"``, ``"val"``, ``"test"`` or ``"predict"``; None where there are none."""
        path = self.tables[split]
        return None if path is None else read_table(path)

    def encode(self, texts: list[str], pairs: list[str] | None) -> Mapping[str, Tensor]:
        """Hook: the inputs of the network for some texts, padded to one length."""
        encoded: Mapping[str, Tensor] = self._pretrained_tokenizer(
            texts, pairs, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return encoded

    def setup(self, stage: str) -> None:
        if self.labels is None and stage != "predict":
            self.labels = [str(label) for label in sorted({row[self.label] for row in self._table("train")})]

    def train_dataloader(self) -> DataLoader[Row]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Row] | list[Any]:
        return [] if self.rows("val") is None else self._loader("val")

    def test_dataloader(self) -> DataLoader[Row]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Row]:
        return self._loader("predict")

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """One batch: the encoded texts, and ``labels`` unless the rows are there to be predicted."""
        pairs = None if self.pair is None else [row[self.pair] for row in rows]
        batch = dict(self.encode([row[self.text] for row in rows], pairs))
        if self.labels is not None and all(self.label in row for row in rows):
            batch["labels"] = torch.tensor([self.labels.index(str(row[self.label])) for row in rows])
        return batch

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Row]:
        return DataLoader(
            self._table(split),  # type: ignore[arg-type]  # a list is a map-style dataset
            self.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _table(self, split: str) -> Sequence[Row]:
        rows = self.rows(split)
        if not rows:
            raise ValueError(f"There is no {split} table: give {split}=..., a .json, .jsonl, .tsv or .csv file.")
        needed = [self.text, self.pair, None if split == "predict" else self.label]
        for number, row in enumerate(rows):
            for column in needed:
                if column is not None and column not in row:
                    raise ValueError(f"{split} table, row {number}: no column {column!r}, only {', '.join(row)}.")
            if self.labels is not None and split != "predict" and str(row[self.label]) not in self.labels:
                raise ValueError(
                    f"{split} table, row {number}: label {row[self.label]!r} is none of the {len(self.labels)} labels "
                    f"({', '.join(self.labels[:10])}{', ...' if len(self.labels) > 10 else ''})."
                )
        return rows

    @cached_property
    def _pretrained_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer)
