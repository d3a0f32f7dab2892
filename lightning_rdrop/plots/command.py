"""`lightning-rdrop plot`: runs over each other, plain training in grey."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_rdrop.plots import curves, find_runs


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
