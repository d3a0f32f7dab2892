"""Weighted means that can be added exactly, and the terms of a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Average:
    r"""A weighted mean, stored as a sum and a weight so that averages can be added exactly.

    .. math:: \text{mean} = \frac{\sum_i w_i x_i}{\sum_i w_i}

    Adding the averages of two micro-batches, or of two ranks, gives the average over the rows of both. The mean of
    their means does not, unless both have the same number of rows.

    Args:
        total: the weighted sum, a scalar tensor; it carries the gradient.
        weight: the sum of the weights, a scalar tensor.
        rows: the summands of both, (N, ...) each, needed by :meth:`weighted`; None if they are not kept.

    Example:
        >>> from torch import tensor
        >>> three = Average(tensor(6.0), tensor(3.0))
        >>> one = Average(tensor(10.0), tensor(1.0))
        >>> (three + one).mean
        tensor(4.)
        >>> Average(tensor(0.0), tensor(0.0)).mean  # no row counts: 0 instead of NaN
        tensor(0.)
    """

    total: Tensor
    weight: Tensor
    rows: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, values: Tensor, counted: Tensor | None = None) -> Average:
        """The unweighted mean of values, or of those that count, in float32 or better.

        Args:
            values: one for each row, any shape.
            counted: same shape, a bool mask of the rows that count; None if all do.

        Raises:
            ValueError: the mask has another shape; it is not broadcast.

        Example:
            >>> Average.of(torch.tensor([1.0, 2.0, 6.0]))
            Average(total=tensor(9.), weight=tensor(3.))
            >>> Average.of(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True]))
            Average(total=tensor(7.), weight=tensor(2.))
        """
        values = _float32_or_better(values)
        if counted is None:
            return cls(
                values.sum(), values.new_full((), values.numel()), (values, values.new_ones(()).expand_as(values))
            )
        _check_shape("counted", counted, "values", values)
        return cls.over(values.where(counted, 0), counted.to(values))

    @classmethod
    def over(cls, totals: Tensor, weights: Tensor) -> Average:
        """The mean over rows that are already weighted, such as a cross-entropy with class weights.

        Args:
            totals: the value of each row times its weight, any shape.
            weights: same shape.

        Raises:
            ValueError: the weights have another shape; they are not broadcast.

        Example:
            >>> Average.over(torch.tensor([1.0, 8.0]), torch.tensor([1.0, 2.0])).mean  # of 1 and 4, weights 1 and 2
            tensor(3.)
        """
        _check_shape("weights", weights, "totals", totals)
        totals, weights = _float32_or_better(totals), _float32_or_better(weights)
        return cls(totals.sum(), weights.sum(), (totals, weights))

    def weighted(self, weight: Tensor) -> Average:
        """The same rows, each multiplied by a further weight; rows with weight 0 are ignored, even if not finite.

        Args:
            weight: shape (N,), or with further dimensions of the rows, such as one weight per token.

        Raises:
            TypeError: this average has not kept its rows.
            ValueError: the weight has another shape.

        Example:
            >>> average = Average.of(torch.tensor([1.0, 2.0, 6.0]))
            >>> average.weighted(torch.tensor([3.0, 0.0, 1.0]))
            Average(total=tensor(9.), weight=tensor(4.))
        """
        if self.rows is None:
            raise TypeError(
                "This average kept only its sums, so its rows cannot be weighted. Create it with Average.of or "
                "Average.over; with Together, weight each part separately: {'name': Weighted(...)}."
            )
        totals, weights = self.rows
        weight = fitted(weight.to(totals), totals.shape)
        return Average.over((totals * weight).where(weight != 0, 0), weights * weight)

    @property
    def mean(self) -> Tensor:
        """``total / weight``; 0, with gradient 0, if no row counts."""
        return self.total / torch.where(self.weight == 0, torch.ones_like(self.weight), self.weight)

    def __add__(self, other: Average) -> Average:
        return Average(self.total + other.total, self.weight + other.weight)


@dataclass
class Terms:
    """The loss of one batch and its terms.

    ``loss``, ``ce``, ``kl`` and ``prediction`` carry gradients, so you can build your own loss from them, such as
    ``own_loss + alpha * terms.kl``. The gradient of ``loss`` is usually computed in the forward pass; those of
    ``ce`` and ``kl`` take another pass over the logits, but only if they are used. Detach what outlives the step: a
    term with a gradient keeps the activations of its step in memory.

    Args:
        loss: ``ce + alpha * kl`` plus the weighted regularizers; a scalar tensor.
        ce: the task loss, a mean over the rows of all views; a scalar tensor.
        kl: the consistency of the views, a mean over the same rows; a scalar tensor.
        prediction: the first view's prediction, so that training metrics need no further forward pass.
        rows: n, the number of counted rows per view, over which both terms are means; a scalar tensor. None if
            the loss is not a per-row mean.
        kl_rows: the number of rows of kl, if it may differ from that of ce; then ``rows`` is that of ce.
        examples: B, the number of examples in the batch (not of rows in all views), the batch size for logging.
        extra: further values to log by name, detached: regularizers without their weights, the model's own losses,
            and the parts of a semi-supervised kl.
        parts: the terms of several predictions by name; the terms above are their weighted sums. See
            :class:`~lightning_rdrop.Together`.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    prediction: Any = None
    rows: Tensor | None = None
    kl_rows: Tensor | None = None
    examples: int | None = None
    extra: dict[str, Tensor | float] = field(default_factory=dict)
    parts: dict[str, Terms] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Average, between: Average, alpha: float | Tensor, **others: Any) -> Terms:
        r"""Compute the terms, with loss :math:`\text{ce} + \alpha\,\text{kl}`, from two averages.

        Args:
            task: D between the target and the predictions of all views.
            between: D between the views, over all pairs. It is halved here and nowhere else.
            alpha: the weight of kl.
            others: further fields, such as ``prediction`` and ``rows``.

        Example:
            >>> from torch import tensor
            >>> Terms.of(Average(tensor(6.0), tensor(3.0)), Average(tensor(3.0), tensor(3.0)), alpha=4.0).loss
            tensor(4.)
        """
        ce, kl = task.mean, between.mean / 2
        return cls(combined(ce, kl, alpha), ce, kl, **others)

    def denominators(self) -> dict[str, Tensor]:
        """The number of rows that each term is averaged over, by name; empty if a term is not a per-row mean.

        Example:
            >>> from torch import tensor
            >>> one = tensor(1.0)
            >>> intent, slots = (Terms(one, one, one, rows=tensor(rows)) for rows in (2.0, 9.0))
            >>> Terms(one, one, one, parts={"intent": intent, "slots": slots}).denominators()
            {'intent_ce': tensor(2.), 'intent_kl': tensor(2.), 'slots_ce': tensor(9.), 'slots_kl': tensor(9.)}
        """
        if self.parts:
            parts = {name: part.denominators() for name, part in self.parts.items()}
            known = all(parts.values())
            return {f"{name}_{term}": part[term] for name, part in parts.items() for term in part if known}
        if self.rows is None:
            return {}
        return {"ce": self.rows, "kl": self.rows if self.kl_rows is None else self.kl_rows}


