"""The command line: `lightning-rdrop fit|validate|test|predict|compare`."""

from __future__ import annotations

import os
import sys

from pytorch_lightning.cli import ArgsType

from lightning_rdrop.compare import compare
from lightning_rdrop.lightning_cli import RDropCLI

__all__ = ["RDropCLI", "main"]


def main(args: ArgsType = None) -> None:
    """The console command; classes in the current folder can be imported, as with ``python -m``."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["compare"]:
        compare(given[1:])
    else:
        RDropCLI(
            args=args, parser_kwargs={"epilog": "Several configs over several seeds: lightning-rdrop compare --help"}
        )
