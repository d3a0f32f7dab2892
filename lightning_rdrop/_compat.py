"""The private APIs of torch and Lightning that earn their place, each with a fallback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


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
