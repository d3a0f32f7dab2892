"""What the ready-made modules share: a network, an optimizer, an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_rdrop import views
from lightning_rdrop.data_views import first_view
from lightning_rdrop.hooks import TARGET_KEYS
from lightning_rdrop.mixin import RDropMixin
from lightning_rdrop.modules._mean_loss import MeanLoss
from lightning_rdrop.predict import mc_predict


class Task(RDropMixin, pl.LightningModule):
    """A network trained by R-Drop with AdamW, and evaluated with torchmetrics as ``val/...`` and ``test/...``.

    For another optimizer or a learning rate schedule use the CLI's ``--optimizer`` and ``--lr_scheduler``, or override
    ``configure_optimizers``.

    Args:
        network: called with the inputs of a batch; returns predictions, or an object with ``.logits``.
        metrics: what validation and test measure, besides the task loss.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        mc_passes: predict with the model average of so many dropout passes, >= 2, and return its
            :class:`~lightning_rdrop.MCPrediction`; 0 is one pass with dropout off.
        rdrop: the arguments of :class:`~lightning_rdrop.RDropMixin`.

    Raises:
        ValueError: ``mc_passes`` out of its range, or for a module that predicts no distribution.
    """

    rdrop_unsaved = (*RDropMixin.rdrop_unsaved, "network", "metrics")
    unaveraged: ClassVar[str | None] = None
    """What the module predicts where that is nothing to average, such as texts."""

    def __init__(
        self,
        network: nn.Module,
        metrics: MetricCollection,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        mc_passes: int = 0,
        **rdrop: Any,
    ) -> None:
        super().__init__(**rdrop)
        self.save_hyperparameters()
        if isinstance(mc_passes, bool) or not isinstance(mc_passes, int) or mc_passes < 0 or mc_passes == 1:
            raise ValueError(f"mc_passes must be an int >= 2, or 0 for a single pass, got {mc_passes!r}.")
        if mc_passes and self.unaveraged:
            raise ValueError(
                f"mc_passes={mc_passes} averages predictions, and {type(self).__name__} predicts {self.unaveraged}: "
                "leave it out."
            )
        self.network = network
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.mc_passes = mc_passes
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.val_loss = MeanLoss(self.rdrop_distance, prefix="val/")
        self.test_loss = MeanLoss(self.rdrop_distance, prefix="test/")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, self.test_metrics, self.test_loss)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The prediction for a batch, with targets or without; an ``MCPrediction`` with ``mc_passes``."""
        targetless = isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS)
        bare = isinstance(batch, Tensor) or targetless
        inputs = batch if bare else first_view(self.rdrop_unpack(batch)[0])
        return mc_predict(self, inputs, self.mc_passes) if self.mc_passes else self.rdrop_predict(inputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(
            (parameter for parameter in self.parameters() if parameter.requires_grad),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
        )

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Any, target: Any) -> None:
        """Hook: update the metrics with the prediction for a batch."""
        metrics.update(prediction, target)

    def evaluate(self, batch: Any, metrics: MetricCollection, loss: MeanLoss) -> None:
        """Log the task loss and the metrics of a batch in validation or test."""
        inputs, target = self.rdrop_unpack(batch)
        prediction = self.rdrop_predict(first_view(inputs))
        loss.add_batch(self.rdrop_distance, prediction, target)
        self.measure(metrics, batch, prediction, target)
        examples = len(views.first_tensor(target))
        self.log_dict(loss, batch_size=examples)
        self.log_dict(metrics, batch_size=examples, prog_bar=metrics is self.val_metrics)
