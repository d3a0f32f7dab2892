"""Tables of sentences with a class for each word."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop.data import cells
from lightning_rdrop.data.table import Row
from lightning_rdrop.data.text import TextDataModule
from lightning_rdrop.data.tokenizer import CachedTokenizer


class TokenDataModule(TextDataModule):
    """Batches for token classification: the first token of a word has the word's class, all others -100.

    Args:
        args, kwargs: those of :class:`TextDataModule`; ``text`` is a column of lists of words, and ``label`` one of
            lists of classes, one per word.

    Shapes:
        ``input_ids``, ``attention_mask`` and ``labels`` (B, T), the labels padded with -100.
    """

    def check(self, row: Row) -> None:
        words = cells.items(row, self.text, "words")
        if not words or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"the column {self.text!r} must be a list of words, got {cells.spell(words)}.")

    def classes(self, row: Row) -> Sequence[Any]:
        classes = cells.items(row, self.label, "classes")
        if len(classes) != len(row[self.text]):
            raise ValueError(
                f"{len(row[self.text])} words in {self.text!r} but {len(classes)} classes in {self.label!r}; each word "
                "needs one."
            )
        return classes

    def targets(self, rows: list[Row], encoded: Any) -> Tensor:
        targets = torch.full_like(encoded["input_ids"], -100)
        starts = self.tokens.starts([row[self.text] for row in rows], targets.shape[1])
        for number, row in enumerate(rows):
            for word, position in starts[number].items():
                targets[number, position] = self.index(row[self.label][word])
        return targets

    def align(self, rows: Sequence[Row], predicted: Sequence[Row]) -> Sequence[Row]:
        """A prediction for each word, that of its first token; None for words beyond ``max_length``."""
        aligned = []
        for row, new in zip(rows, predicted, strict=True):
            words = row[self.text]
            width = len(next(iter(new.values())))
            (starts,) = self.tokens.starts([words], width)
            at = [starts.get(word) for word in range(len(words))]
            aligned.append({name: [None if n is None else values[n] for n in at] for name, values in new.items()})
        return aligned

    @cached_property
    def tokens(self) -> CachedTokenizer:
        return CachedTokenizer(self.tokenizer, self.max_length, words=True)
