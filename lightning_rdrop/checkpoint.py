"""What checkpoints contain of the loss: the modules, which are no hyperparameters, and the numbers, which may be."""

from __future__ import annotations

import inspect
import warnings
from types import FrameType
from typing import Any, ClassVar

from torch import nn

from lightning_rdrop._compat import forget_hyperparameters
from lightning_rdrop._lightning import extend_hook, rank_zero_info
from lightning_rdrop.description import describe, rebuild, same_description, spell
from lightning_rdrop.distance import Distance
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.regularizers import Regularizer, distinct, logged_names

WEIGHTS = ("rdrop_alpha", "rdrop_unlabeled_weight", "rdrop_labeled_weight")
"""Attributes that callbacks may set during training."""
_NUMBERS = (*WEIGHTS, "rdrop_views")
"""Compared but never replaced on load: hyperparameters come from the constructor or, if saved, from Lightning."""


class Checkpointed(Hooks):
    """Describes the arguments of the loss in checkpoints; :class:`~lightning_rdrop.RDropMixin` inherits it.

    A description is made of plain values and loads under ``weights_only=True``; the modules themselves would not.
    """

    rdrop_unsaved: ClassVar[tuple[str, ...]] = ("rdrop_distance", "rdrop_regularizers")
    """Arguments that are modules and therefore not saved as hyperparameters."""
    rdrop_regularizers: nn.ModuleList
    """Further loss terms."""
    rdrop_views: int
    """The number of predictions per example."""
    _rdrop_defaults: dict[str, Any]
    """What the arguments of the loss are if neither passed nor assigned; a checkpoint replaces such modules."""
    _rdrop_own: dict[str, float]
    """The module's own weights, while callbacks set the attributes of these names."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        extend_hook(cls, "on_save_checkpoint", Checkpointed._rdrop_save)
        extend_hook(cls, "on_load_checkpoint", Checkpointed._rdrop_load)

    def save_hyperparameters(
        self, *args: Any, ignore: Any = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Like Lightning's, without module arguments, which ``weights_only=True`` could not load.

        Plain configuration for them, as passed by the CLI, is kept.
        """
        current = inspect.currentframe()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"Attribute '({'|'.join(self.rdrop_unsaved)})'")
            super().save_hyperparameters(
                *args, ignore=ignore, frame=frame or (current and current.f_back), logger=logger
            )
        forget_hyperparameters(self, self.rdrop_unsaved)

    def _rdrop_save(self, checkpoint: dict[str, Any]) -> None:
        """Save a description of the arguments of the loss."""
        checkpoint["rdrop"] = self._rdrop_described()

    def _rdrop_load(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the saved modules that are not given here; warn about what differs or cannot be rebuilt."""
        self._rdrop_own = own_weights(self)  # no callback has changed them yet
        if "rdrop" not in checkpoint:
            rank_zero_info(
                "The checkpoint does not say which rdrop_distance and rdrop_regularizers it was trained with. Keeping "
                f"those of {type(self).__name__}: {spell(self._rdrop_described()['rdrop_distance'])} and "
                f"{spell(self._rdrop_described()['rdrop_regularizers'])}."
            )
        for name, saved in checkpoint.get("rdrop", {}).items():
            now = self._rdrop_described()[name]
            given = loss_arguments(self)[name] != self._rdrop_defaults.get(name)  # modules are equal if identical
            if same_description(saved, now) or (given and name in _NUMBERS):
                continue
            try:
                if given or name in _NUMBERS:
                    raise ValueError(f"{spell(now)} {'was given here' if given else 'is the default'}")
                if name == "rdrop_distance":
                    self.rdrop_distance = rebuild(saved, Distance).to(self.device)
                else:
                    made = [rebuild(one, Regularizer).to(self.device) for one in saved]
                    self.rdrop_regularizers = nn.ModuleList(distinct(made, logged_names(self.rdrop_distance)))
            except ValueError as error:
                warnings.warn(
                    f"The checkpoint was trained with {name}={spell(saved)}, which {type(self).__name__} does not use "
                    f"now: {error}. Pass it to load_from_checkpoint or to the class to train with the same loss.",
                    stacklevel=4,
                )
            else:
                self._rdrop_defaults[name] = loss_arguments(self)[name]
                rank_zero_info(f"Rebuilt from the checkpoint: {name}={spell(saved)}.")

    def _rdrop_described(self) -> dict[str, Any]:
        return {name: describe(value) for name, value in loss_arguments(self).items()}


def own_weights(module: Checkpointed) -> dict[str, float]:
    """The weights that the module has before callbacks set them."""
    return {name: float(getattr(module, name)) for name in WEIGHTS}


def loss_arguments(module: Checkpointed) -> dict[str, Any]:
    """What a checkpoint describes, with the module's own weights."""
    modules = {"rdrop_distance": module.rdrop_distance, "rdrop_regularizers": [*module.rdrop_regularizers]}
    return {**module._rdrop_own, "rdrop_views": module.rdrop_views, **modules}
