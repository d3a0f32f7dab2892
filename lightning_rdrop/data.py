"""LightningDataModules for tables of text."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

Row = Mapping[str, Any]


def read_table(path: str | Path) -> list[Row]:
    """Read a table from JSON lines (``.json``, ``.jsonl``), or from ``.tsv`` or ``.csv`` with a header line.

    Raises:
        ValueError: another suffix, or a line that is not a JSON object.
        FileNotFoundError: there is no such file.
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
    """Batches for text classification: the tokenized texts, and ``labels`` as class indices.

    With ``label=None`` batches have no labels, as for a language model. For other labels there are
    :class:`MultilabelTextDataModule` (several classes a text), :class:`TextRegressionDataModule` (a number),
    :class:`TextToTextDataModule` (another text) and :class:`TokenDataModule` (a class for each word).

    Args:
        tokenizer: name or folder of a Hugging Face tokenizer; it pads each batch to its longest text.
        train, val, test, predict: a table (see :func:`read_table`) for each stage, all optional.
        unlabeled: a second table to train on, whose labels are ignored if it has any. Training batches become
            ``{"labeled": ..., "unlabeled": ...}``, and an epoch is as long as the longer of the two tables.
        text: the column of the text.
        pair: the column of a second text, for sentence pairs.
        label: the column of the label; ``None`` if there is none.
        labels: the classes in the order of their indices; ``None`` sorts those of the training table.
        batch_size: B, the examples of a batch, before R-Drop duplicates them.
        unlabeled_batch_size: B of the unlabelled part; ``None`` is ``batch_size``.
        max_length: longer texts are truncated, in tokens.
        num_workers: worker processes of each data loader.

    Raises:
        ValueError: a column or a label that a table lacks, or a stage without a table.

    Override :meth:`rows` to read texts from elsewhere, :meth:`encode` to tokenize them differently, and
    :meth:`targets` for other labels.
    """

    without_labels: ClassVar[tuple[str, ...]] = ("unlabeled", "predict")
    """The splits whose labels are dropped."""

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
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tables = {"train": train, "val": val, "test": test, "predict": predict, "unlabeled": unlabeled}
        self.text, self.pair = text, pair
        self.label: Any = label
        self.labels = labels
        self.batch_size = batch_size
        self.unlabeled_batch_size = unlabeled_batch_size
        self.max_length = max_length
        self.num_workers = num_workers

    def rows(self, split: str) -> Sequence[Row] | None:
        """Hook: the rows of ``"train"``, ``"unlabeled"``, ``"val"``, ``"test"`` or ``"predict"``, or None."""
        path = self.tables[split]
        return None if path is None else read_table(path)

    def encode(self, texts: list[str], pairs: list[str] | None) -> Mapping[str, Tensor]:
        """Hook: the network's inputs for some texts, padded to one length."""
        encoded: Mapping[str, Tensor] = self._tokenize(texts, pairs)
        return encoded

    def classes(self, row: Row) -> Sequence[Any]:
        """Hook: the classes of a row."""
        return [row[self.label]]

    def targets(self, rows: list[Row], encoded: Any) -> Tensor | None:
        """Hook: the labels of rows that have some; None while the classes are unknown."""
        return None if self.labels is None else torch.tensor([self.index(row[self.label]) for row in rows])

    def index(self, label: Any) -> int:
        """The index of a class."""
        assert self.labels is not None
        return self.labels.index(str(label))

    def setup(self, stage: str) -> None:
        if self.label is not None and self.labels is None and stage != "predict":
            named = {label for row in self.table("train") for label in self.classes(row)}
            self.labels = [str(label) for label in sorted(named)]

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
        """One batch: the encoded texts, and ``labels`` where the rows have them."""
        pairs = None if self.pair is None else [row[self.pair] for row in rows]
        encoded = self.encode([row[self.text] for row in rows], pairs)
        targets = self.targets(rows, encoded) if all(self.label in row for row in rows) else None
        return dict(encoded) if targets is None else {**encoded, "labels": targets}

    def table(self, split: str) -> Sequence[Row]:
        """The rows of a split, checked.

        Raises:
            ValueError: there are none, or a row lacks a column or has an unknown label.
        """
        rows = self.rows(split)
        if not rows:
            raise ValueError(f"There is no {split} table: give {split}=..., a .json, .jsonl, .tsv or .csv file.")
        unlabeled = self.label is not None and split in self.without_labels
        if unlabeled:  # its labels may be blanks, which are no classes
            rows = [{column: value for column, value in row.items() if column != self.label} for row in rows]
        needed = [self.text, self.pair, None if unlabeled else self.label]
        for number, row in enumerate(rows):
            for column in needed:
                if column is not None and column not in row:
                    raise ValueError(f"{split} table, row {number}: no column {column!r}, only {', '.join(row)}.")
            if self.labels is None or unlabeled:
                continue
            for label in self.classes(row):
                if str(label) in self.labels:
                    continue
                raise ValueError(
                    f"{split} table, row {number}: label {label!r} is none of the {len(self.labels)} labels "
                    f"({', '.join(self.labels[:10])}{', ...' if len(self.labels) > 10 else ''})."
                )
        return rows

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Row]:
        return DataLoader(
            self.table(split),  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.unlabeled_batch_size or self.batch_size if split == "unlabeled" else self.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _tokenize(self, *texts: Any, **options: Any) -> Any:
        return self._pretrained_tokenizer(
            *texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt", **options
        )

    @cached_property
    def _pretrained_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        if tokenizer.pad_token is None:  # GPT-2 and Llama have none; the attention mask tells padding from an end
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


class MultilabelTextDataModule(TextDataModule):
    """Batches for multi-label classification: ``labels`` (B, L) are 1 for the classes of a text and 0 elsewhere.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is a column of lists of classes, which may be empty.
    """

    def classes(self, row: Row) -> Sequence[Any]:
        if not isinstance(row[self.label], list):
            raise ValueError(
                f"{self.label!r} must be a list of classes, got {row[self.label]!r}; JSON lines hold lists."
            )
        classes: Sequence[Any] = row[self.label]
        return classes

    def targets(self, rows: list[Row], encoded: Any) -> Tensor | None:
        if self.labels is None:
            return None
        targets = torch.zeros(len(rows), len(self.labels))
        for number, row in enumerate(rows):
            targets[number, [self.index(label) for label in row[self.label]]] = 1
        return targets


class TextRegressionDataModule(TextDataModule):
    """Batches for regression on texts, or pairs of texts: ``labels`` are floats.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is the column of the number.
    """

    def setup(self, stage: str) -> None:
        """Nothing to set up: there are no classes."""

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        return torch.tensor([float(row[self.label]) for row in rows])


class SentencePairDataModule(TextRegressionDataModule):
    """Batches for sentence embeddings: training has the sentences of both columns, one by one, without labels.

    Validation and test have scored pairs, ``{"first": ..., "second": ..., "labels": ...}``, with each sentence encoded
    by itself, where :class:`TextRegressionDataModule` encodes a pair as one text. Prediction has the first column.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``text`` and ``pair`` are the columns of the sentences, and
            ``label`` that of the score, which a training table need not have.
    """

    without_labels = ("train", "unlabeled", "predict")

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        pair: Any = self.pair
        if not all(pair in row for row in rows):
            return dict(self.encode([row[self.text] for row in rows], None))
        first, second = (self.encode([row[column] for row in rows], None) for column in (self.text, pair))
        return {"first": dict(first), "second": dict(second), "labels": self.targets(rows, None)}

    def table(self, split: str) -> Sequence[Row]:
        rows = super().table(split)
        if split not in self.without_labels:
            return rows
        columns = [self.text] if self.pair is None or split == "predict" else [self.text, self.pair]
        return [{self.text: row[column]} for row in rows for column in columns]


class TextToTextDataModule(TextDataModule):
    """Batches for sequence-to-sequence models: ``labels`` are the tokens of the target text, padded with -100.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is the column of the target text.
    """

    def setup(self, stage: str) -> None:
        """Nothing to set up: there are no classes."""

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        written = self._tokenize(text_target=[row[self.label] for row in rows])
        tokens: Tensor = written["input_ids"]
        return tokens.masked_fill(written["attention_mask"] == 0, -100)


class TokenDataModule(TextDataModule):
    """Batches for token classification: the first token of a word has the word's class, all others -100.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``text`` is a column of lists of words, and ``label`` one of
            lists of classes, one a word.
    """

    def classes(self, row: Row) -> Sequence[Any]:
        if len(row[self.label]) != len(row[self.text]):
            raise ValueError(
                f"A row has {len(row[self.text])} words in {self.text!r} and {len(row[self.label])} classes in "
                f"{self.label!r}; each word needs one: {row}"
            )
        classes: Sequence[Any] = row[self.label]
        return classes

    def encode(self, texts: list[Any], pairs: list[str] | None) -> Mapping[str, Tensor]:
        encoded: Mapping[str, Tensor] = self._tokenize(texts, is_split_into_words=True)
        return encoded

    def targets(self, rows: list[Row], encoded: Any) -> Tensor | None:
        if self.labels is None:
            return None
        targets = torch.full_like(encoded["input_ids"], -100)
        for number, row in enumerate(rows):
            before = None
            for position, word in enumerate(encoded.word_ids(number)):
                if word is not None and word != before:
                    targets[number, position] = self.index(row[self.label][word])
                before = word
        return targets
