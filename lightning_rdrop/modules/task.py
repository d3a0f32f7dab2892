"""Shared by the ready-made modules: a network, an optimizer, an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_rdrop import views
from lightning_rdrop.arguments import duration, whole
from lightning_rdrop.data_views import first_view
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.hooks import TARGET_KEYS
from lightning_rdrop.mixin import RDropMixin
from lightning_rdrop.modules._mean_loss import MeanLoss
from lightning_rdrop.nesting import map_tensors
from lightning_rdrop.optimizer_steps import planned_steps
from lightning_rdrop.predict import mc_predict


class Task(RDropMixin, pl.LightningModule):
    """A network trained with R-Drop and AdamW, and evaluated with torchmetrics as ``val/...`` and ``test/...``.

    Metrics are computed in float32 or better in every precision. With several data loaders each has its own, such as
    ``val/ce/dataloader_idx_0``.

    For another optimizer or schedule use the CLI's ``--optimizer`` and ``--lr_scheduler``, or override
    ``configure_optimizers``.

    Args:
        network: called with the inputs of a batch; returns predictions, or an object with ``.logits``.
        metrics: metrics of validation and test, besides the task loss. ``None`` if :meth:`set_metrics` sets them later.
        learning_rate: of AdamW; with ``warmup`` its peak.
        weight_decay: of AdamW.
        warmup: increase the learning rate linearly from 0 over the warmup, then decrease it linearly to 0 at the end of
            training. An int is a number of optimizer steps, a float in [0, 1] a share of the training. ``None`` keeps
            it constant.
        mc_passes: predict with the model average over this many dropout passes, >= 2, and return its
            :class:`~lightning_rdrop.MCPrediction`; 0 is one pass with dropout off.
        rdrop: the arguments of :class:`~lightning_rdrop.RDropMixin`.

    Raises:
        ValueError: ``warmup`` out of range, or without a limit on epochs or steps; ``mc_passes`` out of range, or for a
            module that predicts no distribution.
    """

    rdrop_unsaved = (*RDropMixin.rdrop_unsaved, "network", "metrics")
    network: nn.Module
    val_metrics: MetricCollection
    test_metrics: MetricCollection
    not_averageable: ClassVar[str | None] = None
    """What the module predicts if it cannot be averaged, such as texts."""

    def __init__(
        self,
        network: nn.Module | None,
        metrics: MetricCollection | None,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: int | float | None = None,
        mc_passes: int = 0,
        **rdrop: Any,
    ) -> None:
        super().__init__(**rdrop)
        later = [name for name, given in (("network", network), ("metrics", metrics)) if given is None]
        self.save_hyperparameters(ignore=later)  # a subclass that makes them has no such arguments
        if mc_passes != 0:
            mc_passes = whole("mc_passes", mc_passes, 2, ", or 0 for a single pass")
        if mc_passes and self.not_averageable:
            raise ValueError(
                f"mc_passes={mc_passes} averages predictions, but {type(self).__name__} predicts "
                f"{self.not_averageable}. Leave mc_passes out."
            )
        self.register_module("network", network)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = None if warmup is None else duration("warmup", warmup)
        self.mc_passes = mc_passes
        self.set_metrics(MetricCollection({}) if metrics is None else metrics)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "rdrop_distance":  # passed, assigned by a subclass, or rebuilt from a checkpoint
            self.val_loss = MeanLoss(value, prefix="val/").to(self.device)
            self.test_loss = MeanLoss(value, prefix="test/").to(self.device)

    def set_metrics(self, metrics: MetricCollection) -> None:
        """Set the metrics of validation and test."""
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            start_evaluation(self.val_metrics, self.val_loss)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            start_evaluation(self.test_metrics, self.test_loss)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, self.test_metrics, self.test_loss)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The prediction for a batch with or without targets; an ``MCPrediction`` with ``mc_passes``."""
        if isinstance(batch, (tuple, list)) and len(batch) == 1:  # of a TensorDataset
            (batch,) = batch
        targetless = isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS)
        bare = isinstance(batch, Tensor) or targetless
        inputs = batch if bare else first_view(self.rdrop_unpack(batch)[0])
        return mc_predict(self, inputs, self.mc_passes) if self.mc_passes else self.rdrop_predict(inputs)

    def readable(self, prediction: Any, *, all_probabilities: bool = False) -> list[dict[str, Any]]:
        """Hook: convert the output of ``predict_step`` to table cells, a mapping for each example.

        ``"prediction"`` is human-readable: the name of a class, a number, a text. Classifiers add its
        ``"probability"``.

        Args:
            prediction: of N examples, on the CPU.
            all_probabilities: add ``"probabilities"``, those of all classes by name.

        Raises:
            TypeError: the prediction cannot be converted.
        """
        return one_each(prediction, type(self).__name__)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            (parameter for parameter in self.parameters() if parameter.requires_grad),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        if self.warmup is None:
            return optimizer
        steps = planned_steps(self.trainer)
        if not steps:
            raise ValueError(
                f"warmup={self.warmup} decays the learning rate until the end of training, but its number of steps is "
                "unknown. Set the Trainer's max_epochs or max_steps (in manual optimization only max_epochs), or leave "
                "warmup out."
            )
        rise = self.warmup if isinstance(self.warmup, int) else self.warmup * steps
        factor = partial(warmup_and_decay, rise=rise, steps=steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Any, target: Any) -> None:
        """Hook: update the metrics with the prediction for a batch."""
        metrics.update(prediction, target)

    def evaluate(self, batch: Any, metrics: MetricCollection, loss: MeanLoss) -> None:
        """Log the task loss and the metrics of a batch in validation or test.

        Row weights (see :class:`~lightning_rdrop.Weighted`) apply to the loss, not to the metrics.
        """
        inputs, target = self.rdrop_unpack(batch)
        prediction = self.rdrop_predict(first_view(inputs))
        loss.add_batch(self.rdrop_distance, prediction, target)
        prediction = map_tensors(prediction, at_least_float32)
        self.measure(metrics, batch, prediction, self.rdrop_distance.unwrapped_target(target))
        examples = len(views.first_tensor(target))
        self.log_dict(loss, batch_size=examples)
        self.log_dict(metrics, batch_size=examples, prog_bar=metrics is self.val_metrics)


