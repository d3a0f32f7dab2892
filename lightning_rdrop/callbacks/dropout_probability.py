"""Set the dropout probability while the Trainer runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_rdrop._lightning import Callback
from lightning_rdrop.arguments import probability
from lightning_rdrop.callbacks._require import require_rdrop
from lightning_rdrop.dropout import set_probability

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class DropoutProbability(Callback):
    """Sets the probability of every dropout in the module while the Trainer runs, and restores the old ones afterwards.

    Su used a dropout of 0.3 for R-Drop, more than pretrained models come with. A small model, or one that is trained
    briefly, may learn less with it, so compare both on validation data. Probabilities of 0 are set as well, such as
    those of attention and activation dropout in BART. DropPath and LayerDrop are not changed; see
    :func:`lightning_rdrop.dropout.set_probability`.

    It also applies to test and prediction, so that ``mc_passes`` average the models that were trained. Before you call
    :func:`~lightning_rdrop.mc_predict` without the Trainer, set the probability with ``set_probability``.

    Args:
        p: the probability, 0 <= p < 1.

    Raises:
        ValueError: ``p`` out of range, or a module without any dropout.
        TypeError: a module without ``RDropMixin``.

    Source: Su Jianlin, spaces.ac.cn/archives/8496, who uses 0.3.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[DropoutProbability(0.3)], logger=False)
    """

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.p = probability("p", p, below_one=True)
        self._earlier: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the probability before the first forward pass of training."""
        self._set(pl_module)
        if not self._earlier:
            raise ValueError(
                f"{type(pl_module).__name__} has no dropout whose probability could be set to p={self.p}. "
                "Add nn.Dropout(0.3) in front of its head."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it for dropout passes in ``trainer.validate``."""
        self._set(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it for dropout passes in a test."""
        self._set(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it for dropout passes in a prediction."""
        self._set(pl_module)

    def _set(self, pl_module: LightningModule) -> None:
        self._earlier = self._earlier or set_probability(require_rdrop(self, pl_module), self.p)

    def state_dict(self) -> dict[str, Any]:
        """Record p in the checkpoint; a resumed training uses the p of its own callback."""
        return {"p": self.p}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the probabilities: Lightning calls no teardown after an error."""
        self._restore(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the probabilities."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        set_probability(pl_module, self._earlier)
        self._earlier = {}
