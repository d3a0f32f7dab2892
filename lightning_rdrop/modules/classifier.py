"""Single-label classification with any network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lightning_rdrop.divergence import log_probabilities
from lightning_rdrop.modules._classes import ClassTask


class Classifier(ClassTask):
    """Classification of examples, or of tokens, with any network that returns logits.

    Validation and test log the cross-entropy, the accuracy, the macro F1 and Matthews' correlation over the rows whose
    target is not -100; prediction returns class probabilities.

    Args:
        network: returns logits (N, ..., C) for the inputs of a batch.
        num_classes: C; ``None`` takes the number of classes in a :class:`~lightning_rdrop.data.TextDataModule`.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        >>> module = Classifier(network, num_classes=3, rdrop_alpha=4.0)
        >>> module.eval().predict_step(torch.randn(5, 8), 0).shape  # probabilities
        torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module | None, num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(network, None, **kwargs)
        self.num_classes = num_classes
        if num_classes is not None:
            self.set_count(num_classes)

    def metrics_of(self, count: int) -> MetricCollection:
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro", ignore_index=-100),
                "f1": MulticlassF1Score(count, average="macro", ignore_index=-100),
                "matthews": MulticlassMatthewsCorrCoef(count, ignore_index=-100),
            }
        )

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Tensor, target: Tensor) -> None:
        metrics.update(prediction.flatten(0, -2), target.flatten())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities, (N, ..., C)."""
        logits: Tensor = super().predict_step(batch, batch_idx)
        return log_probabilities(logits).exp()

    def readable(self, prediction: Tensor) -> list[dict[str, Any]]:
        return [self._named(probabilities) for probabilities in prediction.float()]

    def _named(self, probabilities: Tensor) -> dict[str, Any]:
        if probabilities.dim() > 1:  # a class for each of several tokens
            tokens = [self._named(one) for one in probabilities]
            return {column: [token[column] for token in tokens] for column in tokens[0]}
        names = self.classes or [str(index) for index in range(len(probabilities))]
        best = int(probabilities.argmax())
        values = probabilities.tolist()
        return {
            "prediction": names[best],
            "probability": values[best],
            "probabilities": dict(zip(names, values, strict=True)),
        }
