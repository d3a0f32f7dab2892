"""Whether the views of a batch differ: compare them, and draw again before concluding that they cannot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_rdrop._compat import is_sharded
from lightning_rdrop.guard.explanation import explain
from lightning_rdrop.probe import untouched

_REDRAWS = 16


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two predictions agree up to rounding.

    The same row at two places of a batch may differ in its last bits, because the tail of a matrix product is summed
    in another order. Two numbers agree within a tolerance relative to themselves, or to the median of what differs
    (which a few classes masked with -1e9 do not move): 100 eps, 1e-5 in float32, where deep networks show 2e-6; 2 eps
    in half precision, whose products are summed in float32 and rounded once. Dropout makes differences of per cents.
    NaN equals NaN, and an infinity itself.

    Example:
        >>> from torch import tensor
        >>> same(tensor([1.0, 2.0]), tensor([1.000001, 2.0])), same(tensor([1.0, 2.0]), tensor([1.001, 2.0]))
        (True, False)
    """
    if first.shape != second.shape:
        return False
    # in pieces: a real difference shows in the first one, and the logits of a vocabulary fill the memory as it is
    pieces = (torch.split(tensor.detach().flatten(), 2**20) for tensor in (first, second))
    return all(torch.equal(one, other) or _close(one, other) for one, other in zip(*pieces, strict=True))


def diagnose(
    network: nn.Module, draw: Callable[[], Tensor], views: Tensor, on_all_ranks: Callable[[bool], bool] = bool
) -> str | None:
    """Whether randomness reaches the prediction: ``None`` if it does, else the reason why not.

    Equal views can be chance (one row, a small p, LayerDrop), and a weight that starts at zero (LoRA, a zero head)
    hides the dropout before it on the first batch. So they are drawn again, up to 16 times, with noise in the place
    of trained parameters that are all zero. Nothing remains of this: parameters, buffers such as the statistics of
    BatchNorm, and torch's random state are as before.

    Args:
        network: the module whose parts the reason names.
        draw: predicts the same batch again, (K, N, ...).
        views: the predictions at hand, (K, N, ...).
        on_all_ranks: whether a decision is the same, True, on all ranks. One that drew again alone would wait forever
            in the collectives of a SyncBatchNorm or of sharded weights.

    Example:
        >>> network, batch = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.ones(2, 3, 4)
        >>> diagnose(network, lambda: network(batch), network(batch)) is None
        True
        >>> network = network.eval()
        >>> "model.train()" in diagnose(network, lambda: network(batch), network(batch))
        True
    """
    if not on_all_ranks(_agree(views)):
        return None
    with untouched(network, views.device), _noise_for_zeros(network):
        first = draw()
        shared = False
        for again in itertools.chain([first], (draw() for _ in range(_REDRAWS - 1))):
            if not on_all_ranks(_agree(again)):
                return None
            shared = shared or not same(first[0], again[0])
    return explain(network, shared=shared)


def _agree(views: Tensor) -> bool:
    return all(same(views[0], view) for view in views[1:])


def _close(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point():
        return False
    eps = torch.finfo(first.dtype).eps
    tolerance = eps * (2 if eps > 1e-4 else 100)
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(wide), second.to(wide)
    differing = first[(first != second) & first.isfinite() & second.isfinite()].abs()
    scale = float(differing.median()) if len(differing) else 0.0
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@contextmanager
def _noise_for_zeros(network: nn.Module) -> Iterator[None]:
    """For a while: noise in the place of trained parameters that are all zero.

    The originals are put aside, not written back: the graph of the step still holds them (but no sharded one).
    """
    kept = [(module, dict(module._parameters)) for module in network.modules()]
    sharded: list[nn.Parameter] = []
    try:
        for module, parameters in kept:
            for name, parameter in parameters.items():
                # an empty parameter is one that is sharded away
                if parameter is None or not (parameter.requires_grad and parameter.numel()) or parameter.any():
                    continue
                noise = 0.1 * torch.randn_like(parameter)
                if is_sharded(parameter):  # a forward gathers it, whatever stands in its place
                    sharded.append(parameter)
                    parameter.copy_(noise)
                else:
                    module._parameters[name] = nn.Parameter(noise)
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)
        for parameter in sharded:
            parameter.zero_()
