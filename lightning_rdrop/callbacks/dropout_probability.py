"""Another dropout probability."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

from lightning_rdrop._lightning import Callback
from lightning_rdrop.callbacks._module import require_rdrop
from lightning_rdrop.dropout import set_probability

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class DropoutProbability(Callback):
    """Sets the probability of every dropout in the module while the Trainer runs, and restores the earlier ones.

    Su used more dropout for R-Drop than pretrained models come with, 0.3. A small model, or one that is trained
    briefly, may learn less with it, so compare both on validation data. Those of 0 are set as well, such as the
    attention and activation dropout of a BART. DropPath and LayerDrop are left alone; see
    :func:`lightning_rdrop.dropout.set_probability`.

    Test and prediction have it too, where ``mc_passes`` average the models that were trained. Before a call of
    :func:`~lightning_rdrop.mc_predict` without the Trainer, set the probability with that function.

    Args:
        p: the probability, 0 <= p < 1.

    Raises:
        ValueError: ``p`` out of its range, or a module without any dropout.
        TypeError: a module without ``RDropMixin``.

    Source: Su Jianlin, spaces.ac.cn/archives/8496, who uses 0.3.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[DropoutProbability(0.3)], logger=False)
    """

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p < 1:
            raise ValueError(f"p must be a probability, 0 <= p < 1 (0.3 is recommended), got {p!r}.")
        self.p: float = float(p)  # checkpoints hold plain floats
        self._earlier: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the probability before the first forward pass of the training."""
        self._set(pl_module)
        if not self._earlier:
            raise ValueError(
                f"{type(pl_module).__name__} has no dropout whose probability could be set to p={self.p}. "
                "Add nn.Dropout(0.3) in front of its head."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it for dropout passes of a validation by itself."""
        self._set(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it for dropout passes of a test."""
        self._set(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it for dropout passes of a prediction."""
        self._set(pl_module)

    def _set(self, pl_module: LightningModule) -> None:
        self._earlier = self._earlier or set_probability(require_rdrop(self, pl_module), self.p)

    def state_dict(self) -> dict[str, Any]:
        """Record p in the checkpoint; a resumed training takes the p it is given."""
        return {"p": self.p}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the probabilities: Lightning calls no teardown after an error."""
        self._put_back(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the probabilities afterwards."""
        self._put_back(pl_module)

    def _put_back(self, pl_module: LightningModule) -> None:
        set_probability(pl_module, self._earlier)
        self._earlier = {}
