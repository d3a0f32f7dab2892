"""One pass over the rows of two views, chunk by chunk, while a chunk is in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop import _compat
from lightning_rdrop._fused.chunk import infinite
from lightning_rdrop._fused.compiled import compiled
from lightning_rdrop._fused.in_place import Scratch, in_place
from lightning_rdrop._fused.rows import Counted, Rows

_CACHED = 2**19
"""Logits of a chunk on a CPU: 2 MiB of float32, which stay in its cache while they are processed."""

_COMPILED = 2**20
"""Those of a chunk whose arithmetic is compiled, where the call takes more of the time."""

_FEW = 2**15
"""Below, the call of what was compiled takes more time on a CPU than eager arithmetic does."""

_HELD = 2**22
"""Logits that the head holds at once on a CPU: 16 MiB of float32."""

_ROWS = 64
"""Rows of a view that it holds at the least: with fewer, reading its weight takes longer than the matrix product."""

_STREAMED = 2**24
"""Each of them on another device: 64 MiB of float32."""


class Sweep:
    """One pass over the rows of two views: both terms, and the gradient of ``ce_weight * ce + kl_weight * kl``.

    Args:
        counted: the rows.
        ce_weight: a number or a tensor ().
        kl_weight: likewise.
        chunk: the number of logits that are processed at once; None is what suits the device.
        compile: whether the arithmetic is compiled.
    """

    grad_scale: Tensor | None = None
    """The gradient is multiplied by this; None is 1."""

    def __init__(
        self,
        counted: Counted,
        ce_weight: float | Tensor,
        kl_weight: float | Tensor,
        chunk: int | None,
        compile: bool,
    ) -> None:
        self.counted, self.dtype = counted, counted.n_labels.dtype
        self.ce_weight, self.kl_weight = ce_weight, kl_weight
        self.chunk, self.compile = chunk, compile
        self.parts: list[tuple[Tensor, Tensor]] = []
        self._scratch = Scratch()

    def terms(self) -> tuple[Tensor, Tensor]:
        """ce and kl of the rows that were swept."""
        ce, kl = self.parts[0]
        if len(self.parts) > 1:
            ce, kl = (torch.stack(part).sum() for part in zip(*self.parts, strict=True))
        if not _compat.is_readable(kl) or math.isnan(kl.item()):
            kl = infinite(ce, kl)
        return ce, kl

    @cached_property
    def _scaled_weights(self) -> tuple[Tensor, Tensor]:
        """Those of ce and kl in the gradient that is written, as tensors: a number would be a graph of its own."""
        ce_weight, kl_weight = (
            torch.as_tensor(weight, dtype=self.dtype, device=self.counted.n_labels.device)
            for weight in (self.ce_weight, self.kl_weight)
        )
        scale = self.grad_scale
        return (ce_weight, kl_weight) if scale is None else (ce_weight * scale, kl_weight * scale)

    def over(self, wanted: Sequence[bool], first: Tensor, *head: Any) -> Sequence[Tensor | None]:
        """Sweep logits (2, N, C); or hidden states, a weight and a bias. Returns the gradients that are wanted."""
        if head:
            return self._head(wanted, first, *head)
        gradient = torch.empty_like(first, memory_format=torch.contiguous_format) if wanted[0] else None
        self._logits(first, gradient, self.chunk)
        return (gradient,)

    def _head(
        self, wanted: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Sequence[Tensor | None]:
        """The gradients for hidden states (2, N, D), weight and bias."""
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=self.dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=self.dtype) if bias is not None and wanted[2] else None
        held = self.chunk or max(_HELD if hidden.is_cpu else _STREAMED, 2 * _ROWS * len(weight))
        pieces = [*_pieces(hidden.shape[1], held // (2 * len(weight)))]
        memory = hidden.new_empty(2 * (pieces[0].stop - pieces[0].start) * len(weight))  # of all chunks, one by one
        for rows in pieces:
            states = hidden[:, rows].flatten(0, 1)
            product = memory[: len(states) * len(weight)].view(len(states), len(weight))
            if bias is None:
                torch.mm(states, weight.T, out=product)
            else:
                torch.addmm(bias, states, weight.T, out=product)
            logits = product.to(self.dtype).view(2, len(states) // 2, len(weight))
            self._logits(logits, logits if any(wanted) else None, None if logits.is_cpu else held, rows.start)
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[:, rows] = grad_logits @ weight
            if grad_weight is not None and self.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.flatten(0, 1).T, states)
            elif grad_weight is not None:
                grad_weight += grad_logits.flatten(0, 1).T @ states
            if grad_bias is not None:
                grad_bias += logits.sum((0, 1))
        return grad_hidden, grad_weight, grad_bias

    def _logits(self, logits: Tensor, gradient: Tensor | None, chunk: int | None, start: int = 0) -> None:
        """The logits (2, n, C) of the rows from ``start`` on, in chunks; the gradient may take their place."""
        is_compiled = self.compile and gradient is not None and not (logits.is_cpu and logits.numel() < _FEW)
        if chunk is None:
            chunk = _STREAMED if not logits.is_cpu else _COMPILED if is_compiled else _CACHED
        for rows in _pieces(logits.shape[1], chunk // (2 * logits.shape[2])):
            part, place = logits, gradient
            if rows.stop < logits.shape[1] or rows.start:
                part, place = logits[:, rows], None if gradient is None else gradient[:, rows]
            factors = self.counted.rows.of(start + rows.start, start + rows.stop)
            found = self._compiled(part, factors, place) if is_compiled and place is not None else None
            self.parts.append(self._eager(part, factors, place, part is logits) if found is None else found)

    def _compiled(self, logits: Tensor, rows: Rows, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        out = torch.empty_like(logits) if gradient.data_ptr() == logits.data_ptr() else gradient
        found = compiled(logits, rows, self.counted.class_weight, *self._scaled_weights, out)
        if found is not None and out is not gradient:
            gradient.copy_(out)
        return found

    def _eager(self, logits: Tensor, rows: Rows, gradient: Tensor | None, alone: bool) -> tuple[Tensor, Tensor]:
        wide = logits if logits.dtype == self.dtype else logits.to(self.dtype)
        out = gradient if wide is logits or gradient is None else wide
        if not alone and not self._scratch.fits(wide):
            self._scratch = Scratch.like(wide)
        scratch = Scratch() if alone else self._scratch
        found = in_place(wide, rows, self.counted.class_weight, self.ce_weight, self.kl_weight, out, scratch)
        if out is not None and self.grad_scale is not None:
            out.mul_(self.grad_scale)
        if gradient is not None and gradient is not out:
            gradient.copy_(wide)
        return found


def _pieces(rows: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step))
