"""A LightningDataModule for conversations."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_rdrop.data.conversation import messages_of, tokenized
from lightning_rdrop.data.length_groups import LengthGroups
from lightning_rdrop.data.read import read_table
from lightning_rdrop.data.table import Row, Table
from lightning_rdrop.extras import from_pretrained, require
from lightning_rdrop.submodules import few


class Example(NamedTuple):
    """A tokenized conversation, truncated to ``max_length``."""

    ids: array[int]
    labels: array[int]
    """The tokens of the assistant, and -100 elsewhere."""


class ChatDataModule(pl.LightningDataModule):
    """Batches for a chat model, which is trained on the assistant's tokens: all others have the label -100.

    A table has ``messages``, a list of ``{"role": ..., "content": ...}``; or ``prompt`` and ``completion``, two texts.
    The tokenizer's chat template formats them. Training batches group conversations of similar length.

    Args:
        tokenizer: name or folder of a Hugging Face tokenizer with a chat template.
        train, val, test: a table (see :func:`read_table`), such as a ``.jsonl`` file, for each stage, all optional.
        batch_size: B, the number of conversations in a batch, before R-Drop duplicates them.
        max_length: in tokens; longer conversations are truncated at the end, and dropped if no token of the assistant
            is left.
        num_workers: worker processes of each data loader.

    Raises:
        ValueError: the tokenizer has no chat template; a row is not a conversation, or the template rejects it, with
            the file and the line; a stage has no table.

    Shapes:
        ``input_ids``, ``attention_mask`` and ``labels`` (B, T), padded on the right.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        batch_size: int = 8,
        max_length: int = 1024,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.name: str = tokenizer
        self.tables = {"train": train, "val": val, "test": test}
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self._examples: dict[str, list[Example]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        auto = require("transformers", "huggingface", f"tokenizer={self.name!r}").AutoTokenizer
        tokenizer = from_pretrained(auto, "tokenizer", self.name)
        if not isinstance(tokenizer.chat_template, str) or not tokenizer.is_fast:
            lacks = "chat template" if tokenizer.is_fast else "offsets, because it is not a fast tokenizer"
            raise ValueError(
                f"tokenizer={self.name!r} has no {lacks}. Use the fast tokenizer of a chat model, or set "
                "tokenizer.chat_template and save it."
            )
        return tokenizer

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.examples("train")

    def examples(self, split: str) -> list[Example]:
        """The conversations of ``"train"``, ``"val"`` or ``"test"`` that have labels, tokenized once.

        Raises:
            ValueError: there are none.
        """
        if split not in self._examples:
            path = self.tables[split]
            if path is None:
                raise ValueError(f"There is no {split} table. Pass {split}=..., such as a .jsonl file with messages.")
            table, found = read_table(path, split), list[Example]()
            table.check(lambda row: found.append(self.encode(row)))
            self._examples[split] = self._with_labels(found, table)
        return self._examples[split]

    def encode(self, row: Row) -> Example:
        """Hook: the tokens of a row, at most ``max_length``."""
        ids, said = tokenized(self.tokenizer, messages_of(row))
        labels = [token if counts else -100 for token, counts in zip(ids, said, strict=True)]
        return Example(array("l", ids[: self.max_length]), array("l", labels[: self.max_length]))

    def train_dataloader(self) -> DataLoader[Example]:
        examples = self.examples("train")
        return self._loader(examples, LengthGroups.of(self, [len(one.ids) for one in examples], self.batch_size))

    def val_dataloader(self) -> DataLoader[Example] | list[Any]:
        return [] if self.tables["val"] is None else self._loader(self.examples("val"))

    def test_dataloader(self) -> DataLoader[Example]:
        return self._loader(self.examples("test"))

    def check_test(self) -> None:
        """Raise now what a test would raise for its table, unless a subclass gets its conversations elsewhere."""
        if not any(is_overridden(hook, self, ChatDataModule) for hook in ("prepare_data", "test_dataloader")):
            self.examples("test")

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to a batch."""
        padding = self.tokenizer.pad_token_id
        if padding is None:  # the attention mask marks the padding
            padding = self.tokenizer.eos_token_id or 0
        return {
            "input_ids": _padded([one.ids for one in examples], padding),
            "attention_mask": _padded([array("l", [1] * len(one.ids)) for one in examples], 0),
            "labels": _padded([one.labels for one in examples], -100),
        }

    def _loader(self, examples: list[Example], sampler: LengthGroups | None = None) -> DataLoader[Example]:
        return DataLoader(
            examples,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _with_labels(self, examples: list[Example], table: Table) -> list[Example]:
        """The examples with a label after the first token, which nothing predicts."""
        kept = [any(label != -100 for label in one.labels[1:]) for one in examples]
        if not all(kept):
            places = few(table.place(index) for index, keep in enumerate(kept) if not keep)
            dropped = f"{kept.count(False)} of {len(kept)} conversations have no text of the assistant"
            said = f"{dropped} within max_length={self.max_length} tokens: {places}."
            if not any(kept):
                raise ValueError(f"{said} Increase max_length.")
            rank_zero_warn(f"{said} They are dropped.")
        return [one for one, keep in zip(examples, kept, strict=True) if keep]


def _padded(rows: Sequence[array[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
