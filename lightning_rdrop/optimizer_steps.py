"""The numbers of optimizer steps of a training: planned, and made so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_rdrop._lightning import is_dry_run

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


def planned_steps(trainer: Trainer) -> int | None:
    """The number of optimizer steps of the whole training (of batches in manual optimization); None if unknown.

    It is unknown if the data loader or the Trainer has no end, or if ``max_steps`` ends a training in manual
    optimization: it counts optimizer steps, of which a batch may make any number.

    Lightning's estimate uses only the current ``accumulate_grad_batches``. A ``GradientAccumulationScheduler`` has one
    for each epoch, and the last window of an epoch may be shorter:

    .. math:: \\sum_e \\lceil \\text{batches} / \\text{accumulate}(e) \\rceil
    """
    limited = trainer.max_steps != -1 and not is_dry_run(trainer)  # a dry run sets max_steps
    if limited and not trainer.lightning_module.automatic_optimization:
        return None
    steps, batches, epochs = trainer.estimated_stepping_batches, trainer.num_training_batches, trainer.max_epochs
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by its connector
        accumulate = getattr(callback, "get_accumulate_grad_batches", None)  # of either distribution
        if accumulate is not None and epochs is not None and epochs > 0 and math.isfinite(batches):
            steps = sum(math.ceil(batches / accumulate(epoch)) for epoch in range(epochs))
            steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return int(steps) if 0 <= steps < math.inf else None


def steps_made(trainer: Trainer, pl_module: LightningModule) -> int:
    """The optimizer steps so far, as the loggers count them.

    In manual optimization ``global_step`` counts the steps of every optimizer, so batches are counted instead. The
    loggers' own counter, ``_batches_that_stepped``, is one ahead after resuming from a step that failed.
    """
    if pl_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed
