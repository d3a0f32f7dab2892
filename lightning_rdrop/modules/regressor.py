"""Regression with any network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef

from lightning_rdrop.distance import Distance, Gaussian
from lightning_rdrop.modules.task import Task
from lightning_rdrop.predict import MCPrediction


class Regressor(Task):
    """Regression with any network, by least squares or with a predicted variance.

    Validation and test log the mean squared error (or the negative log-likelihood), the mean absolute error, and the
    Pearson and Spearman correlations, over all entries of the targets together.

    Args:
        network: returns a prediction of the target's shape, (N,) or (N, D); (N, ..., 2), mean and log-variance, for
            ``Gaussian(log_variance=True)``.
        rdrop_distance: ``None`` is :class:`~lightning_rdrop.Gaussian`.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`.

    Example:
        >>> import torch
        >>> module = Regressor(nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 1), nn.Flatten(0)))
        >>> terms = module.rdrop_step((torch.randn(5, 8), torch.randn(5)))
        >>> module.rdrop_distance.term_names, bool(terms.kl > 0)
        (('mse', 'kl'), True)
    """

    def __init__(self, network: nn.Module, *, rdrop_distance: Distance | None = None, **kwargs: Any) -> None:
        metrics = MetricCollection(
            {"mae": MeanAbsoluteError(), "pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()}
        )
        super().__init__(network, metrics, rdrop_distance=rdrop_distance or Gaussian(), **kwargs)

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Tensor, target: Tensor) -> None:
        distance = self.rdrop_distance.unwrapped
        mean = distance.expectation(prediction) if distance.implements("expectation") else prediction
        counted = distance.counted(prediction, target)
        if counted is not None:
            mean, target = mean[counted], target[counted]
        if target.numel():
            metrics.update(mean.float().flatten(), target.float().flatten())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | MCPrediction:
        """The mean of each example.

        Mean and log-variance (N, ..., 2) with ``Gaussian(log_variance=True)``; an ``MCPrediction`` with ``mc_passes``.
        """
        prediction: Tensor | MCPrediction = super().predict_step(batch, batch_idx)
        distance = self.rdrop_distance.unwrapped
        whole = isinstance(prediction, MCPrediction) or getattr(distance, "log_variance", False)
        return prediction if whole or not distance.implements("expectation") else distance.expectation(prediction)

    def readable(self, prediction: Tensor, *, all_probabilities: bool = False) -> list[dict[str, Any]]:
        if not getattr(self.rdrop_distance.unwrapped, "log_variance", False):
            return super().readable(prediction)
        means, log_variances = prediction.unbind(-1)
        pairs = zip(means.tolist(), log_variances.tolist(), strict=True)
        return [{"prediction": mean, "log_variance": log_variance} for mean, log_variance in pairs]
