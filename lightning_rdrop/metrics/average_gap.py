"""The gap between the model average, which dropout trains, and the weight average, which inference uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop.distance import Distance
from lightning_rdrop.divergence import kl
from lightning_rdrop.metrics.row_means import RowMeans, Rows, checked_passes, one_distance
from lightning_rdrop.terms import Average


def average_gap(
    predictions: Tensor, weight_average: Tensor, target: Any = None, distance: Distance | None = None
) -> dict[str, Tensor]:
    r"""The gap between the model average and the weight average, and the quality of both.

    .. math::
        \text{gap} = \operatorname*{mean}_n KL(\bar p_n \| q_n), \qquad \bar p_n = \operatorname*{mean}_k p_{kn}

    Dropout trains the model average :math:`\bar p`, the mean of the probabilities under all masks, of which K passes
    are a sample. The weight average q is the prediction with dropout off. Sampling overestimates the gap by about
    ``dropout_kl`` / K, so compare gaps with the same K.

    Args:
        predictions: of K >= 2 dropout passes, (K, N, ...).
        weight_average: the prediction of the same rows with dropout off, (N, ...).
        target: (N, ...), or what the distance takes; if not given, all rows count and only the gap is returned.
        distance: how to read predictions; ``None`` is :class:`~lightning_rdrop.Categorical`. For
            :class:`~lightning_rdrop.Bernoulli` a row is a label. A distance with an average but no classes, such as
            :class:`~lightning_rdrop.Gaussian`, measures the gap and the task loss with its D.

    Returns:
        ``average_gap``, nats per row; ``average_gain``, the accuracy of the model average minus that of the weight
        average; ``model_average_accuracy`` and ``weight_average_accuracy``; ``model_average_nll`` and
        ``weight_average_nll``, their negative log-likelihoods. Without classes, accuracies and gain are missing, and
        the task loss replaces the likelihood (``model_average_mse``).

    Raises:
        ValueError: a single pass, or shapes that do not match.
        TypeError: ``distance`` cannot average predictions, or is for several predictions by name.

    Source: Su Jianlin, spaces.ac.cn/archives/8496.

    Example:
        >>> from torch import tensor
        >>> passes = tensor([[[0.9, 0.1]], [[0.3, 0.7]]]).log()  # their average is (0.6, 0.4)
        >>> gap = average_gap(passes, tensor([[0.4, 0.6]]).log(), tensor([0]))
        >>> gap["average_gap"], gap["average_gain"]  # 0.2 ln 1.5, and 1 - 0
        (tensor(0.0811), tensor(1.))
    """
    averages = gap_averages(predictions, weight_average, target, distance)
    return {name: average.mean for name, average in averages.items()}


def gap_averages(
    predictions: Tensor, weight_average: Tensor, target: Any = None, distance: Distance | None = None
) -> dict[str, Average]:
    """The averages whose means :func:`average_gap` returns."""
    distance = one_distance(distance)
    if checked_passes(predictions).shape[1:] != weight_average.shape:
        raise ValueError(
            f"weight_average must have the shape of one pass, {tuple(predictions.shape[1:])}, got "
            f"{tuple(weight_average.shape)}."
        )
    unwrapped = distance.unwrapped
    average = unwrapped.model_average(predictions)
    if not unwrapped.has_classes:
        found = {"average_gap": distance.directed(average, weight_average, target)}
        if target is not None:
            task = distance.term_names[0]
            found[f"model_average_{task}"] = distance.to_target(average, target)
            found[f"weight_average_{task}"] = distance.to_target(weight_average, target)
        return found
    rows = Rows.read(distance, predictions, target)
    both = {
        "model_average": unwrapped.log_probabilities(average),
        "weight_average": unwrapped.log_probabilities(weight_average),
    }
    found = {"average_gap": rows.mean(kl(both["model_average"], both["weight_average"]))}
    if rows.target is None:
        return found
    right = {name: (log_p.argmax(-1) == rows.target).to(log_p.dtype) for name, log_p in both.items()}
    found["average_gain"] = rows.mean_of_known(right["model_average"] - right["weight_average"])
    for name, log_p in both.items():
        found[f"{name}_accuracy"] = rows.mean_of_known(right[name])
        found[f"{name}_nll"] = rows.mean_of_known(-log_p.gather(-1, rows.target.unsqueeze(-1)).squeeze(-1))
    return found


class AverageGap(RowMeans):
    """The gap between the model average and the weight average, and the quality of both.

    See :func:`average_gap` for the formula and the values that ``compute`` returns, as means over all rows that count
    in all batches and ranks.

    Args:
        distance: how to read predictions; ``None`` is :class:`~lightning_rdrop.Categorical`.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Shapes:
        ``update`` takes predictions (K, N, ..., C), K >= 2, the weight average (N, ..., C), and a target (N, ...), or
        what the distance takes.

    Raises:
        TypeError: ``distance`` cannot average predictions.

    Example:
        >>> from torch import tensor
        >>> metric = AverageGap()
        >>> metric.update(tensor([[[0.9, 0.1]], [[0.3, 0.7]]]).log(), tensor([[0.4, 0.6]]).log(), tensor([0]))
        >>> metric.compute()["model_average_nll"]  # -ln 0.6
        tensor(0.5108)
    """

    def __init__(self, distance: Distance | None = None, **kwargs: Any) -> None:
        distance = one_distance(distance)
        if not distance.unwrapped.implements("model_average"):
            raise TypeError(f"AverageGap needs a distance that can average predictions, got {distance!r}.")
        both, names = ("model_average", "weight_average"), ["average_gap"]
        if distance.unwrapped.has_classes:
            names += ["average_gain", *(f"{one}_{what}" for one in both for what in ("accuracy", "nll"))]
        else:
            names += [f"{one}_{distance.term_names[0]}" for one in both]
        super().__init__(names, distance, **kwargs)

    def update(self, predictions: Tensor, weight_average: Tensor, target: Any = None) -> None:
        """Add K dropout predictions of the rows of a batch, and the prediction with dropout off."""
        self.add(gap_averages(predictions, weight_average, target, self.distance))
