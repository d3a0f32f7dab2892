"""Passes through a network that leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """For a while: no gradients, and whatever passes do to modes, buffers and random states is undone.

    Args:
        network: in which each submodule has its mode back afterwards.
        device: of the inputs, whose random numbers are put back beside those of the CPU.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
        >>> with untouched(network, torch.device("cpu")):
        ...     prediction = network(torch.ones(3, 4))
        >>> int(network[0].num_batches_tracked)
        0
    """
    modes = [(module, module.training) for module in network.modules()]
    others = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(others, device_type=device.type), buffers_aside(network):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def buffers_aside(network: nn.Module) -> Iterator[None]:
    """Copies in the place of buffers, for a while: the originals may be part of a graph, and are not written to."""
    kept = [(module, dict(module._buffers)) for module in network.modules() if module._buffers]
    try:
        for module, buffers in kept:
            module._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
