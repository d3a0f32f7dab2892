"""Private names of other packages, each in a function that says what happens where the name is missing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def graph_is_kept() -> bool:
    """Whether the backward pass that is running has ``retain_graph=True``; True if torch does not tell.

    A gradient that may be asked for again must not be scaled in place.
    """
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active, under which no tensor may be written in place."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


def is_traced() -> bool:
    """Whether tensors are only traced, by ``torch.compile`` or by a transform of ``torch.func``."""
    return torch.compiler.is_compiling() or is_transformed()


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be read at once: they are on the CPU, and stand for themselves."""
    return tensor.is_cpu and not is_traced()


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for a batch of tensors, as a gradient does under ``is_grads_batched=True`` or ``vmap``."""
    legacy = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
    return is_transformed() or (legacy is not None and bool(legacy(tensor)))


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is one rank's part of a parameter, under FSDP2 (a DTensor) or FSDP."""
    return hasattr(parameter, "full_tensor") or getattr(parameter, "_fsdp_flattened", False)


def mark_rows_dynamic(*tensors: Tensor) -> None:
    """Have a function that is compiled for these tensors compiled for any number of rows.

    Where torch cannot be told, it finds out by compiling once more, for a second number.
    """
    mark = getattr(getattr(torch, "_dynamo", None), "mark_dynamic", None)
    for tensor in tensors:
        if mark is not None:
            mark(tensor, 0)


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add a matrix product to a total, which may be in a wider dtype than the factors.

    Where torch has no such product, it is made in the dtype of the factors, and then added.
    """
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    elif total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, first, second, out_dtype=total.dtype, out=total)
    else:
        total += first @ second


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` makes of a module."""
    return hasattr(module, "_orig_mod")


def forget_hyperparameters(module: Any, names: Iterable[str]) -> None:
    """Take modules, and lists of modules, out of the hyper-parameters that Lightning saved.

    ``hparams_initial`` hands out a copy, so its original is reached by its private name; without it the modules are
    still out of checkpoints, and only a logger writes them down.
    """
    for saved in (module.hparams, getattr(module, "_hparams_initial", {})):
        for name in names:
            value = saved.get(name)
            parts = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(part, nn.Module) for part in parts):
                del saved[name]


def eagerly() -> AbstractContextManager[Any]:
    """A context in which what ``torch.compile`` made runs as it was written, and is not compiled for another mode.

    Torch has it since 2.6; before, it is compiled once more.
    """
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")
