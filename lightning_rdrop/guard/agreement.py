"""Check whether the views of a batch differ; if they do not, draw them again before reporting it."""

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
from lightning_rdrop.probe import without_side_effects

_REDRAWS = 16
_TINY = 1e-4
"""If all values of a parameter are at most this large, it may hide the dropout before it."""


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two predictions agree up to rounding.

    The same row at two positions of a batch may differ in its last bits, because the tail of a matrix product is summed
    in another order. Two numbers agree within a tolerance relative to their own size, or to the median of the numbers
    that differ (which a few classes masked with -1e9 do not change): 100 eps, 1e-5 in float32, where deep networks
    reach 2e-6; 2 eps in half precision, whose products are summed in float32 and rounded once. Dropout causes
    differences of several percent. NaN equals NaN, and infinities equal themselves.

    Args:
        first, second: tensors of any shape; tensors of different shapes do not agree.

    Example:
        >>> from torch import tensor
        >>> same(tensor([1.0, 2.0]), tensor([1.000001, 2.0])), same(tensor([1.0, 2.0]), tensor([1.001, 2.0]))
        (True, False)
    """
    if first.shape != second.shape:
        return False
    # in chunks: a real difference shows in the first one, and logits of a large vocabulary already fill the memory
    pieces = (torch.split(tensor.detach().flatten(), 2**20) for tensor in (first, second))
    return all(torch.equal(one, other) or _close(one, other) for one, other in zip(*pieces, strict=True))


def diagnose(
    network: nn.Module, draw: Callable[[], Any], predictions: Any, on_all_ranks: Callable[[bool], bool] = bool
) -> str | None:
    """Check whether randomness reaches the prediction: ``None`` if it does, else the reason why not.

    Views can be equal by chance (one row, a small p, LayerDrop), and a weight that is initialized with zero (LoRA, a
    zero head) or a LayerScale of 1e-6 hides the dropout before it on the first batch. So they are drawn again, up to 16
    times, with noise in place of trained parameters whose values are all zero or tiny. Parameters, buffers such as the
    statistics of BatchNorm, and random states are restored, and ``forward`` logs nothing meanwhile. Other state that it
    changes, such as a list or a metric, is not restored.

    Args:
        network: the module whose submodules the reason names.
        draw: predicts the same batch again, (K, N, ...).
        predictions: the views to check, (K, N, ...).
        on_all_ranks: returns whether a decision is True on all ranks. A rank that drew again alone would wait forever
            for the collectives of a SyncBatchNorm or of sharded weights.

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
    with without_side_effects(network, views.first_tensor(predictions).device), noise_for_tiny(network):
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
    """Whether two predictions have the same tensors up to rounding."""
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
    """Context with noise in place of trained parameters whose values are all zero or tiny.

    Examples are those of LoRA, of a zero head, and a LayerScale of 1e-6. The originals are swapped out instead of
    overwritten, because the graph of the step still needs them; only sharded ones are overwritten and restored.

    Args:
        network: the network whose parameters are replaced.
        sharded: whether parameters that are sharded across ranks are replaced as well.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    overwritten: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module in network.modules():
            for name, parameter in module._parameters.items():
                # a parameter is empty if its shard is on another rank
                if parameter is None or not (parameter.requires_grad and parameter.numel()):
                    continue
                if (is_sharded(parameter) and not sharded) or (parameter.abs() > _TINY).any():
                    continue
                noise = 0.1 * torch.randn_like(parameter)
                if is_sharded(parameter):  # forward gathers the original, even if it is replaced
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
