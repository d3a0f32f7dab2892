"""One pass over the rows of two views, in chunks that fit in the cache."""

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
"""Logits per chunk on a CPU: 2 MiB of float32, which stay in its cache while they are processed."""

_COMPILED = 2**20
"""Logits per compiled chunk on a CPU, where the overhead of a call is larger."""

_FEW = 2**15
"""With fewer logits on a CPU, calling the compiled function takes longer than eager arithmetic."""

_STREAMED, _STREAMED_COMPILED = 2**24, 2**27
"""Logits per chunk on other devices, eager and compiled, where launches cost more than a cache saves."""

_HELD = 2**22
"""Logits that the head stores at once: 16 MiB of float32, or more to reach the number of rows below."""

_ROWS, _STREAMED_ROWS = 64, 1024
"""Minimum rows per view that the head processes at once, on a CPU and elsewhere: with fewer, reading the weight and
accumulating its gradient takes longer than the matrix products."""


class Sweep:
    """One pass over the rows of two views: both terms, and the gradient of ``ce_weight * ce + kl_weight * kl``.

    Args:
        counted: the rows.
        ce_weight, kl_weight: a number or a tensor ().
        chunk: the number of logits processed at once; None chooses it by the device.
        compile: whether to compile the arithmetic.
    """

    grad_scale: Tensor | None = None
    """Factor of the gradient; None is 1."""

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
        """The weights of ce and kl in the scaled gradient, as tensors: each number would need its own graph."""
        like = self.counted.n_labels
        ce_weight, kl_weight = (
            weight.to(like) if isinstance(weight, Tensor) else torch.full_like(like, weight)  # no host-to-device copy
            for weight in (self.ce_weight, self.kl_weight)
        )
        scale = self.grad_scale
        return (ce_weight, kl_weight) if scale is None else (ce_weight * scale, kl_weight * scale)

    def over(self, wanted: Sequence[bool], first: Tensor, *head: Any) -> Sequence[Tensor | None]:
        """Sweep logits (2, N, C), or hidden states, a weight and a bias, and return the wanted gradients."""
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
        least = _ROWS if hidden.is_cpu else _STREAMED_ROWS
        held = self.chunk or max(_HELD, 2 * least * len(weight))
        pieces = [*_pieces(hidden.shape[1], held // (2 * len(weight)))]
        memory = hidden.new_empty(2 * (pieces[0].stop - pieces[0].start), len(weight))  # reused by all chunks
        place = torch.empty_like(memory) if self.compile else memory  # compiled code does not overwrite the logits
        for rows in pieces:
            states = hidden[:, rows].flatten(0, 1)
            logits, gradient = memory[: len(states)], place[: len(states)]
            if bias is None:
                torch.mm(states, weight.T, out=logits)
            else:
                torch.addmm(bias, states, weight.T, out=logits)
            views, slopes = (part.view(2, len(states) // 2, len(weight)) for part in (logits, gradient))
            self._logits(views, slopes if any(wanted) else None, None, rows.start)
            if grad_hidden is not None:
                grad_hidden[:, rows] = slopes @ weight
            if grad_weight is not None:
                _compat.add_product(grad_weight, gradient.T, states)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=self.dtype)
        return grad_hidden, grad_weight, grad_bias

    def _logits(self, logits: Tensor, gradient: Tensor | None, chunk: int | None, start: int = 0) -> None:
        """Process the logits (2, n, C) of the rows from ``start`` in chunks; in eager mode ``gradient`` may be them."""
        is_compiled = self.compile and gradient is not None and not (logits.is_cpu and logits.numel() < _FEW)
        if chunk is None and logits.is_cpu:
            chunk = _COMPILED if is_compiled else _CACHED
        elif chunk is None:
            chunk = _STREAMED_COMPILED if is_compiled else _STREAMED
        for rows in _pieces(logits.shape[1], chunk // (2 * logits.shape[2])):
            part, place = logits, gradient
            if rows.stop < logits.shape[1] or rows.start:
                part, place = logits[:, rows], None if gradient is None else gradient[:, rows]
            factors = self.counted.rows.of(start + rows.start, start + rows.stop)
            found = None
            if is_compiled and place is not None:
                found = compiled(part, factors, self.counted.class_weight, *self._scaled_weights, place)
            self.parts.append(self._eager(part, factors, place, part is logits) if found is None else found)

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
