"""Pictures, each drawn with matplotlib, an extra."""

from lightning_rdrop.plots.curves import History, curves, find_runs, read_csv
from lightning_rdrop.plots.differences import paired_differences

__all__ = ["History", "curves", "find_runs", "paired_differences", "read_csv"]
