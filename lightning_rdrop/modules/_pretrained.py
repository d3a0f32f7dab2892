"""Load a pretrained Hugging Face model with its dropout switched on."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from lightning_rdrop.dropout import switch_on


def load(auto: Any, pretrained: str, **config: Any) -> nn.Module:
    """``auto.from_pretrained(pretrained, **config)`` with its dropout switched on.

    ``from_pretrained`` returns models in eval mode, and Lightning's ``fit`` keeps that mode.
    """
    network: nn.Module = auto.from_pretrained(pretrained, **config)
    woken = switch_on(network)
    if woken:
        rank_zero_info(
            f"{pretrained} was handed out in eval mode. Switched on for the training: {len(woken)} dropout layers, "
            f"{woken[0]} to {woken[-1]}."
        )
    return network
