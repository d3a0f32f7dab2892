"""The weight of unlabeled examples as a function of training progress."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_rdrop.callbacks.alpha_scheduler import AlphaScheduler
from lightning_rdrop.unlabeled import parts

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class UnlabeledWeightScheduler(AlphaScheduler):
    """Raises the module's ``rdrop_unlabeled_weight`` from 0 to its peak, as ``AlphaScheduler`` does with alpha.

    Early predictions are poor, so their agreement is worth little. While the weight is exactly 0, during ``delay`` and
    in the first step of a linear ramp, unlabeled examples are not passed through the network. If the first batch has no
    unlabeled part, a warning says so.

    Args:
        shape, ramp, delay, peak: as for :class:`~lightning_rdrop.AlphaScheduler`; ``peak=None`` is the module's own
            weight.

    Example:
        >>> UnlabeledWeightScheduler("linear", ramp=100, peak=1.0).value_at(50)
        0.5
    """

    attribute: ClassVar[str] = "rdrop_unlabeled_weight"

    _checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the first batch of each training."""
        super().setup(trainer, pl_module, stage)
        self._checked = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn if the first batch has no unlabeled part, neither in the data nor made by the training_step."""
        if self._checked:
            return
        self._checked = True
        logged = "train/unlabeled_weight" in trainer.callback_metrics
        if trainer.is_global_zero and parts(batch)[1] is None and not logged:
            warnings.warn(
                f"{type(self).__name__} has no effect: the first batch has no unlabeled part. Pass the Trainer two "
                'loaders, {"labeled": ..., "unlabeled": ...}, or train without this callback.',
                stacklevel=2,
            )
