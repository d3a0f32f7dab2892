"""Whether the views of a batch differ: compare them, and draw again before concluding that they cannot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import views
from lightning_rdrop._compat import is_sharded
from lightning_rdrop.guard.explanation import explain
from lightning_rdrop.nesting import tensors_of
from lightning_rdrop.probe import untouched

_REDRAWS = 16
_TINY = 1e-4
"""The largest number of a parameter through which dropout is not seen yet."""


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two predictions agree up to rounding.

    The same row at two places of a batch may differ in its last bits, because the tail of a matrix product is summed
    in another order. Two numbers agree within a tolerance relative to themselves, or to the median of what differs
    (which a few classes masked with -1e9 do not move): 100 eps, 1e-5 in float32, where deep networks show 2e-6; 2 eps
    in half precision, whose products are summed in float32 and rounded once. Dropout makes differences of per cents.
    NaN equals NaN, and an infinity itself.

    Args:
        first, second: of any shape; those of two shapes do not agree.

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
    network: nn.Module, draw: Callable[[], Any], predictions: Any, on_all_ranks: Callable[[bool], bool] = bool
) -> str | None:
    """Whether randomness reaches the prediction: ``None`` if it does, else the reason why not.

    Equal views can be chance (one row, a small p, LayerDrop), and a weight that starts at zero (LoRA, a zero head)
    hides the dropout before it on the first batch, as does a LayerScale of 1e-6. So they are drawn again, up to 16
    times, with noise in the place of trained parameters that are zero or tiny throughout. Parameters, buffers such as
    the statistics of BatchNorm, and random states are as before, and what ``forward`` logs is not logged. What it
    keeps elsewhere, in a list or a metric, is not put back.

    Args:
        network: the module whose parts the reason names.
        draw: predicts the same batch again, (K, N, ...).
        predictions: those at hand, (K, N, ...).
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
    if not on_all_ranks(agree(predictions)):
        return None
    with untouched(network, views.first_tensor(predictions).device), noise_for_tiny(network):
        first = draw()
        shared = False
        for again in itertools.chain([first], (draw() for _ in range(_REDRAWS - 1))):
            if not on_all_ranks(agree(again)):
                return None
            shared = shared or not _same_tensors(views.view(first, 0), views.view(again, 0))
    return explain(network, shared=shared)


def agree(predictions: Any) -> bool:
    """Whether all views (K, N, ...) agree with the first, up to rounding."""
    tensors = [tensor for _, tensor in tensors_of(predictions) if tensor.dim()]
    return all(same(each[0], view) for each in tensors for view in each[1:])


def _same_tensors(first: Any, second: Any) -> bool:
    """Whether two predictions have the same tensors, up to rounding."""
    one, other = ([tensor for _, tensor in tensors_of(part)] for part in (first, second))
    return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))


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
def noise_for_tiny(network: nn.Module, *, sharded: bool = True) -> Iterator[None]:
    """A context with noise in the place of trained parameters that are zero, or tiny, throughout.

    Such are LoRA's, a zero head's, and a LayerScale's of 1e-6. The originals are put aside, not written back: the
    graph of the step still holds them (but no sharded one).

    Args:
        network: whose parameters are replaced.
        sharded: whether those that are sharded across ranks are, too.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    overwritten: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module in network.modules():
            for name, parameter in module._parameters.items():
                # an empty parameter is one that is sharded away
                if parameter is None or not (parameter.requires_grad and parameter.numel()):
                    continue
                if (is_sharded(parameter) and not sharded) or (parameter.abs() > _TINY).any():
                    continue
                noise = 0.1 * torch.randn_like(parameter)
                if is_sharded(parameter):  # a forward gathers it, whatever stands in its place
                    overwritten.append((parameter, parameter.clone()))
                    parameter.copy_(noise)
                else:
                    replaced.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(noise)
        yield
    finally:
        for module, name, original in replaced:
            module._parameters[name] = original
        for parameter, value in overwritten:
            parameter.copy_(value)
