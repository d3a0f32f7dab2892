"""A LightningDataModule for tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rdrop.data import cells
from lightning_rdrop.data.classes import check_classes, class_name, distinct, fraction, in_order
from lightning_rdrop.data.length_groups import LengthGroups
from lightning_rdrop.data.read import read_table
from lightning_rdrop.data.table import Row, Table
from lightning_rdrop.data.tokenizer import CachedTokenizer


class TextDataModule(pl.LightningDataModule):
    """Batches for text classification: the tokenized texts, and ``labels`` as class indices.

    With ``label=None`` batches have no labels, as for a language model. For other labels use
    :class:`MultilabelTextDataModule` (several classes per text), :class:`TextRegressionDataModule` (a number),
    :class:`TextToTextDataModule` (another text) or :class:`TokenDataModule` (a class for each word).

    A text is tokenized once, not in every epoch.

    Args:
        tokenizer: name or folder of a Hugging Face tokenizer; it pads each batch to its longest text.
        train, val, test, predict: a table (see :func:`read_table`) for each stage, all optional.
        unlabeled: a second table to train on, whose labels are ignored if it has any. Training batches become
            ``{"labeled": ..., "unlabeled": ...}``, and an epoch is as long as the longer of the two tables.
        text: the column of the text.
        pair: the column of a second text, for sentence pairs.
        label: the column of the label; ``None`` if there is none.
        labels: the class names in index order; ``None`` takes those of a checkpoint, or sorts those of the training
            table.
        batch_size: B, the number of examples in a batch, before R-Drop duplicates them.
        unlabeled_batch_size: B of the unlabeled part; ``None`` is ``batch_size``.
        max_length: in tokens; longer texts are truncated.
        group_by_length: group training texts of similar length, in characters, to reduce padding; the batches are in
            random order. A table of fewer than eight batches is only shuffled.
        num_workers: worker processes of each data loader.

    Raises:
        ValueError: a table lacks a column or has an invalid cell, with the file and the line; a stage has no table;
            the classes are unknown.

    Shapes:
        ``input_ids`` and ``attention_mask`` (B, T); ``labels`` (B,), int64.

    Override :meth:`rows` to read texts from elsewhere, :meth:`encode` to tokenize them differently, and
    :meth:`classes` and :meth:`targets` for other labels.
    """

    without_labels: ClassVar[tuple[str, ...]] = ("unlabeled", "predict")
    """The splits whose labels are dropped."""
    has_classes: ClassVar[bool] = True
    """Whether the labels are classes, whose names the training table provides."""
    fewest_classes: ClassVar[int] = 2
    """Minimum number of different classes in a training table."""

    def __init__(
        self,
        tokenizer: str,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        *,
        unlabeled: str | None = None,
        text: str = "sentence",
        pair: str | None = None,
        label: str | None = "label",
        labels: list[str] | None = None,
        batch_size: int = 32,
        unlabeled_batch_size: int | None = None,
        max_length: int = 128,
        group_by_length: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tables = {"train": train, "val": val, "test": test, "predict": predict, "unlabeled": unlabeled}
        self.text, self.pair = text, pair
        self.label: Any = label
        self.labels = None if labels is None else distinct(labels)
        self.batch_size = batch_size
        self.unlabeled_batch_size = unlabeled_batch_size
        self.max_length = max_length
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self._read: dict[str, Table] = {}
        self._checked: dict[str, Table] = {}

    def rows(self, split: str) -> Sequence[Row] | None:
        """Hook: the rows of ``"train"``, ``"unlabeled"``, ``"val"``, ``"test"`` or ``"predict"``, or None."""
        path = self.tables[split]
        if path is None:
            return None
        if split not in self._read:
            self._read[split] = read_table(path, split)
        return self._read[split]

    def encode(self, texts: list[str], pairs: list[str] | None) -> Mapping[str, Tensor]:
        """Hook: the network's inputs for a batch of texts, padded to the same length."""
        return self.tokens(texts, pairs)

    def classes(self, row: Row) -> Sequence[Any]:
        """Hook: the classes of a row; raises a ValueError for an invalid label."""
        return [cells.cell(row, self.label)]

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        """Hook: the labels of labeled rows, as a tensor."""
        return torch.tensor([self.index(row[self.label]) for row in rows])

    def index(self, label: Any) -> int:
        """The index of a class."""
        assert self.labels is not None
        return self.labels.index(class_name(label))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.table("train")
            self.known_labels()

    def known_labels(self) -> list[str] | None:
        """The class names in index order; if none are known yet, those of the training table.

        None if the labels are not classes.

        Raises:
            ValueError: there is no training table either, or all its labels are the same.
        """
        if self.label is None or not self.has_classes:
            return None
        if self.labels is None:
            if self.rows("train") is None:
                raise ValueError(
                    "The classes are not known. Pass the ckpt_path of a model that was trained on them, or labels."
                )
            rows = self.table("train")
            labels = in_order({class_name(one) for row in rows for one in self.classes(row)})
            if len(labels) < self.fewest_classes:
                only = repr(labels[0]) if labels else "empty"
                raise ValueError(f"All labels of the train table are {only}, so there is nothing to learn.")
            if example := fraction(labels):
                rank_zero_warn(
                    f"The train table has {len(labels)} different labels, numbers with fractions such as {example}; "
                    "each is treated as a class. For regression use TextRegressionDataModule and SequenceRegressor; if "
                    "they are classes, name them with labels=[...]."
                )
            self.labels = labels
        return self.labels

    def train_dataloader(self) -> DataLoader[Row] | dict[str, DataLoader[Row]]:
        labeled = self._loader("train", shuffle=True)
        if self.rows("unlabeled") is None:
            return labeled
        return {"labeled": labeled, "unlabeled": self._loader("unlabeled", shuffle=True)}

    def val_dataloader(self) -> DataLoader[Row] | list[Any]:
        return [] if self.rows("val") is None else self._loader("val")

    def test_dataloader(self) -> DataLoader[Row]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Row]:
        return self._loader("predict")

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """One batch: the encoded texts, and ``labels`` if the rows have them."""
        encoded = self.encode(*self.columns(rows))
        labeled = all(self.label in row for row in rows)
        return {**encoded, "labels": self.targets(rows, encoded)} if labeled else dict(encoded)

    def columns(self, rows: Sequence[Row]) -> tuple[list[Any], list[Any] | None]:
        """The texts of some rows, and their second texts if ``pair`` is set."""
        pairs = None if self.pair is None else [row[self.pair] for row in rows]
        return [row[self.text] for row in rows], pairs

    def table(self, split: str) -> Sequence[Row]:
        """The rows of a split, checked once.

        Raises:
            ValueError: there are none; a cell is missing, blank or of the wrong type; a class is unknown.
        """
        if split not in self._checked:
            rows = self.rows(split)
            if not rows:
                formats = ".csv, .tsv, .json, .jsonl or .parquet file"
                raise ValueError(f"There is no {split} table. Pass {split}=..., a {formats}.")
            table = rows if isinstance(rows, Table) else Table(rows, f"{split} table")
            labeled = self.label is not None and split not in self.without_labels
            if self.label is not None and not labeled:  # its labels may be blank
                kept = ({column: cell for column, cell in row.items() if column != self.label} for row in table)
                table = Table(kept, table.source, table.lines)
            try:
                table.check(self.check)
                if labeled:
                    known = self.labels if split == "train" else self.known_labels()
                    check_classes(table, self.classes, known)
            except ValueError:
                self._require_columns(table, ("text", "pair", "label") if labeled else ("text", "pair"))
                raise
            self._checked[split] = table
        return self._checked[split]

    def check_test(self) -> None:
        """Raise now what a test would raise for its table, unless a subclass gets its rows elsewhere."""
        if not any(is_overridden(hook, self, TextDataModule) for hook in ("prepare_data", "rows", "test_dataloader")):
            self.table("test")

    def check(self, row: Row) -> None:
        """Hook: raise a ValueError for a row with an invalid text."""
        for column in (self.text, self.pair):
            if column is not None:
                cells.text(row, column)

    def align(self, rows: Sequence[Row], predicted: Sequence[Row]) -> Sequence[Row]:
        """Hook: align the predicted cells with the rows that they are written next to."""
        return predicted

    @cached_property
    def tokens(self) -> CachedTokenizer:
        """The tokenizer."""
        return CachedTokenizer(self.tokenizer, self.max_length)

    def _require_columns(self, table: Table, arguments: Sequence[str]) -> None:
        """Raise a ValueError for a column that no row has, with the argument that names it."""
        for argument in arguments:
            column = getattr(self, argument)
            if column is not None and not any(column in row for row in table):
                said = cells.no_column(table[0], column)
                raise ValueError(f"{table.source}: {said} Name the column with {argument}=...") from None

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Row]:
        rows = self.table(split)
        if self.num_workers and not is_overridden("encode", self, TextDataModule):
            self.remember(rows)  # otherwise each worker would tokenize, in every epoch
        size = self.unlabeled_batch_size or self.batch_size if split == "unlabeled" else self.batch_size
        groups = None
        if shuffle and self.group_by_length:
            texts, pairs = self.columns(rows)
            lengths = [len(text) + len(pair) for text, pair in zip(texts, pairs or [""] * len(texts), strict=True)]
            groups = LengthGroups.of(self, lengths, size)
        return DataLoader(
            rows,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=size,
            shuffle=shuffle and groups is None,
            sampler=groups,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def remember(self, rows: Sequence[Row]) -> None:
        """Tokenize in advance everything that collating these rows needs."""
        self.tokens.remember(*self.columns(rows))
