"""How far the model average, which dropout trains, is from the weight average, which is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop.distance import Distance
from lightning_rdrop.divergence import kl
from lightning_rdrop.metrics.row_means import RowMeans, Rows, one_distance, several
from lightning_rdrop.terms import Average


def average_gap(
    predictions: Tensor, weight_average: Tensor, target: Any = None, distance: Distance | None = None
) -> dict[str, Tensor]:
    r"""How far the model average is from the weight average, and how well each of them does.

    .. math::
        \text{gap} = \operatorname*{mean}_n KL(\bar p_n \| q_n), \qquad \bar p_n = \operatorname*{mean}_k p_{kn}

    Dropout trains the model average :math:`\bar p`, the mean of the probabilities under all masks, of which K passes
    are a sample. The weight average q is the prediction with dropout off. A sample makes the gap larger than it is, by
    about ``dropout_kl`` / K, so compare gaps of the same K.

    Args:
        predictions: of K >= 2 dropout passes, (K, N, ...).
        weight_average: the prediction of the same rows with dropout off, (N, ...).
        target: (N, ...), or what the distance takes; without it all rows count, and the gap is all there is.
        distance: how to read them; ``None`` is :class:`~lightning_rdrop.Categorical`. For
            :class:`~lightning_rdrop.Bernoulli` a row is a label. One that knows an average but no classes, such as
            :class:`~lightning_rdrop.Gaussian`, measures the gap and the task loss by its D.

    Returns:
        ``average_gap``, nats per row; ``average_gain``, the accuracy of the model average minus that of the weight
        average; ``model_average_accuracy`` and ``weight_average_accuracy``; ``model_average_nll`` and
        ``weight_average_nll``, their negative log-likelihoods. Without classes there is no accuracy and no gain, and
        the likelihood has the name of the task loss (``model_average_mse``).

    Raises:
        ValueError: a single pass, or shapes that do not match.
        TypeError: ``distance`` knows no average of predictions, or is one of several predictions by name.

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
    """What :func:`average_gap` is the means of."""
    distance = one_distance(distance)
    if several(predictions).shape[1:] != weight_average.shape:
        raise ValueError(
            f"weight_average must have the shape of one pass, {tuple(predictions.shape[1:])}, got "
            f"{tuple(weight_average.shape)}."
        )
    reader = distance.reader
    average = reader.model_average(predictions)
    if not reader.reads("log_probabilities", "target_class"):
        found = {"average_gap": distance.directed(average, weight_average, target)}
        if target is not None:
            task = distance.term_names[0]
            found[f"model_average_{task}"] = distance.to_target(average, target)
            found[f"weight_average_{task}"] = distance.to_target(weight_average, target)
        return found
    rows = Rows.read(distance, predictions, target)
    both = {
        "model_average": reader.log_probabilities(average),
        "weight_average": reader.log_probabilities(weight_average),
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
    """How far the model average is from the weight average, and how well each of them does.

    See :func:`average_gap` for the formula and for what ``compute`` returns, means over all rows that counted in any
    batch on any rank.

    Args:
        distance: how to read predictions; ``None`` is :class:`~lightning_rdrop.Categorical`.
        kwargs: those of :class:`torchmetrics.Metric`.

    Shapes:
        ``update`` takes predictions (K, N, ..., C), K >= 2, the weight average (N, ..., C), and a target (N, ...), or
        what the distance takes.

    Raises:
        TypeError: ``distance`` knows no average of predictions.

    Example:
        >>> from torch import tensor
        >>> metric = AverageGap()
        >>> metric.update(tensor([[[0.9, 0.1]], [[0.3, 0.7]]]).log(), tensor([[0.4, 0.6]]).log(), tensor([0]))
        >>> metric.compute()["model_average_nll"]  # -ln 0.6
        tensor(0.5108)
    """

    def __init__(self, distance: Distance | None = None, **kwargs: Any) -> None:
        distance = one_distance(distance)
        if not distance.reader.reads("model_average"):
            raise TypeError(f"AverageGap averages predictions, and {distance!r} knows no average of them.")
        both, names = ("model_average", "weight_average"), ["average_gap"]
        if distance.reader.reads("log_probabilities", "target_class"):
            names += ["average_gain", *(f"{one}_{what}" for one in both for what in ("accuracy", "nll"))]
        else:
            names += [f"{one}_{distance.term_names[0]}" for one in both]
        super().__init__(names, distance, **kwargs)

    def update(self, predictions: Tensor, weight_average: Tensor, target: Any = None) -> None:
        """Add K predictions of the rows of a batch, and that with dropout off."""
        self.add(gap_averages(predictions, weight_average, target, self.distance))
