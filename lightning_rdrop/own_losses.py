"""Losses that a model computes itself, such as load balancing in a mixture of experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_rdrop import arguments
from lightning_rdrop.terms import Terms


@dataclass
class WithLosses:
    r"""A prediction and losses that the model computes itself, returned by ``rdrop_predict_with_losses``.

    .. math:: \text{loss} = \text{ce} + \alpha\,\text{kl} + \sum_i \text{loss}_i

    Each is averaged over the views if they are predicted in separate passes, and logged as ``train/<name>``.

    Args:
        prediction: (N, ...), as for the distance.
        losses: by name; each a mean over the rows of the pass, already multiplied by its weight, a scalar tensor.
    """

    prediction: Any
    losses: dict[str, Tensor]


def split_losses(predictions: Any) -> tuple[Any, dict[str, Tensor]]:
    """Separate predictions from the losses that come with them."""
    if isinstance(predictions, WithLosses):
        return predictions.prediction, predictions.losses
    return predictions, {}


def add_losses(terms: Terms, losses: dict[str, Tensor], taken: Collection[str] = ()) -> None:
    """Add losses, scalars or (K,) from K passes, to the loss and to the logged values, in place.

    Args:
        terms: terms of the predictions that the losses come with.
        losses: by name.
        taken: names under which other values are logged.

    Raises:
        TypeError: a loss is not a tensor.
        ValueError: a name is taken.

    Example:
        >>> from torch import tensor
        >>> terms = Terms(loss=tensor(3.0), ce=tensor(1.0), kl=tensor(0.5))
        >>> add_losses(terms, {"balance": tensor([0.25, 0.75])})  # of two passes
        >>> terms.loss, terms.extra
        (tensor(3.5000), {'balance': tensor(0.5000)})
    """
    for name, loss in losses.items():
        if name in terms.extra or name in taken:
            raise ValueError(f"losses: train/{name} would be logged twice. Rename the loss {name!r}.")
        mean = arguments.tensor(f"losses[{name!r}]", loss).mean()
        terms.loss = terms.loss + mean
        terms.extra[name] = mean.detach()


def unused_losses(output: Any) -> list[str]:
    """The names of tensors beside the logits of a model's output that look like losses to be trained.

    Example:
        >>> from torch import ones
        >>> unused_losses({"logits": ones(2), "aux_loss": ones((), requires_grad=True), "z_loss": None})
        ['aux_loss']
    """
    if isinstance(output, Mapping):
        parts = output
    else:
        parts = output._asdict() if hasattr(output, "_asdict") else getattr(output, "__dict__", {})
    return [
        name
        for name, part in parts.items()
        if isinstance(part, Tensor) and part.requires_grad and ("aux" in name or name.endswith("_loss"))
    ]
