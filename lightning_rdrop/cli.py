"""The command line: `lightning-rdrop fit|validate|test|predict|compare|plot`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pytorch_lightning.cli import ArgsType

from lightning_rdrop.compare import compare
from lightning_rdrop.lightning_cli import RDropCLI
from lightning_rdrop.plots import curves, find_runs

__all__ = ["RDropCLI", "main"]


def main(args: ArgsType = None) -> None:
    """The console command; classes in the current folder can be imported, as with ``python -m``."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = sys.argv[1:] if args is None else args
    commands = {"compare": compare, "plot": plot}
    if isinstance(given, list) and given and given[0] in commands:
        commands[given[0]](given[1:])
    else:
        RDropCLI(args=args, parser_kwargs={"epilog": f"Other commands: {', '.join(commands)}."})


def plot(args: Sequence[str]) -> None:
    """Plot runs over each other, of what a ``CSVLogger`` wrote in or below their folders."""
    parser = argparse.ArgumentParser(
        prog="lightning-rdrop plot", description="Plot runs over each other, plain training in grey."
    )
    parser.add_argument("logdir", nargs="+", help="a folder with a metrics.csv, or with such folders")
    parser.add_argument("--output", default="curves.png", help="the picture (default: %(default)s)")
    given = parser.parse_args(args)
    try:
        curves(find_runs(given.logdir)).savefig(given.output, dpi=150)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"curves: {given.output}")
