"""Where the package meets Lightning's two names, `pytorch_lightning` and `lightning.pytorch`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING


def _installed() -> list[ModuleType]:
    found = []
    for name in ("pytorch_lightning", "lightning.pytorch"):
        try:
            found.append(import_module(name))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # Lightning is there, something that it needs is not
    return found


if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer

    MixinBase = LightningModule
else:
    # Each distribution asks of a callback that it is its own `Callback`, so one class has to be both.
    Callback = type("Callback", tuple(lightning.Callback for lightning in _installed()), {"__module__": __name__})
    MixinBase = object  # the user's class brings the LightningModule, of either distribution
