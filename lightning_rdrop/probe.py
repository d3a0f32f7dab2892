"""Forward passes without side effects on the network."""

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
def without_side_effects(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Context without gradients and logging that restores modes, buffers and random states on exit.

    The random states are those of torch, Python and numpy. Other state that ``forward`` changes is not restored, such
    as a counter, a list or a torchmetrics metric.

    Args:
        network: the network whose modes and buffers are restored.
        device: the device of the inputs, whose random state is restored along with the CPU's.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
        >>> with without_side_effects(network, torch.device("cpu")):
        ...     prediction = network(torch.ones(3, 4))
        >>> int(network[0].num_batches_tracked)
        0
    """
    modes = [(module, module.training) for module in network.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it passes nested tensors to submodules and drops padding
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(torch.no_grad())
        stack.callback(random_states(device))
        stack.enter_context(copied_buffers(network))
        stack.enter_context(logging_disabled(network))
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.clear_autocast_cache()  # torch 2.6 would reuse weights cast here, which have no gradient
            for module, mode in modes:
                module.training = mode


def random_states(device: torch.device) -> Callable[[], None]:
    """Save the random states of torch, Python and numpy, and return a function that restores them.

    Numpy's is saved if numpy has been imported: SpecAugment uses it.

    Args:
        device: the device whose state is saved along with the CPU's.

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
def copied_buffers(network: nn.Module) -> Iterator[None]:
    """Context that replaces buffers by copies, because a graph may need the originals unchanged."""
    kept = [(module, dict(module._buffers)) for module in network.modules() if module._buffers]
    try:
        for module, buffers in kept:
            module._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


@contextmanager
def logging_disabled(network: nn.Module) -> Iterator[None]:
    """Context in which ``log`` and ``log_dict`` of the network and its submodules do nothing."""
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
    """Replaces ``log`` and ``log_dict``."""
