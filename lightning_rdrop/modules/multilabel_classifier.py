"""Multi-label classification with any network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAccuracy, MultilabelF1Score

from lightning_rdrop.distance import Bernoulli, Distance
from lightning_rdrop.modules._classes import ClassTask
from lightning_rdrop.predict import MCPrediction


class MultilabelClassifier(ClassTask):
    """Multi-label classification with any network that returns a logit for each label.

    Validation and test log the binary cross-entropy, the accuracy and the macro F1; prediction returns probabilities.

    Args:
        network: returns logits (N, L) for the inputs of a batch; targets are (N, L), 0 or 1.
        num_labels: L; ``None`` takes the number of classes in a
            :class:`~lightning_rdrop.data.MultilabelTextDataModule`.
        rdrop_distance: ``None`` is :class:`~lightning_rdrop.Bernoulli`.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`.

    Example:
        >>> import torch
        >>> module = MultilabelClassifier(nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 4)), num_labels=4)
        >>> terms = module.rdrop_step((torch.randn(5, 8), torch.randint(2, (5, 4))))
        >>> module.rdrop_distance.term_names, bool(terms.kl > 0)
        (('bce', 'kl'), True)
    """

    count_argument = "num_labels"

    def __init__(
        self,
        network: nn.Module,
        num_labels: int | None = None,
        *,
        rdrop_distance: Distance | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, None, rdrop_distance=rdrop_distance or Bernoulli(), **kwargs)
        self.num_labels = num_labels
        if num_labels is not None:
            self.set_count(num_labels)

    def metrics_of(self, count: int) -> MetricCollection:
        return MetricCollection(
            {
                "accuracy": MultilabelAccuracy(count, average="micro", ignore_index=-100),
                "f1": MultilabelF1Score(count, ignore_index=-100),
            }
        )

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Tensor, target: Tensor) -> None:
        distance = self.rdrop_distance.unwrapped
        counted, target = distance.counted(prediction, target), distance.target_class(prediction, target)
        metrics.update(prediction.sigmoid(), target if counted is None else target.where(counted, -100))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | MCPrediction:
        """The probability of each label, (N, L); an ``MCPrediction`` with ``mc_passes``."""
        prediction: Tensor | MCPrediction = super().predict_step(batch, batch_idx)
        if isinstance(prediction, MCPrediction):
            return prediction
        return self.rdrop_distance.unwrapped.expectation(prediction)

    def readable(self, prediction: Tensor, *, all_probabilities: bool = False) -> list[dict[str, Any]]:
        """The classes with a probability above 0.5, and these probabilities."""
        names = self.classes or [str(index) for index in range(prediction.shape[-1])]
        found = []
        for values in prediction.tolist():
            row = dict(zip(names, values, strict=True))
            likely = {name: p for name, p in row.items() if p > 0.5}
            cells = {"prediction": list(likely), "probability": list(likely.values())}
            found.append(cells | {"probabilities": row} if all_probabilities else cells)
        return found
