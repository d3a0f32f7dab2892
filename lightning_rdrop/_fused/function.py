"""The terms of two views as an autograd function whose gradient is computed in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop import _compat
from lightning_rdrop._fused.compiled import is_enabled
from lightning_rdrop._fused.rows import Counted, counted
from lightning_rdrop._fused.sweep import Sweep
from lightning_rdrop.composite import composite
from lightning_rdrop.labels import Labels, RowWeights
from lightning_rdrop.terms import Terms, combined, is_off

Gradients = Sequence[Tensor | None]


def fused(
    inputs: tuple[Any, ...],
    target: Tensor,
    alpha: float | Tensor,
    labels: Labels,
    weights: RowWeights,
    chunk: int | None,
    compile: bool,
) -> Terms:
    """The terms of two views, with the gradient of the loss computed in the forward pass.

    Args:
        inputs: logits (2, N, C); or hidden states (2, N, D), a weight (C, D), and a bias (C,) or None.
        target: shape (N,) of class indices.
        alpha: the weight of kl.
        labels: the other arguments of the cross-entropy.
        weights: the weight of each row in each term.
        chunk: the number of logits processed at once; None chooses it by the device.
        compile: whether to compile the arithmetic, also enabled by :func:`compiled_loss`.
    """
    classes = inputs[0].shape[2] if len(inputs) == 1 else len(inputs[1])
    known = counted(target, labels, weights, classes, torch.promote_types(inputs[0].dtype, torch.float32))
    problem = _Problem(target, alpha, labels, weights, known, chunk, compile or is_enabled())
    sweep = problem.sweep(1.0, alpha)
    loss, ce, kl = _Fused.apply(problem, sweep, alpha, *inputs)  # type: ignore[no-untyped-call]
    return known.terms(loss, ce, kl)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast on a device type."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Problem(NamedTuple):
    """Everything that defines the loss except its inputs."""

    target: Tensor
    alpha: float | Tensor
    labels: Labels
    weights: RowWeights
    counted: Counted
    chunk: int | None
    compile: bool

    def sweep(self, ce_weight: float | Tensor, kl_weight: float | Tensor) -> Sweep:
        """A sweep that computes the gradient of ``ce_weight * ce + kl_weight * kl``."""
        return Sweep(self.counted, ce_weight, kl_weight, self.chunk, self.compile)

    def by_formula(self, inputs: Sequence[Any], upstream: Gradients, wanted: Sequence[bool]) -> list[Tensor | None]:
        """The wanted gradients for alpha and the inputs, by autograd of the formula."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(inputs[0].device.type):
            logits = inputs[0] if len(inputs) == 1 else F.linear(*inputs)
            terms = composite(logits, self.target, self.alpha, self.labels, self.weights)
        asked = [grad is not None for grad in upstream]
        outputs = [*compress((terms.loss, terms.ce, terms.kl), asked)]
        sources = [*compress((self.alpha, *inputs), wanted)]
        found = torch.autograd.grad(
            outputs, sources, [*compress(upstream, asked)], create_graph=create_graph, allow_unused=True
        )
        remaining = iter(found)
        return [next(remaining) if want else None for want in wanted]

    def by_sweep(self, inputs: Sequence[Any], upstream: Gradients, wanted: Sequence[bool]) -> Gradients:
        """The wanted gradients for the inputs, by another sweep."""
        to_loss, to_ce, to_kl = upstream
        through_loss = None if to_loss is None or is_off(self.alpha) else self.alpha * to_loss
        with without_autocast(inputs[0].device.type):
            return self.sweep(_sum(to_loss, to_ce), _sum(through_loss, to_kl)).over(wanted, *inputs)


class _Fused(torch.autograd.Function):
    """loss, ce and kl, with the gradient of the loss computed in the forward pass and scaled in the backward pass.

    If the gradients of ce or kl are needed, another sweep computes them in the backward pass. The first sweep is not
    kept until then: it holds the terms, which hold this function, a reference cycle that would never be freed.
    """

    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, sweep: Sweep, alpha: float | Tensor, *inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if inputs[0].dtype == torch.float16:  # 1 / n would underflow: store n times the gradient until backward
            sweep.grad_scale = problem.counted.n_labels.clamp(min=1)
        gradients = sweep.over(ctx.needs_input_grad[3:], *inputs)
        ce, kl = sweep.terms()
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


def _sum(*parts: Tensor | None) -> float | Tensor:
    return sum(part for part in parts if part is not None)


def _scaled(gradient: Tensor | None, scale: Tensor) -> Tensor | None:
    """The product; in place unless the graph is kept for another backward pass."""
    if gradient is None:
        return None
    if _compat.graph_is_kept():
        return gradient * scale
    if not _compat.is_readable(scale) or scale.item() != 1:
        gradient.mul_(scale)
    return gradient


def _in_dtype_of(part: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient if part is None or gradient is None else gradient.to(part.dtype)
