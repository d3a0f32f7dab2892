"""Cross-entropy plus symmetric KL of K views, from logits or hidden states, computed in the fastest way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rdrop import _compat, arguments
from lightning_rdrop._fused import fused, traced, without_autocast
from lightning_rdrop.composite import composite
from lightning_rdrop.labels import UNIT_WEIGHTS, Labels, RowWeights
from lightning_rdrop.terms import Terms


def rdrop_cross_entropy(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    chunk: int | None = None,
    compile: bool = False,
) -> Terms:
    r"""Cross-entropy plus alpha times the symmetric KL of K views, with the gradient computed in the forward pass.

    .. math::
        \text{loss} = \operatorname*{mean}_{k,n} -\log p_{kn}(y_n)
            + \alpha\,\tfrac14 \operatorname*{mean}_n [KL(p_n \| q_n) + KL(q_n \| p_n)]

    With p, q the two softmaxes of a row, :math:`d = \log p - \log q`, :math:`a = E_p[d]` and :math:`b = E_q[d]`,
    the gradient of a row's loss is

    .. math::
        \tfrac12 (p - y) + \tfrac\alpha4 [p - q + p (d - a)] \quad\text{and}\quad
        \tfrac12 (q - y) + \tfrac\alpha4 [q - p - q (d - b)]

    so each chunk of rows is read once and its gradient written once, while both are in cache, and nothing else as large
    as the logits is allocated. Half precision is computed in float32. Inside a compiled step the gradient is computed
    in the backward pass, from the logits and a few numbers per row. In all other cases (K other than 2, class
    probabilities as target, ``torch.func``, second derivatives), autograd computes it from the formula.

    Args:
        logits: shape (K, N, C), views first. A class may be masked with -inf in all views.
        target: shape (N,) of class indices, or (N, C) of class probabilities.
        alpha: the weight of kl, a number or a scalar tensor.
        ignore_index: rows with this target are ignored in both terms; so are rows of class probabilities that are all
            0 or all ``ignore_index``.
        label_smoothing: in [0, 1), in the cross-entropy only.
        weight: shape (C,), one weight per class, in the cross-entropy only.
        chunk: the number of logits processed at once; None chooses it by the device.
        compile: use a kernel that ``torch.compile`` builds on first use, in about ten seconds, for any number of rows
            and any alpha. It is not used for fewer than about 30,000 logits on a CPU, where it would be slower, nor if
            no compiler is found, which is a warning.

    Raises:
        ValueError: shapes or dtypes that do not match, fewer than two classes, an argument out of range.

    Source: Liang et al. 2021, arXiv 2106.14448.

    Example:
        >>> from torch import tensor
        >>> logits = tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]]).log()  # K = 2, N = 1, C = 3
        >>> terms = rdrop_cross_entropy(logits, tensor([0]), alpha=4.0)
        >>> terms.ce, terms.kl, terms.loss  # ln 2, ln(1.5) / 20, ce + 4 kl
        (tensor(0.6931), tensor(0.0203), tensor(0.7742))
    """
    if logits.dim() != 3 or logits.shape[2] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floats of shape (K, N, C), views first, with at least 2 classes C, got "
            f"{tuple(logits.shape)}, {logits.dtype}."
        )
    target = _checked(target, *logits.shape[1:])
    terms = checked_terms(
        logits, None, target, alpha, Labels(ignore_index, label_smoothing, weight), chunk=chunk, compile=compile
    )
    terms.prediction = logits[0]
    return terms


def linear_rdrop_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    chunk: int | None = None,
    compile: bool = False,
) -> Terms:
    r"""Same loss for logits that are a linear map of hidden states; only a chunk of the logits is stored at a time.

    .. math:: \text{logits} = \text{hidden} \cdot \text{weight}^\top + \text{bias}

    The gradients of hidden states, weight and bias are computed chunk by chunk in the forward pass, so a head over a
    large vocabulary takes little more memory than its weight. Under autocast the matrix products use its dtype, as in
    a linear layer.

    Args:
        hidden: shape (K, N, D), views first.
        weight: shape (C, D), as in ``torch.nn.Linear``; it may be frozen, or tied to an embedding.
        target: shape (N,) of class indices.
        alpha: the weight of kl, a number or a scalar tensor.
        bias: shape (C,).
        ignore_index, label_smoothing: as for :func:`rdrop_cross_entropy`.
        class_weight: shape (C,), one weight per class, in the cross-entropy only.
        chunk: the number of logits stored at once; None chooses it by the device.
        compile: as for :func:`rdrop_cross_entropy`.

    Returns:
        terms whose ``prediction`` is None, since it would be the full logits.

    Raises:
        ValueError: shapes or dtypes that do not match, fewer than two classes, an argument out of range.
        TypeError: a weight that is sharded across ranks (a DTensor).

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> target = torch.arange(5)
        >>> fused = linear_rdrop_cross_entropy(hidden, weight, target, alpha=4.0)
        >>> bool(torch.isclose(fused.loss, rdrop_cross_entropy(hidden @ weight.T, target, alpha=4.0).loss))
        True
    """
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1] or len(weight) < 2:
        raise ValueError(
            f"hidden must have the shape (K, N, D) and weight (C, D), with at least 2 classes C, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape (C,) = ({len(weight)},), got {tuple(bias.shape)}.")
    target = _checked(target, hidden.shape[1], len(weight))
    if target.dim() != 1:
        raise ValueError("target must be class indices (N,): probabilities (N, C) would be as large as the logits.")
    labels = Labels(ignore_index, label_smoothing, class_weight)
    return checked_terms(hidden, Head(weight, bias), target, alpha, labels, chunk=chunk, compile=compile)


class Head(NamedTuple):
    """A linear output layer: weight (C, D), and bias (C,) or None.

    Example:
        >>> layer = nn.Linear(8, 100)
        >>> Head(layer.weight, layer.bias).like_logits(torch.zeros(5, 8)).shape
        torch.Size([5, 100])
    """

    weight: Tensor
    bias: Tensor | None = None

    def like_logits(self, hidden: Tensor) -> Tensor:
        """A placeholder with the shape of the logits of hidden states (..., D), which takes no memory."""
        return hidden[..., :1].expand(*hidden.shape[:-1], len(self.weight))


def checked_terms(
    states: Tensor,
    head: Head | None,
    target: Tensor,
    alpha: float | Tensor,
    labels: Labels,
    weights: RowWeights = UNIT_WEIGHTS,
    chunk: int | None = None,
    compile: bool = False,
) -> Terms:
    """The terms, without a prediction, of states and a target whose shapes have been checked.

    Args:
        states: logits (K, N, C); or, with a head, hidden states (K, N, D).
        head: the output layer, or None.
        target: shape (N,) of class indices; without a head also (N, C) of class probabilities.
        alpha: the weight of kl.
        labels: the other arguments of the cross-entropy.
        weights: the weight of each row in each term.
        chunk, compile: as for :func:`rdrop_cross_entropy`.

    Raises:
        ValueError: class weights of another shape, or a chunk out of range.
        TypeError: a head that is sharded across ranks.
    """
    if chunk is not None:
        chunk = arguments.whole("chunk", chunk, meaning=", the number of logits processed at once, or None")
    if head is not None and not _is_plain(head.weight):
        raise TypeError(
            f"weight is a {type(head.weight).__name__}, sharded across ranks: it cannot be multiplied with plain "
            "hidden states. Under FSDP2 pass weight.full_tensor(grad_placements=[Partial('avg')]), which gathers it "
            "and averages its gradient over the ranks as FSDP2 does; full_tensor() alone would not average."
        )
    labels.check(states.shape[2] if head is None else len(head.weight))
    device = states.device.type
    if head is not None and torch.is_autocast_enabled(device):  # as for a linear layer
        dtype = torch.get_autocast_dtype(device)
        bias = None if head.bias is None else head.bias.to(dtype)
        states, head = states.to(dtype), Head(head.weight.to(dtype), bias)
    with without_autocast(device):
        fuses = (
            states.shape[0] == 2
            and target.dim() == 1
            and not weights.learned  # the sweep computes no gradient for row weights
            and _is_plain(states)
            and not _compat.is_transformed()
        )
        if fuses and not torch.compiler.is_compiling():
            inputs = (states,) if head is None else (states, *head)
            return fused(inputs, target, alpha, labels, weights, chunk, compile)
        logits = states if head is None else F.linear(states, *head)
        return (traced if fuses else composite)(logits, target, alpha, labels, weights)


def _checked(target: Tensor, rows: int, classes: int) -> Tensor:
    """Check the target and return it, with class indices as int64 to avoid overflow in comparisons."""
    arguments.tensor("target", target)
    indices = target.shape == (rows,) and not (target.is_floating_point() or target.is_complex())
    if not indices and not (target.shape == (rows, classes) and target.is_floating_point()):
        raise ValueError(
            f"target must be class indices (integers) of shape (N,) = ({rows},), or class probabilities (floats) "
            f"of shape (N, C) = ({rows}, {classes}), got {tuple(target.shape)}, {target.dtype}."
        )
    return target.long() if indices else target


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
