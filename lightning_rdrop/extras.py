"""What is imported only when it is needed, because not everybody needs it."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """A module of an optional dependency.

    Args:
        module: its dotted name.
        extra: of this package, which installs it.
        purpose: what needs it, for the message.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the line that installs it.

    Example:
        >>> require("nosuchmodule", "huggingface", "TextDataModule")
        Traceback (most recent call last):
        ModuleNotFoundError: TextDataModule needs nosuchmodule: pip install "lightning-rdrop[huggingface]"
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and something that it needs is not
        line = f'{purpose} needs {error.name}: pip install "lightning-rdrop[{extra}]"'
        raise ModuleNotFoundError(line, name=error.name) from None


def from_pretrained(auto: Any, argument: str, name: str, **config: Any) -> Any:
    """``auto.from_pretrained(name, **config)``, whose error is one line that names the argument.

    Raises:
        OSError: there is nothing of this name, or it cannot be loaded.
    """
    try:
        return auto.from_pretrained(name, **config)
    except OSError as error:
        raise OSError(f"{argument}={name!r} cannot be loaded: {' '.join(str(error).split())}") from None
