"""Checks of the bases of a class that inherits the mixin."""

from __future__ import annotations

import warnings

from torch import nn

from lightning_rdrop._lightning import LIGHTNINGS


def require_first(cls: type, mixin: type) -> None:
    """Require that the mixin comes before the LightningModule.

    Raises:
        TypeError: it does not.
    """
    before = cls.__mro__[: cls.__mro__.index(mixin)]
    if nn.Module in before:
        others = ", ".join(base.__name__ for base in cls.__bases__ if not issubclass(base, mixin))
        raise TypeError(
            f"{cls.__name__} inherits RDropMixin after {others}, which would override its training_step. "
            f"Put the mixin first: class {cls.__name__}(RDropMixin, {others})"
        )


def require_init(module: nn.Module) -> None:
    """Require that the mixin's ``__init__`` has run, which sets its attributes.

    Raises:
        TypeError: it has not.
    """
    if not hasattr(module, "rdrop_alpha"):
        raise TypeError(
            f"{type(module).__name__}.__init__ did not call RDropMixin's, which sets rdrop_alpha and the other "
            "arguments. Begin it with super().__init__(**kwargs), not with LightningModule.__init__(self)."
        )


def notice_replaced_step(cls: type, mixin: type) -> None:
    """Warn if the mixin's ``training_step`` replaces that of another base, which may have done more."""
    place = cls.__mro__.index(mixin)
    before, after = cls.__mro__[:place], cls.__mro__[place + 1 :]
    replaced = next((base for base in after if "training_step" in vars(base)), None)
    own = any("training_step" in vars(base) for base in before)
    inherited = any(issubclass(base, mixin) and issubclass(base, nn.Module) for base in cls.__bases__)
    if replaced is None or own or inherited or replaced.__module__.startswith(LIGHTNINGS):
        return
    warnings.warn(
        f"{cls.__name__}: the mixin's training_step replaces {replaced.__name__}.training_step, which is no longer "
        f"called. If you do not need it, delete it; otherwise write a training_step in {cls.__name__} that begins with "
        "terms = self.rdrop_step(batch).",
        stacklevel=4,
    )
