"""Freeze the lower part of a network: no training and no dropout there."""

from __future__ import annotations

from torch import nn

from lightning_rdrop.dropout import set_probability, stochastic_layers
from lightning_rdrop.submodules import matching


def freeze_below(network: nn.Module, name: str) -> None:
    """Freeze everything before a submodule, and switch off the dropout there.

    Submodules are assumed to run in the order of ``named_modules()``.

    Args:
        network: changed in place.
        name: the dotted name of the submodule, or the end of it.

    Raises:
        ValueError: the name matches no submodule, or several.

    Example:
        >>> parts = (nn.Linear(2, 2), nn.Dropout(0.1), nn.Linear(2, 2), nn.Dropout(0.1))
        >>> network = nn.Sequential(*parts)
        >>> freeze_below(network, "2")
        >>> network[0].weight.requires_grad, network[1].p, network[2].weight.requires_grad, network[3].p
        (False, 0.0, True, 0.1)
    """
    first = matching("frozen_below", network, [name])[0]
    below = set()
    for path, module in network.named_modules():
        if path == first:
            break
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if path and not first.startswith(f"{path}."):
            module.training = False
            below.add(module)
    layers = [layer for layer in stochastic_layers(network) if layer.module in below]
    own = [layer.name for layer in layers if not layer.attribute.startswith("config.")]  # shared with the layers above
    set_probability(network, dict.fromkeys(own, 0.0))
