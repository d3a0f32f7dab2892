"""Tell errors that are messages to the user from those that need a traceback."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from types import TracebackType

_OURS = ("lightning_rdrop", "pytorch_lightning", "lightning_fabric", "jsonargparse")
_OTHERS = {"__main__", "torch", *sys.stdlib_module_names}


def is_message(error: BaseException) -> bool:
    """Whether this package or Lightning raised an error on purpose, with no user code in the traceback.

    The cause of an error in user code is found in its traceback, and an error without a ``raise`` is a bug.
    """
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)):
        return False
    last = _last(error)
    if last is None or _package(last) not in _OURS:
        return False
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and all(_package(entry) in (*_OURS, *_OTHERS) for entry in _entries(error))


def _entries(error: BaseException | None) -> Iterator[TracebackType]:
    """The tracebacks of an error and of its causes, entry by entry."""
    while error is not None:
        entry = error.__traceback__
        while entry is not None:
            yield entry
            entry = entry.tb_next
        error = error.__cause__


def _last(error: BaseException) -> TracebackType | None:
    entries = [entry for entry in _entries(error) if entry.tb_next is None]
    return entries[0] if entries else None


def _package(entry: TracebackType) -> str:
    name: str = entry.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
