"""Batch transforms for training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_rdrop import arguments


class RandomReplacement:
    """Replaces some of the decoder's input tokens with other tokens of the same text, against exposure bias.

    In training a decoder reads the target; in generation it reads its own output, including errors. So in some of the
    texts each token is replaced, with a given probability, by a token drawn from the same text: a model tends to write
    the right words in the wrong places. The labels do not change.

    Args:
        probability: the probability that a token of a changed text is replaced, in [0, 1].
        examples: the probability that a text is changed, in [0, 1].
        special: tokens that are neither replaced nor drawn, such as padding. The same holds for the first position,
            the decoder's start token.

    Raises:
        ValueError: a probability out of range.

    Source: Su Jianlin, spaces.ac.cn/archives/7259, whose values are the defaults.

    Example:
        >>> replace = RandomReplacement(1.0, examples=1.0, special=[0])
        >>> replace(torch.tensor([[2, 7, 7, 0], [2, 5, 0, 0]]))  # nothing to draw but 7 in one text and 5 in the other
        tensor([[2, 7, 7, 0],
                [2, 5, 0, 0]])
    """

    def __init__(self, probability: float = 0.3, *, examples: float = 0.5, special: Iterable[int] = ()) -> None:
        self.probability = arguments.probability("probability", probability)
        self.examples = arguments.probability("examples", examples)
        self.special = tuple(special)
        self._special = torch.tensor(self.special, dtype=torch.long, device="cpu")

    def __call__(self, tokens: Tensor) -> Tensor:
        """Replace some of the tokens (N, T), and return a new tensor."""
        special = self._special.to(tokens.device, non_blocking=True)
        free = (tokens.unsqueeze(-1) != special).all(-1)  # torch.isin may wait for the device
        free[:, 0] = False
        changed = torch.rand_like(tokens[:, :1], dtype=torch.float) < self.examples
        chosen = free & changed & (torch.rand_like(tokens, dtype=torch.float) < self.probability)
        # sort the free positions to the front, and draw one of them for each position
        order = free.int().argsort(dim=1, descending=True, stable=True)
        pick = (torch.rand_like(tokens, dtype=torch.float) * free.sum(1, keepdim=True)).long()
        return torch.where(chosen, tokens.gather(1, order.gather(1, pick)), tokens)
