"""The divergence between the predictions of several dropout passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop.distance import Distance
from lightning_rdrop.divergence import dispersion
from lightning_rdrop.metrics.row_means import RowMeans, Rows, checked_passes, one_distance
from lightning_rdrop.terms import Average

NAMES = ("dropout_kl", "dropout_kl_target", "dropout_kl_others")


def dropout_kl(predictions: Tensor, target: Any = None, distance: Distance | None = None) -> dict[str, Tensor]:
    r"""The consistency of K dropout passes, as in ``train/kl``, and its shares of the target class and the others.

    .. math::
        \text{kl} = \operatorname*{mean}_{n,\,j<k} \tfrac14 \sum_c (p_{jnc} - p_{knc})(\log p_{jnc} - \log p_{knc})

    which is half the mean symmetric KL of two passes: the kl of :class:`~lightning_rdrop.RDropLoss` for the same
    predictions, for any K. The terms of the sum with :math:`c = y_n` are ``dropout_kl_target``, the rest is
    ``dropout_kl_others``. Cross-entropy does not see the rest: it leaves the non-target classes free to change from
    mask to mask.

    Args:
        predictions: of K >= 2 passes, (K, N, ...).
        target: (N, ...), or what the distance takes: the target classes, and which rows count. If not given, all rows
            count and only ``dropout_kl`` is returned.
        distance: how to read predictions; ``None`` is :class:`~lightning_rdrop.Categorical`. For
            :class:`~lightning_rdrop.Bernoulli` a row is a label, with the classes 0 and 1. A distance without classes
            uses its own D and returns only ``dropout_kl``. With :class:`~lightning_rdrop.Weighted` or
            :class:`~lightning_rdrop.MaskedConsistency`, rows count as in training, in all of these metrics.

    Returns:
        ``dropout_kl``, ``dropout_kl_target`` and ``dropout_kl_others``, nats per row (in the units of D).

    Raises:
        ValueError: a single pass, or shapes that do not match.
        TypeError: ``distance`` is for several predictions by name.

    Source: Su Jianlin, spaces.ac.cn/archives/8496.

    Example:
        >>> from torch import tensor
        >>> passes = tensor([[[0.6, 0.2, 0.2]], [[0.3, 0.4, 0.3]]]).log()  # K = 2, N = 1, C = 3
        >>> dropout_kl(passes, tensor([1]))  # 0.3 ln 2 + 0.2 ln 2 + 0.1 ln 1.5, a quarter of it
        {'dropout_kl': tensor(0.0968), 'dropout_kl_target': tensor(0.0347), 'dropout_kl_others': tensor(0.0621)}
    """
    return {name: average.mean for name, average in kl_averages(predictions, target, distance).items()}


def kl_averages(predictions: Tensor, target: Any, distance: Distance | None = None) -> dict[str, Average]:
    """The averages whose means :func:`dropout_kl` returns."""
    distance = one_distance(distance)
    if not distance.unwrapped.has_classes:
        between = distance.over_pairs(checked_passes(predictions), target)
        return {"dropout_kl": Average(between.total / 2, between.weight)}
    rows = Rows.read(distance, checked_passes(predictions), target)
    terms = dispersion(rows.log_p) / 2
    found = {"dropout_kl": rows.mean(terms.sum(-1))}
    if rows.target is None:
        return found
    index = rows.target.unsqueeze(-1)
    return found | {
        "dropout_kl_target": rows.mean_of_known(terms.gather(-1, index).squeeze(-1)),
        "dropout_kl_others": rows.mean_of_known(terms.scatter(-1, index, 0).sum(-1)),
    }


class DropoutKL(RowMeans):
    r"""The consistency of K dropout passes, as in ``train/kl``, and its shares of the target class and the others.

    See :func:`dropout_kl` for the formula. ``compute`` returns ``dropout_kl``, ``dropout_kl_target`` and
    ``dropout_kl_others``, as means over all rows that count in all batches and ranks.

    Args:
        distance: how to read predictions; ``None`` is :class:`~lightning_rdrop.Categorical`. Without classes, as with
            :class:`~lightning_rdrop.Gaussian`, only ``dropout_kl`` is returned.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Shapes:
        ``update`` takes predictions (K, N, ..., C), K >= 2, and a target (N, ...), or what the distance takes.

    Example:
        >>> from torch import tensor
        >>> metric = DropoutKL()
        >>> metric.update(tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log(), tensor([0]))
        >>> metric.compute()  # ln(1.5) / 20, none of it from the target
        {'dropout_kl': tensor(0.0203), 'dropout_kl_target': tensor(0.), 'dropout_kl_others': tensor(0.0203)}
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, distance: Distance | None = None, **kwargs: Any) -> None:
        classes = one_distance(distance).unwrapped.has_classes
        super().__init__(NAMES if classes else NAMES[:1], distance, **kwargs)

    def update(self, predictions: Tensor, target: Any = None) -> None:
        """Add K predictions of the rows of a batch."""
        self.add(kl_averages(predictions, target, self.distance))
