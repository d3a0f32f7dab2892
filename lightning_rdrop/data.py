"""Tables of text as a LightningDataModule, and what is done to a batch of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

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

    Its kin differ in their labels: :class:`MultilabelTextDataModule` has several classes for a text,
    :class:`TextRegressionDataModule` numbers, :class:`TextToTextDataModule` texts, :class:`TokenDataModule` a class for
    each word; with ``label=None`` there are none, as for a language model.

    Args:
        tokenizer: name or folder of a Hugging Face tokenizer; it pads each batch to its longest text.
        train: a table (see :func:`read_table`) to learn from; val, test, predict: likewise, each optional.
        unlabeled: another table to learn from, without labels or whatever they are: training batches become
            ``{"labeled": ..., "unlabeled": ...}``, and an epoch is as long as the longer of the two tables.
        text: the column of the text; ``pair`` that of a second one, for sentence pairs.
        label: the column of the label; ``None`` is text alone.
        labels: the classes in the order of their indices; ``None`` sorts those of the training table.
        batch_size: examples in a batch (R-Drop's views are not counted).
        unlabeled_batch_size: those without labels; ``None`` is as many.
        max_length: longer texts are cut, in tokens.
        num_workers: processes that load data.

    Raises:
        ValueError: a column or a label that a table lacks, or a stage without a table.

    A subclass that gets its texts elsewhere overrides :meth:`rows`; one with a tokenization of its own,
    :meth:`encode`; one with other labels, :meth:`targets`.
    """

    without_labels: ClassVar[tuple[str, ...]] = ("unlabeled", "predict")
    """The parts whose labels, if they have any, are left out."""

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
        """Hook: the rows of ``"train"``, ``"unlabeled"``, ``"val"``, ``"test"`` or ``"predict"``; None for no table."""
        path = self.tables[split]
        return None if path is None else read_table(path)

    def encode(self, texts: list[str], pairs: list[str] | None) -> Mapping[str, Tensor]:
        """Hook: the inputs of the network for some texts, padded to one length."""
        encoded: Mapping[str, Tensor] = self._tokenize(texts, pairs)
        return encoded

    def classes(self, row: Row) -> Sequence[Any]:
        """Hook: the classes that a row names."""
        return [row[self.label]]

    def targets(self, rows: list[Row], encoded: Any) -> Tensor | None:
        """Hook: the labels of rows that have them; None where the classes are not known."""
        return None if self.labels is None else torch.tensor([self.index(row[self.label]) for row in rows])

    def index(self, label: Any) -> int:
        """The index of a class."""
        assert self.labels is not None
        return self.labels.index(str(label))

    def setup(self, stage: str) -> None:
        if self.label is not None and self.labels is None and stage != "predict":
            named = {label for row in self._table("train") for label in self.classes(row)}
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

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Row]:
        return DataLoader(
            self._table(split),  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.unlabeled_batch_size or self.batch_size if split == "unlabeled" else self.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _table(self, split: str) -> Sequence[Row]:
        rows = self.rows(split)
        if not rows:
            raise ValueError(f"There is no {split} table: give {split}=..., a .json, .jsonl, .tsv or .csv file.")
        unlabeled = self.label is not None and split in self.without_labels
        if unlabeled:  # what labels there are may be blanks
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

    def _tokenize(self, *texts: Any, **options: Any) -> Any:
        return self._pretrained_tokenizer(
            *texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt", **options
        )

    @cached_property
    def _pretrained_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        if tokenizer.pad_token is None:  # as in GPT-2 and Llama; the attention mask keeps padding apart
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


class MultilabelTextDataModule(TextDataModule):
    """Batches for several labels, each there or not: ``labels`` are rows of 0 and 1, one number a class.

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
    """Batches for numbers about texts, or pairs of texts: ``labels`` are floats.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is the column of the number.
    """

    def setup(self, stage: str) -> None:
        """There are no classes to be collected."""

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        return torch.tensor([float(row[self.label]) for row in rows])


class SentencePairDataModule(TextRegressionDataModule):
    """Batches for embeddings of sentences: in training sentences alone, each of both columns, without any label.

    Validation and test have pairs with a score, ``{"first": ..., "second": ..., "labels": ...}``, each sentence encoded
    by itself, where :class:`TextRegressionDataModule` encodes the two as one text. Prediction takes the first column.

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

    def _table(self, split: str) -> Sequence[Row]:
        rows = super()._table(split)
        if split not in self.without_labels:
            return rows
        columns = [self.text] if self.pair is None or split == "predict" else [self.text, self.pair]
        return [{self.text: row[column]} for row in rows for column in columns]


class TextToTextDataModule(TextDataModule):
    """Batches for sequence to sequence: ``labels`` are the tokens of another text, padded with -100.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``label`` is the column of the text that is to be written.
    """

    def setup(self, stage: str) -> None:
        """There are no classes to be collected."""

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        written = self._tokenize(text_target=[row[self.label] for row in rows])
        tokens: Tensor = written["input_ids"]
        return tokens.masked_fill(written["attention_mask"] == 0, -100)


class TokenDataModule(TextDataModule):
    """Batches for the classification of words: the first token of a word has its class, all others -100.

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


class RandomReplacement:
    """Replaces some tokens of the decoder's inputs by others of the same text, against exposure bias.

    In training, a decoder reads the right tokens; when it generates, its own, some of which are wrong. So with the
    probability ``examples`` a text is changed, and then each of its tokens with the given probability: for any token
    of the same text, as a model tends to write the right words at the wrong places. The labels stay as they are.

    Args:
        probability: of a token, in [0, 1].
        examples: the share of the texts that are changed, in [0, 1].
        special: tokens that are neither replaced nor put in another's place, such as padding. The first position,
            where the decoder starts, is always left as it is.

    Raises:
        ValueError: a probability out of its range.

    Source: Su Jianlin, spaces.ac.cn/archives/7259, whose values are the defaults.

    Example:
        >>> replace = RandomReplacement(1.0, examples=1.0, special=[0])
        >>> replace(torch.tensor([[2, 7, 7, 0], [2, 5, 0, 0]]))  # nothing but 7, and 5, to choose from
        tensor([[2, 7, 7, 0],
                [2, 5, 0, 0]])
    """

    def __init__(self, probability: float = 0.3, *, examples: float = 0.5, special: Iterable[int] = ()) -> None:
        for name, value in (("probability", probability), ("examples", examples)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}.")
        self.probability = probability
        self.examples = examples
        self.special = tuple(special)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) as others of the same shape."""
        free = ~torch.isin(tokens, tokens.new_tensor(self.special))
        free[:, 0] = False
        changed = torch.rand_like(tokens[:, :1], dtype=torch.float) < self.examples
        chosen = free & changed & (torch.rand_like(tokens, dtype=torch.float) < self.probability)
        # the free positions first, and of these one at random for each position
        order = free.int().argsort(dim=1, descending=True, stable=True)
        pick = (torch.rand_like(tokens, dtype=torch.float) * free.sum(1, keepdim=True)).long()
        return torch.where(chosen, tokens.gather(1, order.gather(1, pick)), tokens)
