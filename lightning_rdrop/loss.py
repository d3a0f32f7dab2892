"""The R-Drop loss: views of a prediction, a target and alpha become the terms of a loss."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_rdrop.cross_entropy import linear_rdrop_cross_entropy, rdrop_cross_entropy
from lightning_rdrop.distance import Categorical, Distance
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.terms import Average, Terms


class RDropLoss(nn.Module):
    r"""Task loss plus alpha times the consistency of K predictions of the same rows.

    .. math::
        \text{loss} = \text{ce} + \alpha\,\text{kl}, \qquad
        \text{ce} = \operatorname*{mean}_{k,n} D(y_n, f_{kn}), \qquad
        \text{kl} = \tfrac12 \operatorname*{mean}_{n,\,j<k} \tfrac12 [D(f_{jn}, f_{kn}) + D(f_{kn}, f_{jn})]

    Both means are per row, so the loss has the scale of the plain task loss and alpha is that of the paper's formula:
    with two views and :class:`~lightning_rdrop.Categorical` this is exactly half of
    :math:`CE_1 + CE_2 + \tfrac\alpha2 [KL_{12} + KL_{21}]`. One view is ordinary training, kl = 0.

    A Categorical distance is computed by :func:`~lightning_rdrop.rdrop_cross_entropy`, which makes the gradient along
    the way; any other by autograd.

    Args:
        distance: D; ``None`` is :class:`~lightning_rdrop.Categorical`.

    Shapes:
        predictions (K, N, ...), views first; target (N, ...), what the distance takes. With a ``head``, hidden states
        (K, N, ..., D) in the place of the predictions that it makes of them, which are never held.

    Source: Liang et al. 2021, arXiv 2106.14448; Su Jianlin, spaces.ac.cn/archives/8496.

    Example:
        >>> from torch import tensor
        >>> views = tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log()  # K = 2, N = 1, C = 3
        >>> terms = RDropLoss()(views, tensor([0]), alpha=4.0)
        >>> terms.ce, terms.kl, terms.loss  # ln 2, ln(1.5) / 20, ce + 4 kl
        (tensor(0.6931), tensor(0.0203), tensor(0.7742))
    """

    def __init__(self, distance: Distance | None = None) -> None:
        super().__init__()
        self.distance = Categorical() if distance is None else distance

    def forward(self, predictions: Tensor, target: Tensor, alpha: float | Tensor, head: Head | None = None) -> Terms:
        if head is not None:
            return self._hidden(predictions, target, alpha, head)
        if type(self.distance) is Categorical:  # a subclass may measure otherwise
            return self._categorical(self.distance, predictions, target, alpha)
        ce, kl = self.averages(predictions, target)
        task, consistency = ce.mean, kl.mean / 2
        return Terms(
            loss=task + alpha * consistency,
            ce=task.detach(),
            kl=consistency.detach(),
            prediction=predictions[0].detach(),
            rows=ce.weight / len(predictions),
        )

    def averages(self, predictions: Tensor, target: Tensor) -> tuple[Average, Average]:
        """D to the target over the rows of all views, and D between the views over all pairs of them (not halved)."""
        ce = self.distance.to_target(
            predictions.flatten(0, 1), target.repeat(len(predictions), *[1] * (target.dim() - 1))
        )
        return ce, self._between_views(predictions, target)

    def consistency(self, predictions: Tensor, alpha: float | Tensor, target: Tensor | None = None) -> Terms:
        """The terms of unlabelled rows, which have no ce: loss = alpha kl.

        Args:
            predictions: shape (K, N, ...), views first.
            alpha: the weight of kl.
            target: shape (N, ...), tells which rows count, by the ``ignore_index`` of the distance, and nothing else;
                without it all do.

        Example:
            >>> from torch import tensor
            >>> views = tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log()
            >>> RDropLoss().consistency(views, alpha=4.0).loss  # 4 ln(1.5) / 20
            tensor(0.0811)
        """
        kl = self._between_views(predictions, target).mean / 2
        return Terms(loss=alpha * kl, ce=torch.zeros_like(kl), kl=kl.detach(), prediction=predictions[0].detach())

    def _between_views(self, predictions: Tensor, target: Tensor | None) -> Average:
        zero = at_least_float32(predictions.new_zeros(()))
        pairs = (self.distance.between(first, second, target) for first, second in combinations(predictions, 2))
        return sum(pairs, start=Average(zero, zero))

    def _categorical(self, distance: Categorical, predictions: Tensor, target: Tensor, alpha: float | Tensor) -> Terms:
        indices = distance.counts_indices(predictions[0], target)
        dim = distance.class_dim
        logits = predictions.movedim(dim if dim < 0 else dim + 1, -1).flatten(1, -2)
        target = target.flatten() if indices else target.movedim(dim, -1).flatten(0, -2)
        terms = rdrop_cross_entropy(logits, target, alpha, **distance.labels._asdict())
        return dataclasses.replace(terms, prediction=predictions[0].detach())

    def _hidden(self, hidden: Tensor, target: Tensor, alpha: float | Tensor, head: Head) -> Terms:
        distance = self.distance
        if type(distance) is not Categorical or distance.class_dim != -1:
            raise TypeError(f"A fused head needs the distance Categorical(class_dim=-1), got {distance!r}.")
        distance.counts_indices(head.like_logits(hidden[0]), target)
        ignore_index, label_smoothing, class_weight = distance.labels
        return linear_rdrop_cross_entropy(
            hidden.flatten(1, -2),
            head.weight,
            target.flatten(),
            alpha,
            bias=head.bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
        )


class Head(NamedTuple):
    """A linear output layer: weight (C, D), and bias (C,) or None."""

    weight: Tensor
    bias: Tensor | None = None

    def like_logits(self, hidden: Tensor) -> Tensor:
        """What has the shape of the logits of hidden states (..., D), and takes no memory."""
        return hidden[..., :1].expand(*hidden.shape[:-1], len(self.weight))
