"""How often the predicted class changes from one dropout pass to another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop.distance import Distance
from lightning_rdrop.metrics.row_means import RowMeans, Rows, checked_passes, one_distance
from lightning_rdrop.terms import Average


def dropout_disagreement(predictions: Tensor, target: Any = None, distance: Distance | None = None) -> Tensor:
    r"""How often two dropout passes predict different classes.

    .. math::
        \operatorname*{mean}_{n,\,j<k} \left[ \hat y_{jn} \ne \hat y_{kn} \right], \qquad
        \hat y_{kn} = \operatorname*{argmax}_c p_{knc}

    Args:
        predictions: of K >= 2 passes, (K, N, ...).
        target: (N, ...), or what the distance takes; only tells which rows count; all if not given.
        distance: how to read predictions; ``None`` is :class:`~lightning_rdrop.Categorical`. For
            :class:`~lightning_rdrop.Bernoulli` a row is a label, with the classes 0 and 1.

    Returns:
        a share of rows and pairs of passes, in [0, 1].

    Raises:
        ValueError: a single pass, or shapes that do not match.
        TypeError: ``distance`` has no classes.

    Example:
        >>> from torch import tensor
        >>> passes = tensor([[[2.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 1.0]]])
        >>> dropout_disagreement(passes)  # never in the first row, in two of three pairs in the second
        tensor(0.3333)
    """
    return disagreement_average(predictions, target, distance).mean


def disagreement_average(predictions: Tensor, target: Any = None, distance: Distance | None = None) -> Average:
    """The average whose mean :func:`dropout_disagreement` returns."""
    rows = Rows.read(one_distance(distance), checked_passes(predictions), target)
    classes = rows.log_p.argmax(-1)
    count = len(classes)
    differ = (classes.unsqueeze(1) != classes).sum((0, 1)) / (count * (count - 1))
    return rows.mean(differ.to(rows.log_p.dtype))


class DropoutDisagreement(RowMeans):
    """How often two dropout passes predict different classes; see :func:`dropout_disagreement`.

    ``compute`` returns the mean over all rows that count in all batches and ranks.

    Args:
        distance: how to read predictions; ``None`` is :class:`~lightning_rdrop.Categorical`.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Shapes:
        ``update`` takes predictions (K, N, ..., C), K >= 2, and a target (N, ...), or what the distance takes.

    Raises:
        TypeError: ``distance`` has no classes.

    Example:
        >>> from torch import tensor
        >>> metric = DropoutDisagreement()
        >>> metric.update(tensor([[[0.6, 0.4]], [[0.4, 0.6]]]).log())
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, distance: Distance | None = None, **kwargs: Any) -> None:
        super().__init__(["dropout_disagreement"], distance, **kwargs)
        if not self.distance.unwrapped.implements("log_probabilities"):
            raise TypeError(f"DropoutDisagreement needs a distance with classes, got {self.distance!r}.")

    def update(self, predictions: Tensor, target: Any = None) -> None:
        """Add K predictions of the rows of a batch."""
        self.add({"dropout_disagreement": disagreement_average(predictions, target, self.distance)})

    def compute(self) -> Tensor:  # type: ignore[override]  # a single value
        """The mean; NaN if no row counted."""
        return super().compute()["dropout_disagreement"]
