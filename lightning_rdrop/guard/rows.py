"""Whether the rows of a doubled batch meet: a joint pass is right only where each row is predicted by itself."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import views
from lightning_rdrop._compat import is_sharded
from lightning_rdrop.guard.agreement import noise_for_tiny
from lightning_rdrop.nesting import tensors_of
from lightning_rdrop.probe import untouched
from lightning_rdrop.submodules import few

_TOLERANCES = {"highest": 1e-3, "high": 1e-2, "medium": 0.1}
"""By precision (float32, TF32, bfloat16). Rounding stays far below, what one row learns of another far above."""
_BY_CHANCE = 0.05
"""So many rows may differ: where experts or a top k are chosen, rounding decides a tie now and then."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def rows_meet(
    network: nn.Module, predict: Callable[[Any], Any], inputs: Any, examples: int, device: torch.device
) -> str | None:
    """What was seen where the rows of a doubled batch depend on each other; ``None`` where they do not.

    In eval mode, the prediction for [x'; x] is compared with that for x, where x' is the last row B times, and x stands
    in reverse: [x; x] would hide attention between the examples. That is two passes over 3B rows together, without
    gradients, of which as little remains as of :func:`~lightning_rdrop.guard.diagnose`. A difference is an error of a
    row, its root mean square, beyond the rounding of the precision.

    Silent are networks in which rows meet by design (a BatchNorm without running statistics, experts with a
    capacity), and those whose eval mode tells nothing: it fails, predicts something else in every pass, or returns
    other shapes than training.

    Args:
        network: the module that predicts.
        predict: the prediction (N, ...) for some inputs.
        inputs: those of B >= 2 examples; of one example there is no other x'.
        examples: B.
        device: of the inputs.

    Example:
        >>> network, cpu = nn.LSTM(4, 3), torch.device("cpu")  # (T, B, 4): time would be doubled
        >>> "batch_first=False" in rows_meet(network, lambda x: network(x)[0], torch.randn(5, 2, 4), 5, cpu)
        True
        >>> network = nn.LSTM(4, 3, batch_first=True)
        >>> rows_meet(network, lambda x: network(x)[0], torch.randn(5, 2, 4), 5, cpu) is None
        True
    """
    tolerance = _tolerance(network, device)
    doubled = views.take(inputs, [examples - 1] * examples + [*reversed(range(examples))], examples)
    try:
        with untouched(network, device), noise_for_tiny(network, sharded=False):
            network.eval()
            single, both = _tensors(predict(inputs)), _tensors(predict(doubled))
            seen = _difference(single, both, examples, tolerance)
            if seen is None and not shares_weights(network):
                return None
            again = _tensors(predict(inputs))
        with untouched(network, device):
            trained = _tensors(predict(doubled))
    except Exception:  # if it is not eval mode that fails, drawing the views says why
        return None
    repeatable = _shapes(again) == _shapes(single) and all(
        _same(one.reshape(1, -1), other.reshape(1, -1), tolerance) for one, other in zip(again, single, strict=True)
    )
    if seen is None or not repeatable or _shapes(trained) != _shapes(both) or _meet_by_design(network):
        return None
    return (
        f"The rows of a doubled batch depend on each other: with dropout off, {seen}. {_usual_reasons(network)} Give "
        'each view a forward pass of its own: rdrop_passes="separate".'
    )


def shares_weights(network: nn.Module) -> bool:
    """Whether ranks hold parts of its weights, so that all of them must make the same passes."""
    return any(is_sharded(parameter) or not parameter.numel() for parameter in network.parameters())


def passes_meet(network: nn.Module) -> bool:
    """Whether its passes are those of all ranks together, as far as can be seen: each has to make as many."""
    return shares_weights(network) or any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())


def _tolerance(network: nn.Module, device: torch.device) -> float:
    if torch.is_autocast_enabled(device.type) or any(p.dtype.itemsize < 4 for p in network.parameters()):
        return _TOLERANCES["medium"]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer names of torch.backends, for each backend
        precision = "medium"
    return max(_TOLERANCES[precision], _TOLERANCES["high" if device.type == "cuda" else "highest"])  # cuDNN takes TF32


def _difference(single: list[Tensor], both: list[Tensor], examples: int, tolerance: float) -> str | None:
    if len(single) != len(both):
        return "twice as many examples are predicted by another number of tensors"
    for own, doubled in zip(single, both, strict=True):
        if len(doubled) != 2 * len(own) or doubled.shape[1:] != own.shape[1:]:
            return (
                f"{examples} examples are predicted with the shape {tuple(own.shape)}, and twice as many with "
                f"{tuple(doubled.shape)}"
            )
        if len(own) % examples:
            continue  # which rows are whose cannot be told, as drawing the views says
        rows = own.reshape(examples, -1)  # models that make rows of tokens have several for an example
        expected = torch.cat([rows[-1:].expand_as(rows), rows.flip(0)])
        if not _same(expected, doubled.reshape(2 * examples, -1), tolerance):
            return "the prediction for a row is another one when other examples stand beside it"
    return None


def _same(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether nearly all rows of two matrices are the same."""
    rows = max(1, 2**20 // first.shape[1])  # the logits of a vocabulary fill the memory as it is
    apart = [_apart(*pair, tolerance) for pair in zip(torch.split(first, rows), torch.split(second, rows), strict=True)]
    return int(torch.cat(apart).sum()) <= _BY_CHANCE * len(first)


def _apart(first: Tensor, second: Tensor, tolerance: float) -> Tensor:
    """Which rows differ: by the root mean square of what differs, relative to its median in the row, or in all rows."""
    differs = (first != second) & ~(first.isnan() & second.isnan())
    if not first.is_floating_point():
        return differs.any(1)
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(wide), second.to(wide)
    finite = differs & first.isfinite() & second.isfinite()  # a class masked with -inf is masked in both
    size = first.abs().where(finite, torch.nan)
    scale = torch.maximum(size.nanmedian(1).values, size.nanmedian())
    error = ((first - second).square().where(finite, 0).sum(1) / finite.sum(1)).sqrt()
    return (error > tolerance * scale) | (differs & ~finite).any(1)


def _tensors(prediction: Any) -> list[Tensor]:
    return [tensor for _, tensor in tensors_of(prediction) if tensor.dim() and tensor.numel()]


def _shapes(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _meet_by_design(network: nn.Module) -> bool:
    return any(
        (isinstance(module, _BATCH_NORMS) and module.running_mean is None)
        or any("capacity" in name and isinstance(value, Real) for name, value in vars(module).items())
        for module in network.modules()
    )


def _usual_reasons(network: nn.Module) -> str:
    others = "attention, or scores, between the examples of a batch; and indices that point into the batch"
    modules = network.named_modules()
    if first := few(name or type(part).__name__ for name, part in modules if getattr(part, "batch_first", 1) is False):
        return (
            f"With batch_first=False, where the sequence comes first, and is doubled: {first}. Else look for {others}."
        )
    return f"Usual reasons are a batch that is not the first dimension; {others}."
