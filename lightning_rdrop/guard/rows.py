"""Check whether the rows of a duplicated batch affect each other: then a joint pass is wrong."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import views
from lightning_rdrop._compat import has_sharded_weights
from lightning_rdrop.guard.agreement import noise_for_tiny
from lightning_rdrop.nesting import copied, tensors_of
from lightning_rdrop.probe import without_side_effects
from lightning_rdrop.submodules import few

_TOLERANCES = {"highest": 1e-3, "high": 1e-2, "medium": 0.1}
"""By precision (float32, TF32, bfloat16). Rounding is far below, and the effect of other rows far above."""
_BY_CHANCE = 0.05
"""The fraction of rows that may differ: if experts or a top k are chosen, rounding may decide ties."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def row_dependence(
    network: nn.Module, predict: Callable[[Any], Any], inputs: Any, examples: int, device: torch.device
) -> str | None:
    """Report that the rows of a duplicated batch depend on each other; ``None`` if they do not.

    In eval mode, the prediction for [x'; x] is compared with that for x, where x' repeats the last row B times and x is
    reversed: [x; x] would hide attention between the examples. This takes two passes, 3B rows in total, without
    gradients, and with as few side effects as :func:`~lightning_rdrop.guard.diagnose`. Rows differ if their root mean
    square error exceeds the rounding of the precision.

    Not reported are networks whose rows affect each other by design (a BatchNorm without running statistics, experts
    with a capacity), and those whose eval mode is inconclusive: it fails, predicts something else in every pass, or
    returns other shapes than in training.

    Args:
        network: the module that predicts.
        predict: returns the prediction (N, ...) for some inputs.
        inputs: inputs of B >= 2 examples; a single example has no other x'.
        examples: B.
        device: the device of the inputs.

    Example:
        >>> network, cpu = nn.LSTM(4, 3), torch.device("cpu")  # (T, B, 4): time would be duplicated
        >>> "batch_first=False" in row_dependence(network, lambda x: network(x)[0], torch.randn(5, 2, 4), 5, cpu)
        True
        >>> network = nn.LSTM(4, 3, batch_first=True)
        >>> row_dependence(network, lambda x: network(x)[0], torch.randn(5, 2, 4), 5, cpu) is None
        True
    """
    tolerance = _tolerance(network, device)
    doubled = views.take(inputs, [examples - 1] * examples + [*reversed(range(examples))], examples)

    def tensors_for(batch: Any) -> list[Tensor]:
        return _tensors(predict(copied(batch)))

    try:
        with without_side_effects(network, device), noise_for_tiny(network, sharded=False):
            network.eval()
            single, both = tensors_for(inputs), tensors_for(doubled)
            seen = _difference(single, both, examples, tolerance)
            if seen is None and not has_sharded_weights(network):
                return None
            again = tensors_for(inputs)
        with without_side_effects(network, device):
            trained = tensors_for(doubled)
    except Exception:  # if it also fails outside of eval mode, drawing the views raises
        return None
    repeatable = _shapes(again) == _shapes(single) and all(
        _same(one.reshape(1, -1), other.reshape(1, -1), tolerance) for one, other in zip(again, single, strict=True)
    )
    if seen is None or not repeatable or _shapes(trained) != _shapes(both) or _meet_by_design(network):
        return None
    return (
        f"The rows of a duplicated batch depend on each other: with dropout off, {seen}. {_usual_reasons(network)} Use "
        'one forward pass for each view: rdrop_passes="separate".'
    )


def _tolerance(network: nn.Module, device: torch.device) -> float:
    if torch.is_autocast_enabled(device.type) or any(p.dtype.itemsize < 4 for p in network.parameters()):
        return _TOLERANCES["medium"]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend, with the newer names in torch.backends
        precision = "medium"
    return max(_TOLERANCES[precision], _TOLERANCES["high" if device.type == "cuda" else "highest"])  # cuDNN uses TF32


def _difference(single: list[Tensor], both: list[Tensor], examples: int, tolerance: float) -> str | None:
    if len(single) != len(both):
        return "the prediction for twice as many examples has another number of tensors"
    for own, doubled in zip(single, both, strict=True):
        if len(doubled) != 2 * len(own) or doubled.shape[1:] != own.shape[1:]:
            return (
                f"the prediction for {examples} examples has the shape {tuple(own.shape)}, and that for twice as many "
                f"has {tuple(doubled.shape)}"
            )
        if len(own) % examples:
            continue  # unclear which rows belong to which example; drawing the views raises
        rows = own.reshape(examples, -1)  # a model that flattens tokens into rows has several per example
        expected = torch.cat([rows[-1:].expand_as(rows), rows.flip(0)])
        if not _same(expected, doubled.reshape(2 * examples, -1), tolerance):
            return "the prediction for a row depends on the other examples in the batch"
    return None


def _same(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether nearly all rows of two matrices agree."""
    rows = max(1, 2**20 // first.shape[1])  # in chunks: logits of a large vocabulary already fill the memory
    apart = [_apart(*pair, tolerance) for pair in zip(torch.split(first, rows), torch.split(second, rows), strict=True)]
    return int(torch.cat(apart).sum()) <= _BY_CHANCE * len(first)


def _apart(first: Tensor, second: Tensor, tolerance: float) -> Tensor:
    """Which rows differ, by the root mean square of differing values relative to their median in the row or overall."""
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
    others = "attention or scores between the examples of a batch, and indices that point into the batch"
    modules = network.named_modules()
    if first := few(name or type(part).__name__ for name, part in modules if getattr(part, "batch_first", 1) is False):
        return (
            f"With batch_first=False, so that the time dimension is duplicated: {first}. Otherwise look for {others}."
        )
    return f"Usual reasons are a batch dimension that is not the first, {others}."
