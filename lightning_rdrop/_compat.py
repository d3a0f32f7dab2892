"""Private names of other packages, each in a function with a fallback in case the name is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def graph_is_kept() -> bool:
    """Whether the current backward pass has ``retain_graph=True``; True if unknown.

    Then a gradient may be needed again and must not be scaled in place.
    """
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active, under which tensors must not be written in place."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


def is_traced() -> bool:
    """Whether tensors are only traced, by ``torch.compile`` or by a transform of ``torch.func``."""
    return torch.compiler.is_compiling() or is_transformed()


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting: it is on the CPU and not traced."""
    return tensor.is_cpu and not is_traced()


def is_batched(tensor: Tensor) -> bool:
    """Whether it represents a batch of tensors, such as a gradient under ``is_grads_batched=True`` or ``vmap``."""
    legacy = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
    return is_transformed() or (legacy is not None and bool(legacy(tensor)))


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is one rank's shard of a parameter under FSDP2 (a DTensor) or FSDP."""
    return hasattr(parameter, "full_tensor") or getattr(parameter, "_fsdp_flattened", False)


def has_sharded_weights(network: nn.Module) -> bool:
    """Whether its weights are sharded across ranks, so that all ranks must run the same passes."""
    made = (parameter for parameter in network.parameters() if not is_lazy(parameter))
    return any(is_sharded(parameter) or not parameter.numel() for parameter in made)


def passes_synchronize(network: nn.Module) -> bool:
    """Whether its passes communicate between ranks (sharded weights or SyncBatchNorm), so each must run as many."""
    return has_sharded_weights(network) or any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())


def mark_rows_dynamic(*tensors: Tensor) -> None:
    """Mark the first dimension as dynamic, so that a function compiled for these tensors takes any number of rows.

    If torch has no such function, it recompiles once, for a second number of rows.
    """
    mark = getattr(getattr(torch, "_dynamo", None), "mark_dynamic", None)
    for tensor in tensors:
        if mark is not None:
            mark(tensor, 0)


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add a matrix product to a total in place; the total may have a wider dtype than the factors.

    If torch has no such product, it is computed in the dtype of the factors and then added.
    """
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    elif total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, first, second, out_dtype=total.dtype, out=total)
    else:
        total += first @ second


def is_compiled(module: nn.Module) -> bool:
    """Whether it is a module compiled by ``torch.compile``."""
    return hasattr(module, "_orig_mod")


def forget_hyperparameters(module: Any, names: Iterable[str]) -> None:
    """Remove modules, and lists or mappings of modules, from the hyperparameters that Lightning saved.

    ``hparams_initial`` returns a copy, so the original is changed by its private name. If that is missing, checkpoints
    are still without the modules, but loggers write them.
    """
    for saved in (module.hparams, getattr(module, "_hparams_initial", {})):
        for name in names:
            if _contains_module(saved.get(name)):
                del saved[name]


def _contains_module(value: Any) -> bool:
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return any(map(_contains_module, parts)) if isinstance(parts, (list, tuple)) else isinstance(value, nn.Module)


def eagerly() -> AbstractContextManager[Any]:
    """Context in which compiled code runs eagerly, so that it is not recompiled for another mode.

    Needs torch 2.6; with earlier versions it is recompiled.
    """
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")
