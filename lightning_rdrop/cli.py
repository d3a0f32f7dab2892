"""The command line: `lightning-rdrop fit|validate|test|predict`, and the commands of COMMANDS."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from pytorch_lightning.cli import ArgsType
from torch import distributed

from lightning_rdrop.lightning_cli import RDropCLI, explain, is_message
from lightning_rdrop.plots.command import plot
from lightning_rdrop.quickstart import quickstart

__all__ = ["RDropCLI", "main"]


def _compare(args: Sequence[str]) -> None:
    from lightning_rdrop.compare import compare  # needs a module that Windows lacks

    compare(args)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"compare": _compare, "plot": plot, "quickstart": quickstart}
"""Commands besides the Trainer's methods, by name; each is called with the arguments after its name."""


def main(args: ArgsType = None) -> None:
    """Entry point of the command; classes in the current folder can be imported, as with ``python -m``."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list) and given and given[0] in COMMANDS:
            COMMANDS[given[0]](given[1:])
        else:
            _lightning(args)
    except Exception as error:
        if os.environ.get("JSONARGPARSE_DEBUG") or not is_message(error):
            raise
        said = str(error)
        said = explain(said) if said.startswith("Does not validate") else said  # a class rejected its arguments
        print(f"error: {said}", file=sys.stderr)
        sys.exit(1)


def _lightning(args: ArgsType) -> None:
    RDropCLI(
        args=args,
        parser_kwargs={
            "prog": "lightning-rdrop",
            "version": version("lightning-rdrop"),
            "description": "Train, test and predict with R-Drop.",
            "epilog": f"Other commands: {', '.join(COMMANDS)}.",
        },
    )
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads may abort the interpreter on exit, and the other nodes wait
