"""What a distance makes sure of before it computes: one shape, logits, and nothing in the rows that do not count."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop import arguments
from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.divergence import at_least_float32

ROUNDING = 0.01
"""How far from 1 probabilities may sum: thousands of them in half precision are 0.002 away."""


def alike(distance: Distance, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the prediction's dtype, float32 or better.

    Raises:
        ValueError: the shapes differ, or the prediction is no tensor of floats.
        TypeError: the target is no tensor.
    """
    one_tensor(distance, prediction)
    arguments.tensor("target", target)
    if prediction.shape != target.shape or not prediction.is_floating_point():
        raise ValueError(
            f"{type(distance).__name__} compares a prediction of floats with a target of its own shape, got "
            f"{tuple(prediction.shape)}, {prediction.dtype}, and {tuple(target.shape)}; nothing broadcasts here. "
            "Bring both to one shape, for instance with prediction.squeeze(-1) in forward."
        )
    prediction = at_least_float32(prediction)
    return prediction, target.to(prediction.dtype)


def counted_between(distance: Distance, prediction: Tensor, target: Tensor | None) -> Tensor | None:
    """The rows that count between two predictions: those whose target counts; None if all do, whatever it is.

    Raises:
        ValueError: a target of another shape, where it tells which rows count.
        TypeError: likewise, one that is no tensor.
    """
    counted = None if target is None else distance.counted(prediction, target)
    if target is not None and counted is not None:
        alike(distance, prediction, target)
    return counted


def blank(counted: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with 0 where nothing counts: no infinity and no NaN from there reaches a gradient."""
    return tensors if counted is None else tuple(tensor.where(counted, 0) for tensor in tensors)


def one_tensor(distance: Distance, prediction: Any) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: the prediction is a container.
    """
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"The prediction is a {type(prediction).__name__}, and {type(distance).__name__} measures one tensor: "
            "return logits, or an object with .logits, from forward; override rdrop_predict(self, inputs) to choose "
            "one; or give a distance for each by name, rdrop_distance={'name': ...}."
        )


def softmaxed(distance: Distance, prediction: Tensor, dim: int) -> str | None:
    """What to say of a prediction that is a softmax already; ``None`` if it may be logits."""
    sums = at_least_float32(prediction).sum(dim)
    if (prediction < 0).any() or ((sums - 1).abs() > ROUNDING).any():
        return None
    return (
        f"The prediction is a softmax already: its rows sum to 1. {type(distance).__name__} takes logits, to which it "
        "applies one itself. Return what goes into it from forward, or override rdrop_predict."
    )
