"""The fast path: cross-entropy, symmetric KL and their gradient in one pass over the logits, or without logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import combinations, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rdrop.divergence import at_least_float32, symmetric_kl
from lightning_rdrop.terms import Average, Terms

_CACHED = 2**19
"""Logits of a chunk on a CPU: 2 MiB of float32, which its cache keeps from the first look at them to the last."""

_HELD = 2**22
"""Logits that the head holds at once on a CPU: 16 MiB of float32, enough rows for a quick matrix product."""

_STREAMED = 2**24
"""Either of them on another device: 64 MiB of float32."""

_FEW = 512
"""Classes up to which a log-softmax and exp are quickest; beyond, a softmax is, and the logarithm of its largest."""


def rdrop_cross_entropy(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    chunk: int | None = None,
) -> Terms:
    r"""Cross-entropy plus alpha times the symmetric KL of K views, with the gradient made on the way forward.

    .. math::
        \text{loss} = \operatorname*{mean}_{k,n} -\log p_{kn}(y_n)
            + \alpha\,\tfrac14 \operatorname*{mean}_n [KL(p_n \| q_n) + KL(q_n \| p_n)]

    With p, q the two softmaxes of a row, :math:`d = \log p - \log q`, :math:`a = E_p[d]` and :math:`b = E_q[d]`,
    the gradient of a row's loss is

    .. math::
        \tfrac12 (p - y) + \tfrac\alpha4 [p - q + p (d - a)] \quad\text{and}\quad
        \tfrac12 (q - y) + \tfrac\alpha4 [q - p - q (d - b)]

    so that a chunk of rows is read once and its gradient written once, while both are in cache; nothing else of the
    size of the logits is ever made. Half precision is computed in float32. Where that does not apply (more or fewer
    views, class probabilities as target, ``torch.compile``, ``torch.func``, second derivatives), the same value comes
    from the formula above and autograd.

    Args:
        logits: shape (K, N, C), views first. A class may be masked with -inf in all views.
        target: shape (N,) of class indices, or (N, C) of class probabilities.
        alpha: the weight of kl, a number or a scalar tensor.
        ignore_index: a row with this target counts in neither term.
        label_smoothing: in [0, 1), in the cross-entropy only.
        weight: shape (C,), one weight a class, in the cross-entropy only.
        chunk: the number of logits that are worked on at once; by default what suits the device.

    Raises:
        ValueError: shapes or dtypes that do not match, fewer than two classes, an argument out of its range.

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
    labels = Labels(ignore_index, label_smoothing, weight)
    labels.check(target, *logits.shape[1:])
    with _without_autocast(logits):
        if _fuses(logits, target):
            sweep = _Sweep(target, labels, alpha, logits.shape[2], logits)
            loss = _Fused.apply(sweep, _size(chunk, _CACHED, logits), alpha, logits)  # type: ignore[no-untyped-call]
            (ce, kl), rows = sweep.terms, sweep.weight
        else:
            loss, ce, kl, rows = _composite(logits, target, alpha, labels)
    return Terms(loss, ce, kl, logits.detach()[0], rows)


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
) -> Terms:
    r"""The same for logits that are a linear map of hidden states, of which only a chunk is ever held.

    .. math:: \text{logits} = \text{hidden} \cdot \text{weight}^\top + \text{bias}

    The gradients for hidden states, weight and bias are made chunk by chunk on the way forward, so that a head over a
    large vocabulary costs hardly more memory than its weight. Under autocast the products are in its dtype, as those
    of a linear layer are.

    Args:
        hidden: shape (K, N, D), views first.
        weight: shape (C, D), as in ``torch.nn.Linear``; it may be frozen, or tied to an embedding.
        target: shape (N,) of class indices.
        alpha: the weight of kl, a number or a scalar tensor.
        bias: shape (C,).
        ignore_index, label_smoothing: as for :func:`rdrop_cross_entropy`.
        class_weight: shape (C,), one weight a class, in the cross-entropy only.
        chunk: the number of logits that are held at once; by default what suits the device.

    Returns:
        terms without a prediction, which would be the logits.

    Raises:
        ValueError: shapes or dtypes that do not match, fewer than two classes, an argument out of its range.
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
    if not _is_plain(weight):
        raise TypeError(
            f"weight is a {type(weight).__name__}, sharded across ranks: no chunk of plain hidden states can be "
            "multiplied with it. Under FSDP2 pass weight.full_tensor(grad_placements=[Partial('avg')]), which gathers "
            "it, and averages its gradient over the ranks as FSDP2 does; full_tensor() alone would not."
        )
    labels = Labels(ignore_index, label_smoothing, class_weight)
    labels.check(target, hidden.shape[1], len(weight))
    if target.dim() != 1:
        raise ValueError("target must be class indices (N,): probabilities (N, C) would be as large as the logits.")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as for a linear layer
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with _without_autocast(hidden):
        if _fuses(hidden, target):
            sweep = _Sweep(target, labels, alpha, len(weight), hidden)
            size = _size(chunk, _HELD, hidden)
            loss = _Fused.apply(sweep, size, alpha, hidden, weight, bias)  # type: ignore[no-untyped-call]
            (ce, kl), rows = sweep.terms, sweep.weight
        else:
            loss, ce, kl, rows = _composite(F.linear(hidden, weight, bias), target, alpha, labels)
    return Terms(loss, ce, kl, None, rows)


class Labels(NamedTuple):
    """What ``F.cross_entropy`` is told besides logits and target."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None

    def check(self, target: Tensor, rows: int, classes: int) -> None:
        """Look at shapes, dtypes and ranges, never at values, which would wait for the device."""
        indices = target.shape == (rows,) and not (target.is_floating_point() or target.is_complex())
        if not indices and not (target.shape == (rows, classes) and target.is_floating_point()):
            raise ValueError(
                f"target must be class indices (integers) of shape (N,) = ({rows},), or class probabilities (floats) "
                f"of shape (N, C) = ({rows}, {classes}), got {tuple(target.shape)}, {target.dtype}."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"The class weight must have the shape ({classes},), got {tuple(self.weight.shape)}.")

    def average(self, logits: Tensor, target: Tensor) -> Average:
        """The cross-entropy of logits (N, C, ...), with class indices (N, ...) or probabilities (N, C, ...)."""
        logits = at_least_float32(logits)
        weight = None if self.weight is None else self.weight.to(logits)
        total = F.cross_entropy(
            logits,
            target.to(logits) if target.is_floating_point() else target,
            weight=weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        if target.is_floating_point():  # F.cross_entropy divides a sum over probabilities by the plain number of rows
            return Average(total, total.new_tensor(logits.numel() // logits.shape[1]))
        counted = target != self.ignore_index
        if weight is None:
            return Average(total, counted.sum().to(total))
        return Average(total, weight[target.where(counted, 0)].where(counted, 0).sum())


def _composite(
    logits: Tensor, target: Tensor, alpha: float | Tensor, labels: Labels
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula as it is written, for autograd: any K, any target, any transform."""
    views = len(logits)
    ce = labels.average(logits.flatten(0, 1), target.repeat(views, *[1] * (target.dim() - 1)))
    pairs = [symmetric_kl(logits[j], logits[k]) for j, k in combinations(range(views), 2)]
    kl = ce.total.new_zeros(())
    if pairs:
        rows = torch.stack(pairs)
        counted = target != labels.ignore_index if target.dim() == 1 else rows.new_ones(rows.shape[1], dtype=torch.bool)
        kl = Average(rows.where(counted, 0).sum(), counted.sum().to(rows) * len(pairs)).mean / 2
    return ce.mean + alpha * kl, ce.mean.detach(), kl.detach(), ce.weight / views


class _Fused(torch.autograd.Function):
    """Both functions: the gradients are made on the way forward, and scaled on the way back.

    ``inputs`` are the logits; or hidden states, a weight, and a bias or None. The terms are left in the sweep, which
    also holds the alpha that is passed for its gradient.
    """

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, size: int, alpha: float | Tensor, *inputs: Any) -> Tensor:
        gradients = sweep.over(size, ctx.needs_input_grad[3:], *inputs)
        ctx.save_for_backward(*inputs, *gradients)
        ctx.sweep = sweep
        ce, kl = sweep.terms
        loss: Tensor = ce + alpha * kl
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sweep, saved = ctx.sweep, ctx.saved_tensors
        inputs, gradients = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if torch.is_grad_enabled():  # under create_graph: the formula has a second derivative
            logits = inputs[0] if len(inputs) == 1 else F.linear(*inputs)
            loss, *_ = _composite(logits, sweep.target, sweep.alpha, sweep.labels)
            needed = ctx.needs_input_grad[2:]
            wanted = [*compress((sweep.alpha, *inputs), needed)]
            found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
            return None, None, *(next(found) if need else None for need in needed)
        scale = upstream if sweep.lift is None else upstream / sweep.lift
        scaled = (_scaled(gradient, scale, part) for gradient, part in zip(gradients, inputs, strict=True))
        return None, None, sweep.terms[1] * upstream if ctx.needs_input_grad[2] else None, *scaled


class _Sweep:
    """One pass over the rows of two views: their terms, and the gradient of these."""

    def __init__(self, target: Tensor, labels: Labels, alpha: float | Tensor, classes: int, like: Tensor) -> None:
        self.target, self.labels, self.alpha = target, labels, alpha
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.class_weight = None if labels.weight is None else labels.weight.to(like.device, self.dtype)
        label, rows = target.expand(2, -1).unsqueeze(-1), target.numel()
        counts = target != labels.ignore_index
        self.weight = count = counts.sum(dtype=self.dtype)
        ignored: Tensor | None = None
        counted: Tensor | float = 1.0
        mean: Tensor | float = 1 / max(1, rows)
        if not target.is_cpu or count.item() < rows:  # elsewhere the look at it would wait for the device
            counted, mean = counts.unsqueeze(-1), 1 / count.clamp(min=1)
            ignored = ~counted
            label = label.masked_fill(ignored, 0)
        self.kl = mean / 4
        self.apart = self.kl * alpha
        own = counted
        if self.class_weight is not None:
            own = self.class_weight[label[0]] * counted
            self.weight = own.sum()
            mean = 1 / _nonzero(self.weight)
        smooth: Tensor | float = counted * mean * (-labels.label_smoothing / (2 * classes))
        hot: Tensor | float = own * mean * ((labels.label_smoothing - 1) / 2)
        each = hot.expand(2, -1, -1) if isinstance(hot, Tensor) else like.new_full(label.shape, hot, dtype=self.dtype)
        self.rows = _Rows(ignored, label, each, smooth)
        self.parts: list[tuple[Tensor, Tensor]] = []
        # a gradient of 1 / n would vanish in float16: it is kept n times as large, until the way back
        self.lift = count.clamp(min=1) if like.dtype == torch.float16 else None

    @cached_property
    def terms(self) -> tuple[Tensor, Tensor]:
        """ce and kl of all rows that were seen."""
        if len(self.parts) == 1:
            return self.parts[0]
        ce, kl = (torch.stack(part).sum() for part in zip(*self.parts, strict=True))
        return ce, kl

    def over(self, size: int, wanted: Sequence[bool], first: Tensor, *head: Any) -> Sequence[Tensor | None]:
        """The gradients for logits (2, N, C); or for hidden states, weight and bias."""
        if head:
            return self._head(size, wanted, first, *head)
        gradient = torch.empty_like(first, memory_format=torch.contiguous_format) if wanted[0] else None
        self._walk(first, gradient, size)
        return (gradient,)

    def _head(
        self, size: int, wanted: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Sequence[Tensor | None]:
        """The gradients for hidden states (2, N, D), weight and bias."""
        to_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=self.dtype) if wanted[1] else None
        to_bias = torch.zeros_like(bias, dtype=self.dtype) if bias is not None and wanted[2] else None
        for rows in _pieces(hidden.shape[1], size // (2 * len(weight))):
            states = hidden[:, rows]
            logits = F.linear(states, weight, bias).to(self.dtype)
            self._walk(logits, logits if any(wanted) else None, _CACHED if logits.is_cpu else size, rows.start)
            gradient = logits.to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[:, rows] = gradient @ weight
            if to_weight is not None and self.dtype == hidden.dtype:
                to_weight.addmm_(gradient.flatten(0, 1).T, states.flatten(0, 1))
            elif to_weight is not None:
                to_weight += gradient.flatten(0, 1).T @ states.flatten(0, 1)
            if to_bias is not None:
                to_bias += logits.sum((0, 1))
        return to_hidden, to_weight, to_bias

    def _walk(self, logits: Tensor, gradient: Tensor | None, size: int, start: int = 0) -> None:
        """Over the logits (2, n, C) of the rows from ``start`` on, whose gradient may take their place."""
        step = max(1, size // (2 * logits.shape[2]))
        if logits.shape[1] > step:
            for rows in _pieces(logits.shape[1], step):
                place = None if gradient is None else gradient[:, rows]
                self._walk(logits[:, rows], place, size, start + rows.start)
            return
        wide = logits if logits.dtype == self.dtype else logits.to(self.dtype)
        out = gradient if wide is logits or gradient is None else wide
        self.parts.append(self._chunk(wide, self.rows.of(start, start + logits.shape[1]), out))
        if out is not None and self.lift is not None:
            out.mul_(self.lift)
        if gradient is not None and gradient is not out:
            gradient.copy_(wide)

    def _chunk(self, logits: Tensor, rows: _Rows, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """The parts of some rows (2, n, C) in ce and kl; their gradient is written to ``out``, maybe the logits."""
        if logits.shape[2] < _FEW:
            log_p = rows.mask(torch.log_softmax(logits, -1))
            both = torch.exp(log_p, out=out)
        else:
            log_p = rows.mask(logits - logits.amax(-1, keepdim=True))
            both = torch.empty_like(log_p) if out is None else out
            for shifted, probability in zip(log_p, both, strict=True):
                torch.softmax(shifted, -1, out=probability)
            log_p += both.amax(-1, keepdim=True).log_()  # exp(0) / sum(exp)
        first, second = log_p.unbind(0)
        p, q = both.unbind(0)

        ce = (log_p.gather(-1, rows.label) * rows.hot).sum()
        if self.labels.label_smoothing:
            every = log_p if self.class_weight is None else log_p * self.class_weight
            ce += (every.sum(-1, keepdim=True) * rows.smooth).sum()
        # a class that neither view allows has no part in the sum
        gap = (first - second).nan_to_num_(0.0, torch.inf, -torch.inf)
        lead = p - q
        kl = lead.flatten().dot(gap.flatten()) * self.kl
        if out is not None:
            # the gradient for log p and log q takes their place, and then passes through the softmax
            torch.addcmul(lead, both, gap, out=log_p)
            second.neg_()
            log_p.mul_(self.apart).scatter_add_(-1, rows.label, rows.hot)
            if self.labels.label_smoothing:
                log_p += rows.smooth if self.class_weight is None else rows.smooth * self.class_weight
            torch.addcmul(log_p, both, log_p.sum(-1, keepdim=True), value=-1, out=both)
        return ce, kl


class _Rows(NamedTuple):
    """What each of n rows counts."""

    ignored: Tensor | None  # (n, 1), or None where all count
    label: Tensor  # (2, n, 1); 0 where it does not count
    hot: Tensor  # (2, n, 1): the factor of log p(y) in ce, not positive
    smooth: Tensor | float  # (n, 1), or a number for all: that of w_c log p_c for every c, likewise

    def mask(self, values: Tensor) -> Tensor:
        """In place: 0 for the rows that do not count, whatever stands there."""
        return values if self.ignored is None else values.masked_fill_(self.ignored, 0)

    def of(self, start: int, stop: int) -> _Rows:
        if stop - start >= self.label.shape[1]:
            return self
        parts: list[Any] = [part[..., start:stop, :] if isinstance(part, Tensor) else part for part in self]
        return _Rows(*parts)


def _pieces(rows: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step))


def _nonzero(weight: Tensor) -> Tensor:
    return weight.where(weight != 0, 1)


def _scaled(gradient: Tensor | None, scale: Tensor, like: Tensor) -> Tensor | None:
    """The product; in place where the gradient can not be asked for again."""
    if gradient is None:
        return None
    batched = torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(scale)
    if batched or _graph_is_kept():
        gradient = gradient * scale
    elif not gradient.is_cpu or scale.item() != 1:  # elsewhere a look at the scale would wait for the device
        gradient = gradient.mul_(scale)
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs is one with retain_graph=True."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _fuses(first: Tensor, target: Tensor) -> bool:
    """Whether the gradient can be made on the way forward: two views, class indices, and nothing that traces."""
    if first.shape[0] != 2 or target.dim() != 1 or not _is_plain(first):
        return False
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _size(chunk: int | None, cached: int, tensor: Tensor) -> int:
    if chunk is None:
        return cached if tensor.is_cpu else _STREAMED
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be an int >= 1, the number of logits worked on at once, or None, got {chunk!r}.")
    return chunk
