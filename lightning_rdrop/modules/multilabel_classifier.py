"""Multi-label classification with any network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAccuracy, MultilabelF1Score

from lightning_rdrop.distance import Bernoulli, Distance
from lightning_rdrop.modules.task import Task
from lightning_rdrop.predict import MCPrediction


class MultilabelClassifier(Task):
    """Multi-label classification with any network that returns a logit for each label.

    Validation and test log the binary cross-entropy, the accuracy and the macro F1; prediction returns probabilities.

    Args:
        network: returns logits (N, L) for the inputs of a batch; targets are (N, L), 0 or 1.
        num_labels: L.
        rdrop_distance: ``None`` is :class:`~lightning_rdrop.Bernoulli`.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`.

    Example:
        >>> import torch
        >>> module = MultilabelClassifier(nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 4)), num_labels=4)
        >>> terms = module.rdrop_step((torch.randn(5, 8), torch.randint(2, (5, 4))))
        >>> module.rdrop_distance.term_names, bool(terms.kl > 0)
        (('bce', 'kl'), True)
    """

    def __init__(
        self, network: nn.Module, num_labels: int, *, rdrop_distance: Distance | None = None, **kwargs: Any
    ) -> None:
        metrics = MetricCollection(
            {"accuracy": MultilabelAccuracy(num_labels, average="micro"), "f1": MultilabelF1Score(num_labels)}
        )
        super().__init__(network, metrics, rdrop_distance=rdrop_distance or Bernoulli(), **kwargs)

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Tensor, target: Tensor) -> None:
        metrics.update(prediction.sigmoid(), target.long())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | MCPrediction:
        """The probability of each label, (N, L); an ``MCPrediction`` with ``mc_passes``."""
        prediction: Tensor | MCPrediction = super().predict_step(batch, batch_idx)
        return prediction if isinstance(prediction, MCPrediction) else prediction.float().sigmoid()
