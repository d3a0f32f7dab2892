"""Losses that a model makes itself, such as the load balancing of a mixture of experts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_rdrop import arguments
from lightning_rdrop.terms import Terms


@dataclass
class WithLosses:
    r"""A prediction, and losses that the model makes itself: what ``rdrop_predict_with_losses`` returns.

    .. math:: \text{loss} = \text{ce} + \alpha\,\text{kl} + \sum_i \text{loss}_i

    each the mean over the views where they are predicted in passes of their own, and logged by its name as
    ``train/<name>``.

    Args:
        prediction: (N, ...), what the distance takes.
        losses: by name, each already multiplied with its weight; a mean over the rows of the pass, a scalar tensor.
    """

    prediction: Any
    losses: dict[str, Tensor]


def parted(predictions: Any) -> tuple[Any, dict[str, Tensor]]:
    """The predictions alone, and the losses that came with them."""
    if isinstance(predictions, WithLosses):
        return predictions.prediction, predictions.losses
    return predictions, {}


def add_losses(terms: Terms, losses: dict[str, Tensor], taken: Collection[str] = ()) -> None:
    """Add losses, of one pass or (K,) of several, to the loss, and to what is logged.

    Args:
        terms: those of the predictions that came with them.
        losses: by name.
        taken: the names under which other values are logged.

    Raises:
        TypeError: one is no tensor.
        ValueError: its name is taken.

    Example:
        >>> from torch import tensor
        >>> terms = Terms(loss=tensor(3.0), ce=tensor(1.0), kl=tensor(0.5))
        >>> add_losses(terms, {"balance": tensor([0.25, 0.75])})  # of two passes
        >>> terms.loss, terms.extra
        (tensor(3.5000), {'balance': tensor(0.5000)})
    """
    for name, loss in losses.items():
        if name in terms.extra or name in taken:
            raise ValueError(f"losses: train/{name} would be logged twice. Give the loss another name than {name!r}.")
        mean = arguments.tensor(f"losses[{name!r}]", loss).mean()
        terms.loss = terms.loss + mean
        terms.extra[name] = mean.detach()
