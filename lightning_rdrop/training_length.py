"""The number of optimizer steps of a training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_rdrop._lightning import Trainer


def planned_steps(trainer: Trainer) -> int | None:
    """The number of optimizer steps of the whole training (of batches in manual optimization); None if unknown.

    It is unknown if the data loader or the Trainer has no end, or if ``max_steps`` ends a training in manual
    optimization: it counts optimizer steps, of which a batch may make any number.

    Lightning's estimate uses only the current ``accumulate_grad_batches``. A ``GradientAccumulationScheduler`` has one
    for each epoch, and the last window of an epoch may be shorter:

    .. math:: \\sum_e \\lceil \\text{batches} / \\text{accumulate}(e) \\rceil
    """
    dry = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by its connector; a dry run sets max_steps
    if trainer.max_steps != -1 and not trainer.lightning_module.automatic_optimization and not dry:
        return None
    steps, batches, epochs = trainer.estimated_stepping_batches, trainer.num_training_batches, trainer.max_epochs
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by its connector
        accumulate = getattr(callback, "get_accumulate_grad_batches", None)  # of either distribution
        if accumulate is not None and epochs is not None and epochs > 0 and math.isfinite(batches):
            steps = sum(math.ceil(batches / accumulate(epoch)) for epoch in range(epochs))
            steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return int(steps) if 0 <= steps < math.inf else None
