"""Forward passes that leave no trace in a network."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_rdrop._compat import eagerly


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """A context without gradients, after which modes, buffers and random states are what they were.

    The random states are torch's, Python's and numpy's.

    Args:
        network: whose modes and buffers are restored.
        device: of the inputs, whose random state is restored along with the CPU's.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
        >>> with untouched(network, torch.device("cpu")):
        ...     prediction = network(torch.ones(3, 4))
        >>> int(network[0].num_batches_tracked)
        0
    """
    modes = [(module, module.training) for module in network.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hands nested tensors to submodules, and cuts padding off
    others = [] if device.type == "cpu" else [device]
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(others, device_type=device.type))
        stack.enter_context(_fork_other_rngs())
        stack.enter_context(buffers_aside(network))
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.clear_autocast_cache()  # torch 2.6 would go on with weights that were cast here, without gradients
            for module, mode in modes:
                module.training = mode


@contextmanager
def _fork_other_rngs() -> Iterator[None]:
    """Python's and numpy's random states, the latter where anyone has imported it: SpecAugment draws from it."""
    numpy, python_state = sys.modules.get("numpy"), random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextmanager
def buffers_aside(network: nn.Module) -> Iterator[None]:
    """A context in which buffers are replaced by copies: the originals may be part of a graph, and stay unwritten."""
    kept = [(module, dict(module._buffers)) for module in network.modules() if module._buffers]
    try:
        for module, buffers in kept:
            module._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
