"""Access to Lightning under either of its names, `pytorch_lightning` and `lightning.pytorch`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

LIGHTNINGS = ("pytorch_lightning", "lightning.pytorch")
"""The module names of the two distributions."""


def _installed() -> list[ModuleType]:
    found = []
    for name in LIGHTNINGS:
        try:
            found.append(import_module(name))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # Lightning is installed, but one of its dependencies is not
    return found


if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer
    from pytorch_lightning.utilities import rank_zero_info as rank_zero_info

    MixinBase = LightningModule
else:
    # Each distribution requires callbacks to inherit its own `Callback`, so one class inherits both.
    Callback = type("Callback", tuple(lightning.Callback for lightning in _installed()), {"__module__": __name__})
    MixinBase = object  # the user's class inherits LightningModule, from either distribution
    rank_zero_info = import_module(f"{_installed()[0].__name__}.utilities").rank_zero_info


def trainer_of(module: Any) -> Any:
    """The Trainer (or Fabric) that runs a LightningModule; None for any other or unattached module."""
    try:
        return getattr(module, "trainer", None)
    except RuntimeError:  # not attached
        return None


def on_all_ranks(module: Any, decision: bool) -> bool:
    """Whether a decision is True on every rank."""
    trainer = trainer_of(module)
    return decision if trainer is None else bool(trainer.strategy.reduce_boolean_decision(decision))


def monitored_checkpoint(trainer: Trainer) -> Any:
    """The first ``ModelCheckpoint`` that monitors a metric; None if there is none.

    Lightning's ``ckpt_path="best"`` uses the first one of any kind, which may only keep the latest weights.
    """
    return next((one for one in trainer.checkpoint_callbacks if getattr(one, "monitor", None)), None)


def searches_learning_rate(trainer: Any) -> bool:
    """Whether the Trainer runs its learning rate finder, whose steps may diverge and are undone."""
    return any(type(callback).__name__ == "_LRCallback" for callback in getattr(trainer, "callbacks", ()))


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the Trainer runs a few batches to find errors (``fast_dev_run``)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by its connector


def extend_hook(cls: type, name: str, first: Callable[..., None]) -> None:
    """Call ``first`` once before a hook of a class, whether or not an override of the hook calls ``super()``."""
    hook = getattr(cls, name, None)
    if hook is None or hasattr(hook, "extended"):  # not a LightningModule yet, or extended in a base
        return

    @functools.wraps(hook)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        running: set[str] = vars(self).setdefault("_rdrop_running_hooks", set())
        if name in running:  # called by super() in an override
            return hook(self, *args, **kwargs)
        running.add(name)
        try:
            first(self, *args, **kwargs)
            return hook(self, *args, **kwargs)
        finally:
            running.remove(name)

    extended.extended = True  # type: ignore[attr-defined]
    setattr(cls, name, extended)
