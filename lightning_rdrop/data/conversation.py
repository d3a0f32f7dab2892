"""Tokenize a conversation, and mark the tokens of the assistant, which a model learns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_rdrop.data import cells
from lightning_rdrop.data.table import Row

Message = Mapping[str, str]
"""A message, with its ``role`` and ``content``."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""A template with this block marks the text of the assistant itself."""


class Conversation(NamedTuple):
    """The tokens of a conversation."""

    ids: list[int]
    """All token ids."""
    said: list[bool]
    """Whether each token is the assistant's, including the one that ends its turn."""


def messages_of(row: Row) -> list[Message]:
    """The messages of a row: ``messages``, or a ``prompt`` by the user and its ``completion`` by the assistant.

    Raises:
        ValueError: the row has neither; a message is malformed; there is no message of the assistant.

    Example:
        >>> messages_of({"prompt": "Two and two?", "completion": "Four."})
        [{'role': 'user', 'content': 'Two and two?'}, {'role': 'assistant', 'content': 'Four.'}]
    """
    if "messages" not in row and "prompt" in row and "completion" in row:
        prompt, completion = cells.text(row, "prompt"), cells.text(row, "completion")
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    messages = cells.items(row, "messages", "messages")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"a message must be {{'role': 'user', 'content': 'a text'}}, got {cells.spell(message)}.")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message has the role 'assistant', so there is nothing to learn.")
    return list(messages)


def tokenized(tokenizer: Any, messages: Sequence[Message]) -> Conversation:
    """Tokenize a conversation with the tokenizer's chat template.

    The assistant's text is what the template marks with ``{% generation %}``. Without such marks it is what a message
    adds after the generation prompt, including the token that ends the turn, but not whitespace after that token.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: those of the conversation.

    Raises:
        ValueError: the template rejects the messages, or formats earlier ones differently when others follow, so that
            the assistant's text cannot be located.
    """
    if _MARKED.search(tokenizer.chat_template):
        marked = _templated(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return Conversation(marked["input_ids"], [bool(said) for said in marked["assistant_masks"]])
    text: str = _templated(tokenizer, messages, tokenize=False)
    spans = [_span(tokenizer, messages, turn, text) for turn, one in enumerate(messages) if one["role"] == "assistant"]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    said = [any(start <= first < last <= end for start, end in spans) for first, last in offsets]
    return Conversation(encoded["input_ids"], said)


def _span(tokenizer: Any, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
    """Start and end of a turn of the assistant in the text."""
    before: str = _templated(tokenizer, messages[:turn], tokenize=False, add_generation_prompt=True)
    behind: str = _templated(tokenizer, messages[: turn + 1], tokenize=False)
    if not (text.startswith(behind) and behind.startswith(before)):
        raise ValueError(
            f"the chat template formats message {turn + 1} differently when others follow it, or not after the "
            "generation prompt, so the assistant's text cannot be located. Put {% generation %} and "
            "{% endgeneration %} around it in tokenizer.chat_template, and save the tokenizer."
        )
    stripped = behind.rstrip()
    ended = stripped.endswith(tuple(tokenizer.all_special_tokens))
    return len(before), max(len(before), len(stripped if ended else behind))


def _templated(tokenizer: Any, messages: Sequence[Message], **how: Any) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **how)
    except Exception as error:  # whatever a template raises
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template rejects messages with the roles {roles or '(none)'}: {error}") from error
