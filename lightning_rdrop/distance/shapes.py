"""Input checks of distances: equal shapes, logits instead of a softmax, and zeros in rows that do not count."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop import arguments
from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.divergence import at_least_float32

ROUNDING = 0.01
"""Tolerance for the sum of probabilities: the sum of thousands in half precision is off by 0.002."""


def same_shape(distance: Distance, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the shapes are equal, and return both in the prediction's dtype, float32 or better.

    Raises:
        ValueError: the shapes differ, or the prediction is not floating-point.
        TypeError: one of them is not a tensor.
    """
    one_tensor(distance, prediction)
    arguments.tensor("target", target)
    if prediction.shape != target.shape or not prediction.is_floating_point():
        raise ValueError(
            f"{type(distance).__name__} takes a floating-point prediction and a target of the same shape, got "
            f"{tuple(prediction.shape)}, {prediction.dtype}, and {tuple(target.shape)}; nothing broadcasts here. "
            "Make the shapes equal, for example with prediction.squeeze(-1) in forward."
        )
    prediction = at_least_float32(prediction)
    return prediction, target.to(prediction.dtype)


def counted_between(distance: Distance, prediction: Tensor, target: Tensor | None) -> Tensor | None:
    """Mask of the rows that count between two predictions: those whose target counts; None if all do.

    Raises:
        ValueError: the target tells which rows count, but has another shape.
        TypeError: the target tells which rows count, but is not a tensor.
    """
    counted = None if target is None else distance.counted(prediction, target)
    if target is not None and counted is not None:
        same_shape(distance, prediction, target)
    return counted


def blank(counted: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Set the tensors to 0 where rows do not count, so that no inf or NaN from there reaches a gradient."""
    return tensors if counted is None else tuple(tensor.where(counted, 0) for tensor in tensors)


def one_tensor(distance: Distance, prediction: Any) -> None:
    """Check that the prediction is a tensor.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"The prediction is a {type(prediction).__name__}, but {type(distance).__name__} takes one tensor: return "
            "logits, or an object with .logits, from forward; override rdrop_predict(self, inputs) to select one; or "
            "pass one distance per name, rdrop_distance={'name': ...}."
        )


def softmaxed(distance: Distance, prediction: Tensor, dim: int) -> str | None:
    """The warning for a prediction that is already a softmax; ``None`` if it may be logits."""
    sums = at_least_float32(prediction).sum(dim)
    if (prediction < 0).any() or ((sums - 1).abs() > ROUNDING).any():
        return None
    return (
        f"The prediction is already a softmax: its rows sum to 1. {type(distance).__name__} takes logits and applies "
        "the softmax itself. Return the logits from forward, or override rdrop_predict."
    )
