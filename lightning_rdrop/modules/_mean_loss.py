"""The task loss averaged over all rows of an evaluation."""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import Any

from torchmetrics import MeanMetric, MetricCollection

from lightning_rdrop.distance import Distance, Together


class MeanLoss(MetricCollection):
    """Mean of D to the target over all rows; for several predictions, the mean of each and their weighted sum.

    Args:
        distance: D, which also names the metric.
        prefix: of that name.

    Example:
        >>> from torch import tensor
        >>> from lightning_rdrop import Gaussian
        >>> distance = Together({"width": Gaussian(), "height": Gaussian()}, weights={"height": 0.5})
        >>> loss = MeanLoss(distance, prefix="val/")
        >>> for x in (tensor([1.0, 2.0]), tensor([3.0])):
        ...     loss.add_batch(distance, {"width": 0 * x, "height": x}, {"width": x, "height": 0 * x})
        >>> loss.compute()  # (1 + 4 + 9) / 3, and 1.5 times that
        {'val/ce': tensor(7.), 'val/height_mse': tensor(4.6667), 'val/width_mse': tensor(4.6667)}
    """

    def __init__(self, distance: Distance, prefix: str) -> None:
        super().__init__(_means(distance), prefix=prefix, compute_groups=False)

    def add_batch(self, distance: Distance, prediction: Any, target: Any) -> None:
        """Update with the rows of a batch.

        Args:
            distance: as in ``__init__``; not stored here, because its parameters belong to the module.
            prediction, target: arguments of the distance.
        """
        self._add(distance, prediction, target, "")

    def _add(self, distance: Distance, prediction: Any, target: Any, name: str) -> None:
        if isinstance(distance, Together):
            distance.check_names(prediction, target)
            for part in distance.distances:
                self._add(distance.part(part), prediction[part], target[part], f"{name}{part}_")
        else:
            average = distance.to_target(prediction, target)
            self[f"{name}{distance.term_names[0]}"].update(average.mean, average.weight)


def _means(distance: Distance) -> dict[str, Any]:
    """A metric for the task loss, which comes first, and one for that of each part."""
    term = distance.term_names[0]
    if not isinstance(distance, Together):
        # weighted by rows, so exact for batches of any size; MeanMetric skips NaN by default
        return {term: MeanMetric(nan_strategy=math.nan)}
    parts = {name: _means(distance.part(name)) for name in distance.distances}
    total = reduce(operator.add, (distance.weights[name] * next(iter(parts[name].values())) for name in parts))
    return {term: total} | {f"{name}_{key}": mean for name, means in parts.items() for key, mean in means.items()}
