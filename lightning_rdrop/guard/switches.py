"""What switches randomness, and training, on and off in a network: compared in every step."""

from __future__ import annotations

from torch import nn

from lightning_rdrop.dropout import stochastic_layers


class Switches:
    """The switches of a network, read from lists: a walk through its modules would take far longer.

    Args:
        network: as it is now; a module that is put into it later is not seen.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
        >>> switches = Switches(network)
        >>> before = switches.random()
        >>> network[1].p = 0.3
        >>> switches.random() == before, switches.trained()
        (False, [True, True])
    """

    def __init__(self, network: nn.Module) -> None:
        self._modules = list(network.modules())
        self._weights = list(network.parameters())
        self._layers = stochastic_layers(network)

    def random(self) -> list[bool]:
        """Whether each module is in training mode, and whether each stochastic layer has p > 0.

        A p that goes from one value above 0 to another changes no verdict.
        """
        return [module.training for module in self._modules] + [layer.p > 0 for layer in self._layers]

    def trained(self) -> list[bool]:
        """Whether each parameter requires a gradient."""
        return [parameter.requires_grad for parameter in self._weights]
