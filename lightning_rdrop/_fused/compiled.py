"""The arithmetic of a chunk, compiled once for all numbers of rows and alphas, and again if C changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from lightning_rdrop import _compat
from lightning_rdrop._fused.chunk import Factors, blanked, gradient_of, normalized, terms_of
from lightning_rdrop._fused.rows import Rows

_ENABLED: ContextVar[bool] = ContextVar("_ENABLED", default=False)
_COMPILED: dict[tuple[object, ...], bool] = {}
"""Whether each kind of chunk could be compiled; one that failed is not tried again."""


def compiled_loss(compile: bool = True) -> AbstractContextManager[None]:
    """A context in which losses compile their arithmetic, like ``compile=True`` of the functions.

    Inside a compiled step it does nothing.
    """
    return nullcontext() if torch.compiler.is_compiling() else _enabled(compile)


@contextmanager
def _enabled(compile: bool) -> Iterator[None]:
    token = _ENABLED.set(compile)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def is_enabled() -> bool:
    """Whether losses compile their arithmetic in this context."""
    return _ENABLED.get()


def compiled(
    logits: Tensor, rows: Rows, class_weight: Tensor | None, ce_weight: Tensor, kl_weight: Tensor, out: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What n rows add to ce and kl; the gradient of ``ce_weight * ce + kl_weight * kl`` is written to ``out``.

    Returns None if there is no compiler or it fails, and warns about that once.

    Args:
        logits: shape (2, n, C).
        rows: their factors.
        class_weight: shape (C,), or None.
        ce_weight, kl_weight: shape ().
        out: same shape as the logits, but not the same memory.
    """
    factors = rows.factors(class_weight, ce_weight.dtype)
    kind = (logits.device.type, logits.dtype, out.dtype, logits.shape[2], *(part is None for part in factors))
    if len(factors.label) < 2 or not _COMPILED.get(kind, True):  # a single row would need its own graph
        return None
    # detached, so that no guard depends on the tensor that a chunk is a view of
    by_row = [part.detach() for part in (*map(Tensor.contiguous, logits.unbind(0)), *out.unbind(0))]
    columns = [None if part is None else part.detach() for part in factors[:-1]]
    if kind not in _COMPILED:
        _compat.mark_rows_dynamic(*by_row, *(part for part in columns if part is not None))
    try:
        found = _compiled()(*by_row, ce_weight.detach(), kl_weight.detach(), *columns, class_weight)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _COMPILED[kind] = False
        warnings.warn(
            f"The loss could not be compiled and is computed in eager mode: {' '.join(str(error).split())[:300]}",
            stacklevel=2,
        )
        return None
    _COMPILED[kind] = True
    return found


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_write, fullgraph=True)


def _write(
    first: Tensor,
    second: Tensor,
    to_first: Tensor,
    to_second: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *factors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    known = Factors(*factors)  # type: ignore[arg-type]
    first, second = blanked(first, known), blanked(second, known)
    views, one, other = normalized(first, second)
    ce, kl, first_mean, second_mean = terms_of(first, second, views, one, other, known)
    gradients = gradient_of(views, first_mean, second_mean, known, ce_weight, kl_weight)
    to_first.copy_(gradients[0])
    to_second.copy_(gradients[1])
    return ce, kl
