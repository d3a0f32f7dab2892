"""`lightning-rdrop plot`: several runs in one figure, plain training in gray."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_rdrop.plots import curves, find_runs


def plot(args: Sequence[str]) -> None:
    """Plot the ``metrics.csv`` files of a ``CSVLogger`` in or below some folders."""
    parser = argparse.ArgumentParser(
        prog="lightning-rdrop plot", description="Plot several runs in one figure, plain training in gray."
    )
    parser.add_argument("logdir", nargs="+", help="a folder that contains metrics.csv files, also in subfolders")
    parser.add_argument("--output", default="curves.png", help="the file to write (default: %(default)s)")
    given = parser.parse_args(args)
    try:
        curves(find_runs(given.logdir)).savefig(given.output, dpi=150)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"curves: {given.output}")
