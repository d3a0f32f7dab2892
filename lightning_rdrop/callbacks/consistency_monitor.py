"""Monitor in validation how dropout affects the predictions of a network."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_rdrop._lightning import Callback, is_dry_run
from lightning_rdrop.arguments import whole
from lightning_rdrop.callbacks._require import require_rdrop
from lightning_rdrop.data_views import first_view
from lightning_rdrop.distance import Distance, Together
from lightning_rdrop.metrics.average_gap import gap_averages
from lightning_rdrop.metrics.dropout_disagreement import disagreement_average
from lightning_rdrop.metrics.dropout_kl import kl_averages
from lightning_rdrop.nesting import copied, tensors_of
from lightning_rdrop.predict import dropout_passes, refuse_embeddings
from lightning_rdrop.probe import without_side_effects
from lightning_rdrop.terms import Average

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer

LOGGED = (
    "dropout_kl",
    "dropout_kl_target",
    "dropout_kl_others",
    "dropout_disagreement",
    "average_gap",
    "average_gain",
)
"""What the monitor logs, with the prefix ``val/``."""


class ConsistencyMonitor(Callback):
    r"""Measures in validation what R-Drop minimizes: the divergence of dropout passes, and the gap that results.

    Each validation batch is predicted K times with dropout on, and once with dropout off. Logged as means over all rows
    of all batches and ranks are

    - ``val/dropout_kl``, the consistency on the scale of ``train/kl``, so that the two can be compared; and its parts
      ``val/dropout_kl_target`` and ``val/dropout_kl_others`` (see :func:`~lightning_rdrop.metrics.dropout_kl`),
    - ``val/dropout_disagreement``, how often two passes predict different classes,
    - ``val/average_gap``, the KL of the model average to the weight average, and ``val/average_gain``, the accuracy of
      the model average minus that of the weight average (see :func:`~lightning_rdrop.metrics.average_gap`).

    Rows count as in ``train/kl``, with their weight or mask if the target has one. If the distance has no classes,
    metrics that need them are left out. Several predictions by name are measured separately, such as
    ``val/intent_dropout_kl``. With ``rdrop_views=1`` it shows the gap that plain training leaves.

    Training with the monitor is bitwise equal to training without: modes, buffers and random states are restored. It
    costs K + 1 forward passes of each monitored batch. (On a CPU, a pass with dropout may take twice the time of one
    without.) If the training has no monitored validation, a warning says so.

    Args:
        passes: K >= 2.
        every_n_epochs: it runs in every validation of each n-th training epoch, and in ``trainer.validate``.
        batches: the validation batches to use: a float in (0, 1] is a share, spread evenly; an int is the number of
            first batches.

    Raises:
        ValueError: an argument out of range, or ``FSDPStrategy``, which gathers weights only in its own steps.
        TypeError: a module without ``RDropMixin``, or one that learns embeddings by SimCSE.

    Source: Su Jianlin, spaces.ac.cn/archives/8496, for the explanation measured here.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[ConsistencyMonitor(passes=8, batches=0.25)], logger=False)
    """

    def __init__(self, passes: int = 8, every_n_epochs: int = 1, batches: int | float = 1.0) -> None:
        super().__init__()
        real = isinstance(batches, Real) and not isinstance(batches, bool)
        number = real and (isinstance(batches, Integral) or (batches > 1 and float(batches).is_integer()))
        if not real or not (batches >= 1 if number else 0 < batches <= 1):
            raise ValueError(
                f"batches must be a share, a float in (0, 1], or a number of batches, an int >= 1, got {batches!r}."
            )
        self.passes = whole("passes", passes, least=2)
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs)
        self.batches = int(batches) if number else float(batches)
        self._modules: list[nn.Module] = []
        self._training: list[bool] = []
        self._warned = False
        self._measured = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a module whose predictions cannot be measured, and a strategy that prevents predictions."""
        refuse_embeddings("ConsistencyMonitor", require_rdrop(self, pl_module))
        if any(base.__name__ == "FSDPStrategy" for base in type(trainer.strategy).__mro__):  # of either distribution
            raise ValueError(
                "ConsistencyMonitor predicts outside of validation_step, where the weights of FSDPStrategy are not "
                "gathered: train with DDP or ModelParallelStrategy (FSDP2), or without the monitor."
            )
        self._modules, self._training, self._warned, self._measured = [], [], False, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the modes of training, since all modules are in eval mode in validation."""
        if batch_idx == 0 or not self._modules:
            self._modules = list(pl_module.modules())  # again in each epoch: a module may have been replaced
        self._training = [module.training for module in self._modules]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Predict the batch with dropout on and off, and log the metrics."""
        if not self._monitors(trainer, batch_idx):
            return
        module = require_rdrop(self, pl_module)
        training = dict(zip(self._modules, self._training, strict=True)) if self._modules else None
        batch = copied(batch)  # rdrop_unpack may change what validation_step needs
        with trainer.precision_plugin.val_step_context(), without_side_effects(module, module.device):
            module.eval()  # own hooks may keep dropout on in validation
            inputs, target = module.rdrop_unpack(batch)
            inputs = first_view(inputs)
            prediction = module.rdrop_predict(copied(inputs))
            predictions = dropout_passes(module, inputs, self.passes, training=training)
        if not trainer.sanity_checking:  # which does not know the training modes yet
            self._measured = True
            self._warn_of_equal_passes(module, predictions)
        for name, average in _averages(module.rdrop_distance, predictions, prediction, target).items():
            rows: Any = average.weight  # a tensor, to avoid a synchronization
            module.log(f"val/{name}", average.mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing was measured."""
        if trainer.is_global_zero and not self._measured and not is_dry_run(trainer):
            warnings.warn(
                "ConsistencyMonitor measured nothing: there was no validation in an epoch that it monitors "
                f"(every_n_epochs={self.every_n_epochs}). Add a validation_step to {type(pl_module).__name__} and pass "
                "validation data to fit, or remove this callback.",
                stacklevel=2,
            )

    def _monitors(self, trainer: Trainer, batch_idx: int) -> bool:
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs:
            return trainer.sanity_checking  # to find errors before training
        if isinstance(self.batches, int):
            return batch_idx < self.batches
        return math.floor(batch_idx * self.batches) > math.floor((batch_idx - 1) * self.batches)

    def _warn_of_equal_passes(self, module: nn.Module, predictions: Any) -> None:
        if self._warned:
            return
        self._warned = True  # or found that no warning is needed
        if all(bool((tensor == tensor[:1]).all()) for _, tensor in tensors_of(predictions) if tensor.dim()):
            warnings.warn(
                f"ConsistencyMonitor: the {self.passes} dropout passes of {type(module).__name__} are all the same, so "
                "there is no gap to measure. It has no dropout with p > 0, or none in training mode: see "
                "lightning_rdrop.dropout.as_table(module).",
                stacklevel=3,
            )


def _averages(distance: Distance, predictions: Any, weight_average: Any, target: Any) -> dict[str, Average]:
    """The values logged for one batch, by name."""
    if isinstance(distance, Together):
        return {
            f"{part}_{name}": average
            for part in distance.weights
            for name, average in _averages(
                distance.part(part), predictions[part], weight_average[part], target[part]
            ).items()
        }
    found, unwrapped = kl_averages(predictions, target, distance), distance.unwrapped
    if unwrapped.has_classes:
        found["dropout_disagreement"] = disagreement_average(predictions, target, distance)
    if unwrapped.implements("model_average"):
        found |= gap_averages(predictions, weight_average, target, distance)
    return {name: average for name, average in found.items() if name in LOGGED}
