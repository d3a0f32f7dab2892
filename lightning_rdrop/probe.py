"""Forward passes that leave a network as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_rdrop._compat import eagerly


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """A context without gradients and logs, after which modes, buffers and random states are what they were.

    The random states are torch's, Python's and numpy's. What ``forward`` itself keeps elsewhere stays changed: a
    counter, a list, a torchmetrics metric that it updates.

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
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(torch.no_grad())
        stack.callback(random_states(device))
        stack.enter_context(buffers_aside(network))
        stack.enter_context(unlogged(network))
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.clear_autocast_cache()  # torch 2.6 would go on with weights that were cast here, without gradients
            for module, mode in modes:
                module.training = mode


def random_states(device: torch.device) -> Callable[[], None]:
    """Keep the random states of torch, Python and numpy; the function that is returned puts them back.

    Numpy's is kept where anyone has imported it: SpecAugment draws from it.

    Args:
        device: whose state is kept along with the CPU's.

    Example:
        >>> put_back = random_states(torch.device("cpu"))
        >>> first = torch.rand(3)
        >>> put_back()
        >>> torch.equal(first, torch.rand(3))
        True
    """
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    numpy, python_state, state = sys.modules.get("numpy"), random.getstate(), torch.get_rng_state()
    numpy_state = None if numpy is None else numpy.random.get_state()
    device_state = None if accelerator is None else accelerator.get_rng_state(device)

    def put_back() -> None:
        random.setstate(python_state)
        torch.set_rng_state(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if accelerator is not None:
            accelerator.set_rng_state(device_state, device)

    return put_back


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


@contextmanager
def unlogged(network: nn.Module) -> Iterator[None]:
    """A context in which nothing is logged of what a LightningModule logs in its ``forward``.

    Args:
        network: the module; those inside of it are silent, too.
    """
    attributes = [vars(module) for module in network.modules() if hasattr(module, "log_dict")]
    names = {"log", "log_dict"}
    kept = [{name: own[name] for name in names & own.keys()} for own in attributes]
    try:
        for own in attributes:
            own.update(dict.fromkeys(names, _no_log))
        yield
    finally:
        for own, earlier in zip(attributes, kept, strict=True):
            for name in names:
                del own[name]
            own.update(earlier)


def _no_log(*_: Any, **__: Any) -> None:
    """In the place of ``log`` and ``log_dict``."""
