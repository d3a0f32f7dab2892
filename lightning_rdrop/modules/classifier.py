"""Single-label classification with any network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lightning_rdrop.divergence import log_probabilities
from lightning_rdrop.modules.task import Task


class Classifier(Task):
    """Classification of examples, or of tokens, with any network that returns logits.

    Validation and test log the cross-entropy, the accuracy, the macro F1 and Matthews' correlation over the rows whose
    target is not -100; prediction returns class probabilities.

    Args:
        network: returns logits (N, ..., C) for the inputs of a batch.
        num_classes: C.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        >>> module = Classifier(network, num_classes=3, rdrop_alpha=4.0)
        >>> module.eval().predict_step(torch.randn(5, 8), 0).shape  # probabilities
        torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, num_classes: int, **kwargs: Any) -> None:
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=-100),
                "f1": MulticlassF1Score(num_classes, average="macro", ignore_index=-100),
                "matthews": MulticlassMatthewsCorrCoef(num_classes, ignore_index=-100),
            }
        )
        super().__init__(network, metrics, **kwargs)

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Tensor, target: Tensor) -> None:
        metrics.update(prediction.flatten(0, -2), target.flatten())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities, (N, ..., C)."""
        logits: Tensor = super().predict_step(batch, batch_idx)
        return log_probabilities(logits).exp()
