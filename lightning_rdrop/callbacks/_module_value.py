"""Callbacks that set an attribute of the module during training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lightning_rdrop._lightning import Callback
from lightning_rdrop.callbacks._require import require_rdrop
from lightning_rdrop.simcse import SimCSEMixin

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class ModuleValue(Callback):
    """Remembers the module's own value of an attribute when training starts, and restores it afterwards."""

    attribute: ClassVar[str] = "rdrop_alpha"
    """The attribute of the module that is set."""

    own_value: float | None = None
    """The module's own value, during training."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the module's own value.

        Raises:
            TypeError: a module without ``RDropMixin``, or with ``SimCSEMixin``.
        """
        module = require_rdrop(self, pl_module)
        if isinstance(module, SimCSEMixin):
            raise TypeError(
                f"{type(self).__name__} sets {self.attribute}, which {type(pl_module).__name__} does not use: it "
                "trains with the loss of SimCSE. Remove this callback."
            )
        self.own_value = getattr(module, self.attribute)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module's own value: Lightning calls no teardown after an error."""
        self._restore(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's own value after training."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        if self.own_value is not None:
            setattr(require_rdrop(self, pl_module), self.attribute, self.own_value)
            self.own_value = None
