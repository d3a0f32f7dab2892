"""Single-label classification with any network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lightning_rdrop.divergence import log_probabilities
from lightning_rdrop.modules._classes import ClassTask
from lightning_rdrop.predict import MCPrediction


class Classifier(ClassTask):
    """Classification of examples, or of tokens, with any network that returns logits.

    Validation and test log the cross-entropy, the accuracy, the macro F1 and the Matthews correlation over the rows
    that the distance counts, by default all but -100; prediction returns class probabilities.

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

    def __init__(self, network: nn.Module, num_classes: int | None = None, **kwargs: Any) -> None:
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
        distance = self.rdrop_distance.unwrapped
        if distance.has_classes:
            counted, target = distance.counted(prediction, target), distance.target_class(prediction, target)
            target = target if counted is None else target.where(counted, -100)
            prediction = distance.log_probabilities(prediction)
        metrics.update(prediction.flatten(0, -2), target.flatten())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | MCPrediction:
        """Class probabilities, in the layout of the logits; an ``MCPrediction`` with ``mc_passes``."""
        prediction: Tensor | MCPrediction = super().predict_step(batch, batch_idx)
        if isinstance(prediction, MCPrediction):
            return prediction
        distance = self.rdrop_distance.unwrapped
        if distance.implements("expectation"):
            return distance.expectation(prediction)
        return log_probabilities(prediction).exp()

    def readable(self, prediction: Tensor, *, all_probabilities: bool = False) -> list[dict[str, Any]]:
        prediction = prediction.movedim(getattr(self.rdrop_distance.unwrapped, "class_dim", -1), -1)
        names = self.classes or [str(index) for index in range(prediction.shape[-1])]
        best = prediction.max(-1)
        indices, values = best.indices.tolist(), best.values.tolist()
        rows = [{"prediction": _named(one, names), "probability": p} for one, p in zip(indices, values, strict=True)]
        if all_probabilities:
            for row, probabilities in zip(rows, prediction.tolist(), strict=True):
                row["probabilities"] = _by_name(probabilities, names)
        return rows


def _named(index: Any, names: list[str]) -> Any:
    """The class name of an index, or a nested list of names for a nested list of indices."""
    return [_named(one, names) for one in index] if isinstance(index, list) else names[index]


def _by_name(probabilities: list[Any], names: list[str]) -> Any:
    if isinstance(probabilities[0], list):
        return [_by_name(one, names) for one in probabilities]
    return dict(zip(names, probabilities, strict=True))
