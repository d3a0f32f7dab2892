"""Published data sets as folders of tables, one for each split."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from random import Random

from lightning_rdrop.data import Row, TextDataModule, read_table

NAMES = {"val": ("val", "dev"), "predict": ("test",)}


class TextFolder(TextDataModule):
    """The tables ``train``, ``val`` (or ``dev``), ``test`` and ``unlabeled`` of a folder, without repeated texts.

    Args:
        tokenizer: as for :class:`~lightning_rdrop.data.TextDataModule`.
        folder: contains the tables.
        prefix: of their names, as in ``cola_train.tsv``.
        draw: 0 is the published split. Any other value is the seed of a new one: the rows of training and validation
            are shuffled together and split into the published sizes.
        train_size: the number of training rows; None is all.
        with_unlabeled: whether to use the rows of ``unlabeled``.
        kwargs: other arguments of :class:`~lightning_rdrop.data.TextDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        folder: str,
        prefix: str = "",
        draw: int = 0,
        train_size: int | None = None,
        with_unlabeled: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.folder = Path(folder)
        self.prefix = prefix
        self.draw = draw
        self.train_size = train_size
        self.with_unlabeled = with_unlabeled

    def rows(self, split: str) -> Sequence[Row] | None:
        if split == "unlabeled" and not self.with_unlabeled:
            return None
        return self.splits[split]

    @cached_property
    def splits(self) -> dict[str, Sequence[Row]]:
        seen: set[tuple[str, ...]] = set()
        parts: dict[str, list[Row]] = {}
        for split in ("test", "val", "train", "unlabeled"):  # test texts first, so that they are not trained on
            parts[split] = []
            for row in self.read(split):
                key = tuple(row[column] for column in (self.text, self.pair) if column is not None)
                if key not in seen:
                    parts[split].append(row)
                seen.add(key)
        if self.draw:
            both = parts["train"] + parts["val"]
            Random(self.draw).shuffle(both)
            cut = len(parts["train"])
            parts["train"], parts["val"] = both[:cut], both[cut:]
        return parts | {"train": parts["train"][: self.train_size], "predict": parts["test"]}

    def read(self, split: str) -> Sequence[Row]:
        """The table of a split; empty if there is no such file."""
        found = (path for name in NAMES.get(split, (split,)) for path in self.folder.glob(f"{self.prefix}{name}.*"))
        path = next(found, None)
        return [] if path is None else read_table(path)