def fitted(weight: Tensor, shape: torch.Size) -> Tensor:
    """Reshape a weight so that it broadcasts over rows of a shape (N, ...).

    Args:
        weight: shape (N,), or with further dimensions of the rows.
        shape: the shape of the rows.

    Raises:
        ValueError: the weight has another shape.

    Example:
        >>> fitted(torch.ones(4), torch.Size([4, 6])).shape
        torch.Size([4, 1])
    """
    if not 1 <= weight.dim() <= len(shape) or weight.shape != shape[: weight.dim()]:
        raise ValueError(
            f"A weight of shape {tuple(weight.shape)} does not fit rows of shape {tuple(shape)}: pass one for each "
            f"example, ({shape[0] if shape else 1},), or for each row."
        )
    return weight[(..., *[None] * (len(shape) - weight.dim()))]


def combined(ce: Tensor, kl: Tensor, alpha: float | Tensor) -> Tensor:
    """``ce + alpha * kl``, or only ce if alpha is 0, even if kl is infinite.

    Example:
        >>> from torch import inf, tensor
        >>> combined(tensor(1.0), tensor(inf), 0.0)
        tensor(1.)
    """
    return ce.clone() if is_off(alpha) else ce + alpha * kl


def _check_shape(name: str, part: Tensor, of: str, rows: Tensor) -> None:
    if part.shape != rows.shape:
        raise ValueError(
            f"{name} must have the shape of {of}, {tuple(rows.shape)}, got {tuple(part.shape)}; it is not broadcast. "
            f"Expand it first, for example with {name}.unsqueeze(-1).expand_as({of})."
        )


def _float32_or_better(rows: Tensor) -> Tensor:
    """Convert half precision and integers to float32: in bfloat16, 257 rows would count as 256."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def is_off(alpha: float | Tensor) -> bool:
    """Whether alpha is the number 0. The value of a tensor is not read, which would synchronize its device."""
    return not isinstance(alpha, Tensor) and alpha == 0
