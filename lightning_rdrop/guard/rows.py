"""Whether the rows of a doubled batch meet: a joint pass is right only where each row is predicted by itself."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import nn

from lightning_rdrop import views
from lightning_rdrop.guard.agreement import noise_for_tiny, same, same_tensors
from lightning_rdrop.nesting import tensors_of
from lightning_rdrop.probe import untouched

_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1
"""Rounding in batches of other sizes stays far below, what one row learns of another far above."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def rows_meet(
    network: nn.Module,
    predict: Callable[[Any], Any],
    inputs: Any,
    examples: int,
    device: torch.device,
    on_all_ranks: Callable[[bool], bool] = bool,
) -> str | None:
    """What was seen where the rows of a doubled batch depend on each other; ``None`` where they do not.

    In eval mode, the prediction for [x; x'] is compared with those for x and for x', with x' the first row of x B
    times: a permutation of x would hide attention between the examples. That takes four passes over B rows, without
    gradients, and leaves no trace in the network.

    Silent are a batch of one example, of which there is no other x', predictions that change from pass to pass in eval
    mode, and networks in which rows meet by design: a BatchNorm without running statistics, experts with a capacity.

    Args:
        network: the module that predicts.
        predict: the prediction (N, ...) for some inputs.
        inputs: those of B examples.
        examples: B.
        device: of the inputs.
        on_all_ranks: whether a decision is True on all ranks, which must make the same passes.

    Example:
        >>> network, cpu = nn.LSTM(4, 3), torch.device("cpu")  # (T, B, 4): time would be doubled
        >>> "batch_first=True" in rows_meet(network, lambda x: network(x)[0], torch.randn(5, 2, 4), 5, cpu)
        True
        >>> network = nn.LSTM(4, 3, batch_first=True)
        >>> rows_meet(network, lambda x: network(x)[0], torch.randn(5, 2, 4), 5, cpu) is None
        True
    """
    if examples < 2:
        return None
    half = torch.is_autocast_enabled(device.type) or any(p.dtype.itemsize < 4 for p in network.parameters())
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE
    own, first = [*range(examples)], [0] * examples
    with untouched(network, device), noise_for_tiny(network, sharded=False):
        network.eval()
        try:
            single = predict(inputs)
            repeated = predict(views.take(inputs, first, examples))
            joined = predict(views.take(inputs, own + first, examples))
        except Exception:  # if it is not eval mode that fails, drawing the views says why
            return None
        seen = _difference(single, repeated, joined, examples, tolerance)
        if on_all_ranks(seen is None) or not on_all_ranks(same_tensors(single, predict(inputs), tolerance)):
            return None
    if seen is None or _meet_by_design(network):
        return None
    return (
        f"The rows of a doubled batch depend on each other: with dropout off, {seen}. Usual reasons are a batch that "
        "is not the first dimension, as in nn.LSTM, nn.GRU and nn.Transformer without batch_first=True; attention, or "
        "scores, between the examples of a batch; and indices that point into the batch. Give each view a forward pass "
        'of its own: rdrop_passes="separate".'
    )


def _difference(single: Any, repeated: Any, joined: Any, examples: int, tolerance: float) -> str | None:
    alone, same_rows, together = ([tensor for _, tensor in tensors_of(one)] for one in (single, repeated, joined))
    if not len(alone) == len(same_rows) == len(together):
        return "twice as many examples are predicted by another number of tensors"
    for own, first, both in zip(alone, same_rows, together, strict=True):
        if own.dim() == 0:
            continue
        if len(both) != 2 * len(own) or both.shape[1:] != own.shape[1:]:
            return (
                f"{examples} examples are predicted with the shape {tuple(own.shape)}, and twice as many with "
                f"{tuple(both.shape)}"
            )
        upper, lower = both[: len(own)], both[len(own) :]
        common = tuple(slice(min(sizes)) for sizes in zip(lower.shape, first.shape, strict=True))
        # a model may cut its batch to the longest row
        if not (same(upper, own, tolerance) and same(lower[common], first[common], tolerance)):
            return "the prediction for a row is another one when other examples stand beside it"
    return None


def _meet_by_design(network: nn.Module) -> bool:
    return any(
        (isinstance(module, _BATCH_NORMS) and module.running_mean is None)
        or any("capacity" in name and isinstance(value, Real) for name, value in vars(module).items())
        for module in network.modules()
    )
