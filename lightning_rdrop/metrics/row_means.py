"""Shared by the metrics: means that are exact across batches and ranks, and how a distance reads the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rdrop import views
from lightning_rdrop.distance import Categorical, Distance, Together
from lightning_rdrop.terms import Average


class RowMeans(Metric):
    """Named means over rows, kept as sums and weights that are added over batches and ranks."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, names: Sequence[str], distance: Distance | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.distance = one_distance(distance)
        self.names = tuple(names)
        for name in names:
            self.add_state(f"{name}_total", torch.tensor(0.0), dist_reduce_fx="sum")
            self.add_state(f"{name}_weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def add(self, averages: Mapping[str, Average]) -> None:
        """Add the rows of a batch."""
        for name, average in averages.items():
            setattr(self, f"{name}_total", getattr(self, f"{name}_total") + average.total.detach())
            setattr(self, f"{name}_weight", getattr(self, f"{name}_weight") + average.weight.detach())

    def compute(self) -> dict[str, Tensor]:
        """The means by name; NaN if no row counted."""
        return {name: getattr(self, f"{name}_total") / getattr(self, f"{name}_weight") for name in self.names}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a single value, or several over the steps, with matplotlib.

        Args:
            val: a value returned by ``compute`` or ``forward``, or a list of them; ``None`` is ``compute()``.
            ax: the axes to plot on; ``None`` is a new figure.

        Returns:
            the figure and its axes.
        """
        return self._plot(val, ax)


@dataclass(frozen=True)
class Rows:
    """K predictions as read by a distance with classes.

    Args:
        log_p: log-probabilities, shape (K, N, ..., C).
        target: class indices, shape (N, ...), 0 in rows that do not count; None if not given.
        counted: shape (N, ...), which rows have a class that counts; None if all do.
        distance: gives each row its weight in the consistency.
        given: the target as the distance takes it.
    """

    log_p: Tensor
    target: Tensor | None
    counted: Tensor | None
    distance: Distance
    given: Any

    @classmethod
    def read(cls, distance: Distance, predictions: Tensor, target: Any) -> Rows:
        """Read predictions (K, N, ...) and a target that the distance takes."""
        unwrapped, count = distance.unwrapped, views.count(predictions)
        log_p: Tensor = views.split(unwrapped.log_probabilities(views.merge(predictions)), count, len(predictions[0]))
        if target is None:
            return cls(log_p, None, None, distance, None)
        truth = distance.unwrapped_target(target)
        counted, classes = unwrapped.counted(predictions[0], truth), unwrapped.target_class(predictions[0], truth)
        return cls(log_p, classes if counted is None else classes.where(counted, 0), counted, distance, target)

    def mean(self, values: Tensor) -> Average:
        """The mean of one value per row, (N, ...), over the rows that count in the consistency."""
        return self.distance.with_row_weights(
            lambda target: Average.of(values, None if target is None else self.counted), self.given
        )

    def mean_of_known(self, values: Tensor) -> Average:
        """The same mean over only those rows that also have a class."""
        return self.distance.with_row_weights(lambda _: Average.of(values, self.counted), self.given)


def one_distance(distance: Distance | None) -> Distance:
    """The distance, :class:`~lightning_rdrop.Categorical` by default.

    Raises:
        TypeError: it is not a distance, or is for several predictions by name.
    """
    if distance is None:
        return Categorical()
    if isinstance(distance, Together):
        raise TypeError(
            f"distance={distance!r} is for several predictions by name, but a metric measures one: create a metric for "
            "each, with distance.part(name)."
        )
    if not isinstance(distance, Distance):
        raise TypeError(f"distance must be a Distance, such as Bernoulli(), or None for Categorical, got {distance!r}.")
    return distance


def checked_passes(predictions: Tensor) -> Tensor:
    """Check that the predictions are of at least two passes, and return them.

    Raises:
        TypeError: they are not a tensor.
        ValueError: they are of a single pass.
    """
    if not isinstance(predictions, Tensor):
        raise TypeError(f"predictions must be a tensor (K, N, ...), got a {type(predictions).__name__}.")
    if predictions.dim() < 2 or len(predictions) < 2:
        raise ValueError(
            f"predictions must be those of K >= 2 dropout passes over the same rows, (K, N, ...), got the shape "
            f"{tuple(predictions.shape)}. Use dropout_passes(module, inputs, passes=8)."
        )
    return predictions
