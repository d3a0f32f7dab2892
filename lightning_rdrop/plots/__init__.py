"""Plots with matplotlib, an optional dependency."""

from lightning_rdrop.plots.curves import History, curves, find_runs, read_csv
from lightning_rdrop.plots.differences import paired_differences
from lightning_rdrop.plots.grid import heat_map

__all__ = ["History", "curves", "find_runs", "heat_map", "paired_differences", "read_csv"]
