"""Which errors are messages to the user, for whom a traceback would hide them."""

from __future__ import annotations

import dis
import sys
import traceback

_PACKAGES = ("lightning_rdrop", "pytorch_lightning", "lightning_fabric", "jsonargparse")


def is_message(error: BaseException) -> bool:
    """Whether an error was raised on purpose by this package or Lightning, and no code of the user's took part.

    In code of the user's, only the traceback tells where the cause is; and an error that nobody raised is a bug.
    """
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or packages[-1] not in _PACKAGES:
        return False
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and all(
        name in (*_PACKAGES, "torch", "__main__") or name in sys.stdlib_module_names for name in packages
    )
