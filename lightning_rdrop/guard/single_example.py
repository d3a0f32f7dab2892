"""Check whether a BatchNorm would normalize by the statistics of copies of a single example."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop.nesting import copied
from lightning_rdrop.probe import without_side_effects
from lightning_rdrop.submodules import few

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_REFUSAL = "more than 1 value per channel"
_EXPLANATION = (
    "The batch has one example, so these BatchNorm layers get a single value per channel: {}. Plain training raises an "
    "error here; over copies of the example, the variance would be 0 or only that of dropout. Drop the last incomplete "
    "batch, DataLoader(..., drop_last=True), or use a larger batch size."
)


def single_values(network: nn.Module, predict: Callable[[Any], Any], inputs: Any, device: torch.device) -> str | None:
    """Report the BatchNorm layers that get a single value per channel from one example; ``None`` if there are none.

    torch refuses these, but not the copies of a duplicated batch, whose variance is 0, or that of the dropout before
    the layer. This takes a pass with one example, without gradients and side effects; only if there is a BatchNorm in
    training mode.

    Args:
        network: the module that predicts. Its passes must not communicate between ranks: this one is made by one alone.
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
        try:
            predict(copied(inputs))
        except Exception as error:  # if another part fails, drawing the views raises as well
            if found and _REFUSAL in str(error):
                return _EXPLANATION.format(few(found))
    return None
