"""The fused sweep: both terms and their gradient in one pass over the logits, or over hidden states without logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop import _compat
from lightning_rdrop.labels import Labels, composite
from lightning_rdrop.terms import Terms, combined, is_off

_CACHED = 2**19
"""Logits of a chunk on a CPU: 2 MiB of float32, which stay in its cache while they are processed."""

_HELD = 2**22
"""Logits that the head holds at once on a CPU: 16 MiB of float32, enough rows for a fast matrix product."""

_STREAMED = 2**24
"""Either of them on another device: 64 MiB of float32."""

_FEW_CLASSES = 512
"""Up to here log-softmax and exp are fastest; beyond, a softmax and the logarithm of its largest value are."""


Gradients = Sequence[Tensor | None]


def fused(inputs: tuple[Any, ...], target: Tensor, alpha: float | Tensor, labels: Labels, chunk: int | None) -> Terms:
    """The terms of two views, with the gradient of the loss made in the forward pass.

    Args:
        inputs: logits (2, N, C); or hidden states (2, N, D), a weight (C, D), and a bias (C,) or None.
        target: shape (N,) of class indices.
        alpha: the weight of kl.
        labels: the other arguments of the cross-entropy.
        chunk: the number of logits that are processed at once; None is what suits the device.
    """
    first = inputs[0]
    if chunk is None:
        chunk = _STREAMED if not first.is_cpu else _CACHED if len(inputs) == 1 else _HELD
    problem = _Problem(target, alpha, labels, chunk)
    sweep = problem.sweep(inputs, 1.0, alpha)
    loss, ce, kl = _Fused.apply(problem, sweep, alpha, *inputs)  # type: ignore[no-untyped-call]
    kl_rows = None if labels.weight is None else sweep.n_counted
    return Terms(loss, ce, kl, rows=sweep.total_weight, kl_rows=kl_rows)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which a type of device casts nothing."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Problem(NamedTuple):
    """All that defines the loss, except its inputs."""

    target: Tensor
    alpha: float | Tensor
    labels: Labels
    chunk: int

    def sweep(self, inputs: Sequence[Any], ce_weight: float | Tensor, kl_weight: float | Tensor) -> Sweep:
        """A sweep that makes the gradient of ``ce_weight * ce + kl_weight * kl``."""
        classes = inputs[0].shape[2] if len(inputs) == 1 else len(inputs[1])
        return Sweep(self.target, self.labels, classes, inputs[0], ce_weight, kl_weight)

    def by_formula(self, inputs: Sequence[Any], upstream: Gradients, wanted: Sequence[bool]) -> list[Tensor | None]:
        """The gradients for alpha and the inputs that are wanted, by autograd of the formula."""
        again = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(inputs[0].device.type):
            logits = inputs[0] if len(inputs) == 1 else F.linear(*inputs)
            terms = composite(logits, self.target, self.alpha, self.labels)
        asked = [grad is not None for grad in upstream]
        outputs = [*compress((terms.loss, terms.ce, terms.kl), asked)]
        sources = [*compress((self.alpha, *inputs), wanted)]
        found = torch.autograd.grad(
            outputs, sources, [*compress(upstream, asked)], create_graph=again, allow_unused=True
        )
        remaining = iter(found)
        return [next(remaining) if want else None for want in wanted]

    def by_sweep(self, inputs: Sequence[Any], upstream: Gradients, wanted: Sequence[bool]) -> Gradients:
        """The gradients for the inputs that are wanted, by another sweep."""
        to_loss, to_ce, to_kl = upstream
        through_loss = None if to_loss is None or is_off(self.alpha) else self.alpha * to_loss
        with without_autocast(inputs[0].device.type):
            return self.sweep(inputs, _sum(to_loss, to_ce), _sum(through_loss, to_kl)).over(self.chunk, wanted, *inputs)


class _Fused(torch.autograd.Function):
    """loss, ce and kl, with the gradient of the loss made in the forward pass, and scaled in the backward pass.

    The gradients of ce and kl are made in the backward pass, by another sweep, if they are asked for. The first sweep
    is not kept until then: it holds the terms, which hold this function, a cycle that nothing would free.
    """

    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, sweep: Sweep, alpha: float | Tensor, *inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if inputs[0].dtype == torch.float16:  # 1 / n would vanish: n times the gradient is kept until the backward pass
            sweep.grad_scale = sweep.n_counted.clamp(min=1)
        gradients = sweep.over(problem.chunk, ctx.needs_input_grad[3:], *inputs)
        ce, kl = sweep.terms
        ctx.problem, ctx.grad_scale = problem, sweep.grad_scale
        ctx.save_for_backward(kl if ctx.needs_input_grad[2] else None, *inputs, *gradients)
        ctx.set_materialize_grads(False)
        return combined(ce, kl, alpha), ce, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        kl, *saved = ctx.saved_tensors
        inputs, gradients = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        asked = [grad for grad in upstream if grad is not None]
        if not asked:
            return (None,) * len(ctx.needs_input_grad)
        problem: _Problem = ctx.problem
        if torch.is_grad_enabled() or any(map(_compat.is_batched, asked)):  # create_graph, is_grads_batched
            return None, None, *problem.by_formula(inputs, upstream, ctx.needs_input_grad[2:])
        to_loss = upstream[0]
        if to_loss is not None and len(asked) == 1:
            scale = to_loss if ctx.grad_scale is None else to_loss / ctx.grad_scale
            gradients = [_scaled(gradient, scale) for gradient in gradients]
        else:
            gradients = problem.by_sweep(inputs, upstream, ctx.needs_input_grad[3:])
        to_alpha = kl * to_loss if ctx.needs_input_grad[2] and to_loss is not None else None
        return None, None, to_alpha, *map(_in_dtype_of, inputs, gradients)


class Sweep:
    """One pass over the rows of two views: both terms, and the gradient of ``ce_weight * ce + kl_weight * kl``.

    The terms are ce and kl themselves where ``ce_weight`` is 1.
    """

    grad_scale: Tensor | None = None
    """The gradient is multiplied by this; None is 1."""

    def __init__(
        self,
        target: Tensor,
        labels: Labels,
        classes: int,
        like: Tensor,
        ce_weight: float | Tensor,
        kl_weight: float | Tensor,
    ) -> None:
        self.labels = labels
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.class_weight = None if labels.weight is None else labels.weight.to(like.device, self.dtype)
        label, rows = target.expand(2, -1).unsqueeze(-1), target.numel()
        is_counted = target != labels.ignore_index
        self.total_weight = self.n_counted = n_counted = is_counted.sum(dtype=self.dtype)
        ignored: Tensor | None = None
        counted: Tensor | float = 1.0
        mean: Tensor | float = 1 / max(1, rows)
        if not _compat.is_readable(target) or n_counted.item() < rows:
            counted, mean = is_counted.unsqueeze(-1), 1 / n_counted.clamp(min=1)
            ignored = ~counted
            label = label.masked_fill(ignored, 0)
        self.kl_scale = mean / 4
        self.kl_grad_scale = self.kl_scale * kl_weight
        self.is_ce_alone = is_off(kl_weight)
        row_weight = counted
        if self.class_weight is not None:
            row_weight = self.class_weight[label[0]] * counted
            self.total_weight = row_weight.sum()
            mean = 1 / self.total_weight.where(self.total_weight != 0, 1)
        smoothing_scale: Tensor | float = counted * mean * (ce_weight * (-labels.label_smoothing / (2 * classes)))
        nll_scale: Tensor | float = row_weight * mean * (ce_weight * ((labels.label_smoothing - 1) / 2))
        if not isinstance(nll_scale, Tensor):
            nll_scale = like.new_full((), nll_scale, dtype=self.dtype)
        self.rows = _Rows(ignored, label, nll_scale.expand(label.shape), smoothing_scale)
        self.parts: list[tuple[Tensor, Tensor]] = []

    @cached_property
    def terms(self) -> tuple[Tensor, Tensor]:
        """ce and kl of the rows that were swept."""
        ce, kl = self.parts[0]
        if len(self.parts) > 1:
            ce, kl = (torch.stack(part).sum() for part in zip(*self.parts, strict=True))
        if not _compat.is_readable(kl) or math.isnan(kl.item()):
            # a class that one view masks is infinitely far, even where the other's underflows: 0 * inf
            kl = kl.where(~kl.isnan() | ce.isnan(), torch.inf)
        return ce, kl

    def over(self, chunk: int, wanted: Sequence[bool], first: Tensor, *head: Any) -> Sequence[Tensor | None]:
        """Sweep logits (2, N, C); or hidden states, a weight and a bias. Returns the gradients that are wanted."""
        if head:
            return self._head(chunk, wanted, first, *head)
        gradient = torch.empty_like(first, memory_format=torch.contiguous_format) if wanted[0] else None
        self._logits(first, gradient, chunk)
        return (gradient,)

    def _head(
        self, chunk: int, wanted: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Sequence[Tensor | None]:
        """The gradients for hidden states (2, N, D), weight and bias."""
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=self.dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=self.dtype) if bias is not None and wanted[2] else None
        for rows in _pieces(hidden.shape[1], chunk // (2 * len(weight))):
            states = hidden[:, rows]
            logits = F.linear(states, weight, bias).to(self.dtype)
            self._logits(logits, logits if any(wanted) else None, _CACHED if logits.is_cpu else chunk, rows.start)
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[:, rows] = grad_logits @ weight
            if grad_weight is not None and self.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.flatten(0, 1).T, states.flatten(0, 1))
            elif grad_weight is not None:
                grad_weight += grad_logits.flatten(0, 1).T @ states.flatten(0, 1)
            if grad_bias is not None:
                grad_bias += logits.sum((0, 1))
        return grad_hidden, grad_weight, grad_bias

    def _logits(self, logits: Tensor, gradient: Tensor | None, chunk: int, start: int = 0) -> None:
        """The logits (2, n, C) of the rows from ``start`` on, in chunks; the gradient may take their place."""
        step = max(1, chunk // (2 * logits.shape[2]))
        if logits.shape[1] > step:
            for rows in _pieces(logits.shape[1], step):
                place = None if gradient is None else gradient[:, rows]
                self._logits(logits[:, rows], place, chunk, start + rows.start)
            return
        wide = logits if logits.dtype == self.dtype else logits.to(self.dtype)
        out = gradient if wide is logits or gradient is None else wide
        self.parts.append(self._chunk(wide, self.rows.of(start, start + logits.shape[1]), out))
        if out is not None and self.grad_scale is not None:
            out.mul_(self.grad_scale)
        if gradient is not None and gradient is not out:
            gradient.copy_(wide)

    def _chunk(self, logits: Tensor, rows: _Rows, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """What some rows (2, n, C) add to ce and kl; their gradient is written to ``out``, which may be the logits."""
        if logits.shape[2] < _FEW_CLASSES:
            log_probs = rows.mask(torch.log_softmax(logits, -1))
            probs = torch.exp(log_probs, out=out)
        else:
            log_probs = rows.mask(logits - logits.amax(-1, keepdim=True))
            probs = torch.empty_like(log_probs) if out is None else out
            for shifted, prob in zip(log_probs, probs, strict=True):
                torch.softmax(shifted, -1, out=prob)
            log_probs += probs.amax(-1, keepdim=True).log_()  # exp(0) / sum(exp)
        log_p, log_q = log_probs.unbind(0)
        p, q = probs.unbind(0)

        ce = (log_probs.gather(-1, rows.label) * rows.nll_scale).sum()
        if self.labels.label_smoothing:
            weighted = log_probs if self.class_weight is None else log_probs * self.class_weight
            ce += (weighted.sum(-1, keepdim=True) * rows.smoothing_scale).sum()
        # a class that neither view allows has no part in the sum
        log_ratio = (log_p - log_q).nan_to_num_(0.0, torch.inf, -torch.inf)
        difference = p - q
        kl = difference.flatten().dot(log_ratio.flatten()) * self.kl_scale
        if out is not None:
            # the gradient for log p and log q takes their place, and then passes through the softmax
            if self.is_ce_alone:
                log_probs.zero_()
            else:
                torch.addcmul(difference, probs, log_ratio, out=log_probs)
                log_q.neg_()
                log_probs.mul_(self.kl_grad_scale)
            log_probs.scatter_add_(-1, rows.label, rows.nll_scale)
            if self.labels.label_smoothing:
                weight = 1.0 if self.class_weight is None else self.class_weight
                log_probs += rows.smoothing_scale * weight
            torch.addcmul(log_probs, probs, log_probs.sum(-1, keepdim=True), value=-1, out=probs)
        return ce, kl


class _Rows(NamedTuple):
    """How n rows count."""

    ignored: Tensor | None  # (n, 1), or None where all count
    label: Tensor  # (2, n, 1); 0 where it does not count
    nll_scale: Tensor  # (2, n, 1): the factor of log p(y) in ce, not positive
    smoothing_scale: Tensor | float  # (n, 1), or a scalar for all: that of w_c log p_c for every c, likewise

    def mask(self, values: Tensor) -> Tensor:
        """In place: 0 for the rows that do not count, whatever stands there."""
        return values if self.ignored is None else values.masked_fill_(self.ignored, 0)

    def of(self, start: int, stop: int) -> _Rows:
        """Those from ``start`` to ``stop``."""
        if stop - start >= self.label.shape[1]:
            return self
        parts: list[Any] = [
            part[..., start:stop, :] if isinstance(part, Tensor) and part.dim() else part for part in self
        ]
        return _Rows(*parts)


def _pieces(rows: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step))


def _sum(*parts: Tensor | None) -> float | Tensor:
    return sum(part for part in parts if part is not None)


def _scaled(gradient: Tensor | None, scale: Tensor) -> Tensor | None:
    """The product; in place where the gradient cannot be asked for again."""
    if gradient is None:
        return None
    if _compat.graph_is_kept():
        return gradient * scale
    if not _compat.is_readable(scale) or scale.item() != 1:
        gradient.mul_(scale)
    return gradient


def _in_dtype_of(part: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient if part is None or gradient is None else gradient.to(part.dtype)
