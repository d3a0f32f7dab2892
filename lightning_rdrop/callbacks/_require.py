"""The check that a callback's module has the mixin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rdrop.inheritance import require_init
from lightning_rdrop.mixin import RDropMixin

if TYPE_CHECKING:
    from lightning_rdrop._lightning import Callback, LightningModule


def require_rdrop(callback: Callback, module: LightningModule) -> RDropMixin:
    """Return the module if it has the mixin.

    Raises:
        TypeError: it does not inherit ``RDropMixin``, or does not call its ``__init__``.
    """
    if isinstance(module, RDropMixin):
        require_init(module)
        return module
    raise TypeError(
        f"{type(callback).__name__} needs a module that inherits RDropMixin, but {type(module).__name__} does not. "
        f"Write: class {type(module).__name__}(RDropMixin, LightningModule)"
    )
