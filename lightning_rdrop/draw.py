"""Draw the views: K predictions for the same inputs, each under its own dropout masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from lightning_rdrop import data_views, views
from lightning_rdrop._compat import passes_synchronize
from lightning_rdrop.late_duplication import LateDuplication
from lightning_rdrop.nesting import copied
from lightning_rdrop.probe import without_side_effects


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
    if late is not None:
        return views.split(late.predict(network, predict, inputs, count), count, examples)
    rows = data_views.joined(inputs, count, examples)
    try:
        prediction = predict(rows)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if count > 1 and _accepts(network, predict, inputs):
            error.add_note(
                f"This pass over {count} * {examples} rows failed, but a pass over {examples} rows works. If the "
                'network requires a fixed number of rows, use one forward pass for each view: rdrop_passes="separate".'
            )
        raise
    return views.split(prediction, count, examples)


def _accepts(network: nn.Module, predict: Callable[[Any], Any], inputs: Any) -> bool:
    """Whether a pass over B rows works; False if other ranks would have to join it."""
    if passes_synchronize(network):
        return False
    inputs = data_views.first_view(inputs)
    try:
        with without_side_effects(network, views.first_tensor(inputs).device):
            predict(copied(inputs))
    except Exception:
        return False
    return True
