"""The R-Drop loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_rdrop._fused import compiled_loss
from lightning_rdrop.cross_entropy import Head
from lightning_rdrop.distance import Categorical, Distance
from lightning_rdrop.terms import Terms


class RDropLoss(nn.Module):
    r"""Task loss plus alpha times the consistency of K predictions of the same rows.

    .. math::
        \text{loss} = \text{ce} + \alpha\,\text{kl}, \qquad
        \text{ce} = \operatorname*{mean}_{k,n} D(y_n, f_{kn}), \qquad
        \text{kl} = \tfrac12 \operatorname*{mean}_{n,\,j<k} \tfrac12 [D(f_{jn}, f_{kn}) + D(f_{kn}, f_{jn})]

    Both means are per row, so the loss has the scale of the plain task loss and alpha is that of the paper's formula:
    with two views and :class:`~lightning_rdrop.Categorical` this is exactly half of
    :math:`CE_1 + CE_2 + \tfrac\alpha2 [KL_{12} + KL_{21}]`. A single view is ordinary training, with kl = 0.

    The distance computes the loss in its fastest way: :class:`~lightning_rdrop.Categorical` computes the gradient in
    the forward pass, as :func:`~lightning_rdrop.rdrop_cross_entropy` does; others use autograd.

    Args:
        distance: D; ``None`` is :class:`~lightning_rdrop.Categorical`.
        compile: as for :func:`~lightning_rdrop.rdrop_cross_entropy`; it affects only
            :class:`~lightning_rdrop.Categorical`, alone or within another distance.

    Shapes:
        predictions (K, N, ...), views first; target (N, ...), what the distance takes. With a ``head``, a linear
        output layer, pass hidden states (K, N, ..., D) instead of predictions, which are then never stored.

    Source: Liang et al. 2021, arXiv 2106.14448; Su Jianlin, spaces.ac.cn/archives/8496.

    Example:
        >>> from torch import tensor
        >>> views = tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log()  # K = 2, N = 1, C = 3
        >>> terms = RDropLoss()(views, tensor([0]), alpha=4.0)
        >>> terms.ce, terms.kl, terms.loss  # ln 2, ln(1.5) / 20, ce + 4 kl
        (tensor(0.6931), tensor(0.0203), tensor(0.7742))
    """

    def __init__(self, distance: Distance | None = None, *, compile: bool = False) -> None:
        super().__init__()
        self.is_compiled = compile
        self.distance = Categorical() if distance is None else distance

    def forward(self, predictions: Tensor, target: Tensor, alpha: float | Tensor, head: Head | None = None) -> Terms:
        """The terms of labeled rows: loss = ce + alpha kl.

        Args:
            predictions: shape (K, N, ...), views first; hidden states (K, N, ..., D) with a head.
            target: shape (N, ...), what the distance takes.
            alpha: the weight of kl.
            head: a linear output layer, whose logits are never stored.
        """
        with compiled_loss(self.is_compiled):
            return self.distance.terms(predictions, target, alpha, head)

    def consistency(self, predictions: Tensor, alpha: float | Tensor, target: Tensor | None = None) -> Terms:
        """The terms of unlabeled rows, which have no ce: loss = alpha kl.

        Args:
            predictions: shape (K, N, ...), views first.
            alpha: the weight of kl.
            target: shape (N, ...), only tells which rows count, by the ``ignore_index`` or ``ignore_value`` of the
                distance; all if not given.

        Example:
            >>> from torch import tensor
            >>> views = tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log()
            >>> RDropLoss().consistency(views, alpha=4.0).loss  # 4 ln(1.5) / 20
            tensor(0.0811)
        """
        return self.distance.consistency(predictions, alpha, target)
