"""Check whether a BatchNorm would normalize by the statistics of copies of a single example."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop.probe import without_side_effects
from lightning_rdrop.submodules import few

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def single_values(network: nn.Module, predict: Callable[[Any], Any], inputs: Any, device: torch.device) -> str | None:
    """Report the BatchNorm layers that get a single value per channel from one example; ``None`` if there are none.

    torch refuses these, but not the copies of a duplicated batch, whose variance is 0, or that of the dropout before
    the layer. This takes a pass with one example, without gradients and side effects; only if there is a BatchNorm in
    training mode.

    Args:
        network: the module that predicts. Its passes must not communicate between ranks.
        predict: returns the prediction for some inputs.
        inputs: inputs of one example.
        device: the device of the inputs.

    Example:
        >>> network, cpu = nn.Sequential(nn.BatchNorm1d(4)), torch.device("cpu")
        >>> "drop_last=True" in single_values(network, network, torch.zeros(1, 4), cpu)
        True
        >>> single_values(network, network, torch.zeros(1, 4, 9), cpu) is None
        True
    """
    norms = {name: part for name, part in network.named_modules() if isinstance(part, _BATCH_NORMS) and part.training}
    if not norms:
        return None
    found: list[str] = []

    def note(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].numel() == arguments[0].shape[1]:
            found.append(name)

    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(partial(note, name)).remove)
        stack.enter_context(without_side_effects(network, device))
        stack.enter_context(suppress(Exception))  # torch refuses the value; if another part fails, drawing raises
        predict(inputs)
    if not found:
        return None
    return (
        f"The batch has one example, from which BatchNorm gets a single value per channel: {few(found)}. Plain "
        "training fails here, and in a duplicated batch the variance would be that of copies, 0 or that of dropout "
        "alone. Leave out a last batch of one example, DataLoader(..., drop_last=True), or use a larger batch size."
    )
