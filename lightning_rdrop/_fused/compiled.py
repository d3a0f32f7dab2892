"""The arithmetic of a chunk, compiled: once for any number of rows, of classes and any alpha."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from lightning_rdrop._fused.chunk import Factors, gradient_of, terms_of
from lightning_rdrop._fused.rows import Rows

_ASKED: ContextVar[bool] = ContextVar("_ASKED", default=False)
_FAILED: set[tuple[object, ...]] = set()
"""What could not be compiled, which is not tried again."""


@contextmanager
def compiled_loss(compile: bool = True) -> Iterator[None]:
    """A context in which losses compile their arithmetic, as ``compile=True`` of the functions does."""
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
    kind = (logits.device.type, logits.dtype, out.dtype, rows.smoothing is None, class_weight is None)
    if len(rows.label) < 2 or kind in _FAILED:  # a graph of one row is another one than that of several
        return None
    columns = (None if part is None else part.contiguous() for part in (rows.label, rows.nll, rows.kl_column, rows.smoothing))
    # detached, so that no guard looks at the tensor of which a chunk is a view
    tensors = (*logits.contiguous().unbind(0), *out.unbind(0), *columns, class_weight, ce_weight, kl_weight)
    try:
        return _compiled()(*(None if tensor is None else tensor.detach() for tensor in tensors))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _FAILED.add(kind)
        warnings.warn(
            f"The loss could not be compiled, and is computed without: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:300]}",
            stacklevel=2,
        )
        return None


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_write, dynamic=True, fullgraph=True)


def _write(
    first: Tensor,
    second: Tensor,
    to_first: Tensor,
    to_second: Tensor,
    label: Tensor,
    nll: Tensor,
    kl: Tensor,
    smoothing: Tensor | None,
    class_weight: Tensor | None,
    ce_weight: Tensor,
    kl_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    factors = Factors(label, nll, kl, smoothing, class_weight)
    ce, kl_sum, moments = terms_of(first, second, factors)
    gradients = gradient_of(first, second, factors, moments, ce_weight, kl_weight)
    to_first.copy_(gradients[0])
    to_second.copy_(gradients[1])
    return ce, kl_sum
