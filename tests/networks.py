"""Small networks with dropout in various places, for several test files, and what the guard says of them."""

import torch
from torch import Tensor, nn

from lightning_rdrop.guard import diagnose


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class StochasticDepth(nn.Module):
    """As torchvision's."""

    def __init__(self, p: float, mode: str):
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        rows = len(x) if self.mode == "row" else 1
        return x * x.new_empty((rows,) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p) / (1 - self.p)


class LayerDropEncoder(nn.Module):
    """As Hugging Face's encoders: one coin for the batch."""

    def __init__(self, layerdrop: float):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.layerdrop = layerdrop

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand([]) >= self.layerdrop:
                x = x + layer(x)
        return x


class Blocks(nn.Module):
    """Like a user's: a backbone that was loaded, blocks in a list, a head of their own."""

    def __init__(self, p: float = 0.1, blocks: int = 2, head: nn.Module | None = None):
        super().__init__()
        self.network = nn.Module()
        self.network.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(p)) for _ in range(blocks))
        self.head = head or nn.Linear(4, 3)

    def forward(self, x):
        for block in self.network.blocks:
            x = block(x)
        return self.head(x)


def reason(network: nn.Module, rows: int = 5) -> str | None:
    """What the guard would say about two views of a batch."""
    batch = torch.randn(rows, 4).repeat(2, 1)

    def draw() -> Tensor:
        return network(batch).view(2, rows, -1)

    return diagnose(network, draw, draw())


def training_outputs(module: nn.Module) -> list[Tensor]:
    """What its network gives in training, pass by pass: the guard's passes in eval mode are left out."""
    seen = []

    def hook(network, inputs, output):
        if network.training:
            seen.append(output)

    module.network.register_forward_hook(hook)
    return seen
