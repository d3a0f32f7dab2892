"""What switches randomness and training on and off in a network; compared in every step."""

from __future__ import annotations

from torch import nn

from lightning_rdrop.dropout import stochastic_layers


class Switches:
    """The modes, dropout probabilities and frozen parameters of a network, read from lists to save time.

    Args:
        network: the network; modules added to it later are not included.

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

    def random(self) -> tuple[bool, ...]:
        """Whether each module is in training mode, and whether each stochastic layer has p > 0.

        A change between two probabilities above 0 needs no new check.
        """
        return (*(module.training for module in self._modules), *(layer.p > 0 for layer in self._layers))

    def trained(self) -> list[bool]:
        """Whether each parameter requires a gradient."""
        return [parameter.requires_grad for parameter in self._weights]
