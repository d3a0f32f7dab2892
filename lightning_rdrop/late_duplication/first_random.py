"""Find where randomness starts in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import submodules
from lightning_rdrop.late_duplication.duplicate_at import Call, Predict, before_calls
from lightning_rdrop.nesting import copied, tensors_of

_REDRAWS = 16


def first_random(
    network: nn.Module, predict: Predict, inputs: Any, device: torch.device, on_all_ranks: Callable[[bool], bool]
) -> tuple[list[Call], int | None]:
    """The calls of a pass, and the index of the first with random arguments; None if there is none.

    Random arguments differ between two passes. But they may agree by chance, and LayerDrop draws a number even if it
    drops nothing. So passes are repeated until the first call that differed is also the first before which a random
    number was drawn, or up to 16 times.

    Args:
        network, predict, inputs, on_all_ranks: see :func:`lightning_rdrop.late_duplication.find_split.find_split`.
        device: the device of the inputs.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 2))
        >>> calls, index = first_random(network, network, torch.ones(5, 4), torch.device("cpu"), bool)
        >>> calls[index]  # the name would be empty for the prediction itself
        ('2', 0)
    """

    def one_pass() -> tuple[list[tuple[Call, list[str]]], list[bool]]:
        seen, drawn, start = [], [], _random_state(device)

        def look(call: Call, arguments: Any) -> Any:
            seen.append((call, [_sum(tensor) for _, tensor in tensors_of(arguments)]))
            drawn.append(not all(map(torch.equal, start, _random_state(device))))
            return arguments

        with before_calls(submodules.named(network), look):
            prediction = predict(copied(inputs))
        look(("", 0), prediction)
        return seen, drawn

    first, drawn = one_pass()
    random: int | None = None
    for _ in range(_REDRAWS if True in drawn else 0):
        pairs = enumerate(zip_longest(first, one_pass()[0]))
        differing = next((index for index, (one, other) in pairs if one != other), None)
        random = min((index for index in (random, differing) if index is not None), default=None)
        if on_all_ranks(random == drawn.index(True)):
            break
    return [call for call, _ in first], random


def _random_state(device: torch.device) -> list[Tensor]:
    others = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *others]


def _sum(tensor: Tensor) -> str:
    """A fingerprint of a tensor: its sum, as text, so that NaN equals NaN."""
    return str(tensor.sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64).item())
