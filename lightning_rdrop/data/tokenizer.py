"""A Hugging Face tokenizer that tokenizes each text once."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_rdrop.extras import from_pretrained, require

Text = str | Sequence[str]
"""A text, or a list of its words."""


class Tokens(NamedTuple):
    """A tokenized text."""

    ids: dict[str, array[int]]
    """``input_ids`` and the model's other inputs, of the same length."""
    starts: dict[int, int]
    """Position of the first token of each word, if the text is a list of words."""


class CachedTokenizer:
    """Tokenize each text once, not in every epoch; a batch is padded to its longest text.

    Args:
        name: name or folder of a Hugging Face tokenizer.
        max_length: in tokens; longer texts are truncated.
        words: whether texts are lists of words.
    """

    def __init__(self, name: str, max_length: int, *, words: bool = False) -> None:
        self.name = name
        self.max_length = max_length
        self.words = words
        self._known: dict[Hashable, Tokens] = {}

    def remember(self, texts: Sequence[Text], pairs: Sequence[str] | None = None, *, target: bool = False) -> None:
        """Tokenize the texts, or pairs of texts, that are new."""
        new = {key: number for number, key in enumerate(self._keys(texts, pairs, target)) if key not in self._known}
        if not new:
            return
        first = [texts[number] for number in new.values()]
        given: dict[str, Any] = {"text_target": first} if target else {"text": first}
        if pairs is not None:
            given["text_pair"] = [pairs[number] for number in new.values()]
        encoded = self._tokenizer(
            **given, truncation=True, max_length=self.max_length, is_split_into_words=self.words and not target
        )
        for row, key in enumerate(new):
            words = encoded.word_ids(row) if self.words else []
            starts = {word: n for n, word in reversed([*enumerate(words)]) if word is not None}
            self._known[key] = Tokens({name: array("q", ids[row]) for name, ids in encoded.items()}, starts)

    def __call__(self, texts: Sequence[Text], pairs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The network's inputs for texts, or pairs of texts, padded to the same length."""
        rows = [{name: ids.tolist() for name, ids in tokens.ids.items()} for tokens in self._look_up(texts, pairs)]
        return dict(self._tokenizer.pad(rows, padding=True, return_tensors="pt"))

    def targets(self, texts: Sequence[str]) -> Tensor:
        """The tokens of target texts, padded with -100."""
        rows = [torch.tensor(tokens.ids["input_ids"]) for tokens in self._look_up(texts, target=True)]
        return pad_sequence(rows, batch_first=True, padding_value=-100)

    def starts(self, texts: Sequence[Text], width: int) -> list[dict[int, int]]:
        """Positions of the first token of each word in a batch of ``width`` tokens."""
        left = self._tokenizer.padding_side == "left"
        found = []
        for tokens in self._look_up(texts):
            shift = width - len(tokens.ids["input_ids"]) if left else 0
            found.append({word: shift + position for word, position in tokens.starts.items()})
        return found

    def _look_up(
        self, texts: Sequence[Text], pairs: Sequence[str] | None = None, *, target: bool = False
    ) -> list[Tokens]:
        self.remember(texts, pairs, target=target)
        return [self._known[key] for key in self._keys(texts, pairs, target)]

    def _keys(self, texts: Sequence[Text], pairs: Sequence[str] | None, target: bool) -> list[Hashable]:
        first = [text if isinstance(text, str) else tuple(text) for text in texts]
        second: Sequence[str | None] = [None] * len(first) if pairs is None else pairs
        return [(one, other, target) for one, other in zip(first, second, strict=True)]

    @cached_property
    def _tokenizer(self) -> Any:
        auto = require("transformers", "huggingface", f"tokenizer={self.name!r}").AutoTokenizer
        tokenizer = from_pretrained(auto, "tokenizer", self.name)
        if tokenizer.pad_token is None:  # GPT-2 and Llama have none; the attention mask marks the padding
            tokenizer.pad_token = tokenizer.eos_token
        # silence its advice to tokenize and pad in one call, which would tokenize in every epoch
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        return tokenizer
