"""Import optional dependencies only when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: its dotted name.
        extra: the extra of this package that installs it.
        purpose: what needs it, for the message.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the command that installs it.

    Example:
        >>> require("nosuchmodule", "huggingface", "TextDataModule")
        Traceback (most recent call last):
        ModuleNotFoundError: TextDataModule needs nosuchmodule: pip install "lightning-rdrop[huggingface]"
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is installed, but one of its own imports is not
        line = f'{purpose} needs {error.name}: pip install "lightning-rdrop[{extra}]"'
        raise ModuleNotFoundError(line, name=error.name) from None


def from_pretrained(auto: Any, argument: str, name: str, **config: Any) -> Any:
    """Call ``auto.from_pretrained(name, **config)``, with a one-line error that names the argument.

    Raises:
        OSError: the name does not exist, or cannot be loaded.
    """
    try:
        return auto.from_pretrained(name, **config)
    except OSError as error:
        raise OSError(f"{argument}={name!r} cannot be loaded: {' '.join(str(error).split())}") from None
