"""Draw the views: K predictions for the same inputs, each under its own dropout masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from lightning_rdrop import data_views, views
from lightning_rdrop.late_duplication import LateDuplication
from lightning_rdrop.nesting import copied


def draw(
    network: nn.Module,
    predict: Callable[[Any], Any],
    inputs: Any,
    count: int,
    examples: int,
    *,
    passes: Literal["joint", "separate"] = "joint",
    late: LateDuplication | None = None,
) -> Any:
    """Draw K predictions for the same inputs, views first, in the containers of one prediction.

    Each pass gets its own copy of the inputs, which ``predict`` may change in place.

    Args:
        network: the module whose submodules ``late`` names.
        predict: returns the prediction (N, ...) for some inputs.
        inputs: inputs of B examples, or :class:`~lightning_rdrop.Views` with different inputs for each view.
        count: K.
        examples: B.
        passes: ``"joint"`` is one pass over K * B rows, ``"separate"`` is K passes over B rows.
        late: where a joint pass duplicates the batch; None duplicates the inputs.

    Returns:
        Predictions of shape (K, N, ...).

    Example:
        >>> import torch
        >>> network = nn.Dropout(0.5)
        >>> draw(network, network, torch.ones(4, 8), count=2, examples=4).shape
        torch.Size([2, 4, 8])
    """
    if passes == "separate":
        return views.stack([predict(copied(one)) for one in data_views.each_view(inputs, count)])
    if late is None:
        prediction = predict(data_views.joined(inputs, count, examples))
    else:
        prediction = late.predict(network, predict, inputs, count)
    return views.split(prediction, count, examples)
