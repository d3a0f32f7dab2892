"""The arithmetic of a chunk, compiled: once for any number of rows and any alpha, twice for any number of classes."""

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

_ASKED: ContextVar[bool] = ContextVar("_ASKED", default=False)
_COMPILED: dict[tuple[object, ...], bool] = {}
"""Whether a kind of chunk could be compiled; one that could not is not tried again."""


def compiled_loss(compile: bool = True) -> AbstractContextManager[None]:
    """A context in which losses compile their arithmetic, as ``compile=True`` of the functions does.

    Inside a step that is compiled as a whole there is nothing to ask for.
    """
    return nullcontext() if torch.compiler.is_compiling() else _asking(compile)


@contextmanager
def _asking(compile: bool) -> Iterator[None]:
    token = _ASKED.set(compile)
    try:
        yield
    finally:
        _ASKED.reset(token)


def is_asked() -> bool:
    """Whether a loss is to compile its arithmetic."""
    return _ASKED.get()


def compiled(
    logits: Tensor, rows: Rows, class_weight: Tensor | None, ce_weight: Tensor, kl_weight: Tensor, out: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What some rows add to ce and kl; the gradient of ``ce_weight * ce + kl_weight * kl`` is written to ``out``.

    Returns None where there is no compiler, or it fails, of which a warning tells once.

    Args:
        logits: shape (2, n, C).
        rows: how they count.
        class_weight: shape (C,), or None.
        ce_weight, kl_weight: shape ().
        out: same shape as the logits, but not the same memory.
    """
    factors = rows.factors(class_weight, ce_weight.dtype)
    kind = (logits.device.type, logits.dtype, out.dtype, logits.shape[2], *(part is None for part in factors))
    if len(factors.label) < 2 or not _COMPILED.get(kind, True):  # one row would be a graph of its own
        return None
    # detached, so that no guard looks at the tensor of which a chunk is a view
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
            f"The loss could not be compiled, and is computed without: {' '.join(str(error).split())[:300]}",
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