def start_evaluation(*collections: MetricCollection) -> None:
    """Prepare metrics for the batches of one data loader.

    An interrupted evaluation or the previous loader may have left states, and true half precision casts them to a dtype
    in which sums soon stop growing.
    """
    for metrics in collections:
        for metric in metrics.modules():
            if isinstance(metric, Metric) and any(map(_is_half, metric.metric_state.values())):
                metric.to(torch.float32)
        metrics.reset()


def _is_half(state: Any) -> bool:
    return isinstance(state, Tensor) and state.dtype in (torch.float16, torch.bfloat16)


def warmup_and_decay(step: int, rise: float, steps: int) -> float:
    r"""The learning rate relative to its peak: :math:`s / r` up to step r, then :math:`(S - s) / (S - r)`.

    Args:
        step: s, the number of optimizer steps so far.
        rise: r, the number of warmup steps.
        steps: S, the number of steps of the training.

    Source: Devlin et al., BERT, 2019 (arXiv 1810.04805), appendix A.

    Example:
        >>> [warmup_and_decay(step, rise=2, steps=6) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return step / rise if step < rise else max(0.0, steps - step) / max(1.0, steps - rise)


def one_each(prediction: Any, owner: str) -> list[dict[str, Any]]:
    """Split the predictions of a batch into a ``{"prediction": ...}`` for each example.

    Args:
        prediction: a tensor (N, ...), or a list of N texts or numbers.
        owner: the module's class, for the message.

    Raises:
        TypeError: the prediction is of another type.

    Example:
        >>> one_each(torch.tensor([0.5, 2.0]), "Regressor")
        [{'prediction': 0.5}, {'prediction': 2.0}]
    """
    if isinstance(prediction, Tensor) and prediction.dim():
        prediction = prediction.tolist()
    if not isinstance(prediction, (list, tuple)):
        raise TypeError(
            f"{owner}.predict_step returned a {type(prediction).__name__}, not one prediction for each example. "
            "Define readable(self, prediction, *, all_probabilities) and return a list of mappings."
        )
    return [{"prediction": one} for one in prediction]
