"""Plots of logged quantities."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL = ("train/ce", "train/kl", "train/alpha", "val/accuracy")
"""The quantities that are plotted by default."""


def curves(metrics: str | Path, panels: dict[str, list[str]] | None = None) -> Figure:
    """Plot logged quantities over the optimizer steps, side by side.

    Args:
        metrics: the ``metrics.csv`` of a Lightning ``CSVLogger``.
        panels: the columns of each panel, by its title; ``None`` is a panel for each of ``train/ce``, ``train/kl``,
            ``train/alpha`` and ``val/accuracy`` that was logged.

    Raises:
        ValueError: a column that was never logged.
        FileNotFoundError: nothing was logged at all.
    """
    from matplotlib.figure import Figure  # an extra

    with Path(metrics).open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {name for row in rows for name, value in row.items() if value}
    if panels is None:
        panels = {name: [name] for name in USUAL if name in logged}
    missing = sorted({name for names in panels.values() for name in names} - logged)
    if missing or not panels:
        raise ValueError(f"{metrics}: nothing was logged as {missing or list(USUAL)}, only {sorted(logged)}.")

    figure = Figure(figsize=(3.2 * len(panels), 2.8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None, linewidth=1.2)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    return figure


def paired_differences(
    values: dict[str, list[float]],
    intervals: dict[str, tuple[float, float]],
    metric: str,
    reference: str,
) -> Figure:
    """Plot what each seed of each variant reached, and how far the variants are from the reference.

    Args:
        values: those of the seeds, by variant.
        intervals: the mean of the paired differences and half of its interval, by variant; the latter may be NaN.
        metric: its name.
        reference: the variant that has no difference.
    """
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(9, 1.2 + 0.35 * len(values)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for height, (name, points) in enumerate(values.items()):
        left.plot(points, [height] * len(points), "o", color="tab:blue", alpha=0.35, markersize=4)
        left.plot(sum(points) / len(points), height, "|", color="black", markersize=14)
        if name in intervals:
            center, margin = intervals[name]
            color = "tab:blue" if abs(center) > margin else "tab:gray"  # what is not shown is gray
            right.errorbar(center, height, xerr=margin, fmt="o", color=color, capsize=3)
    right.axvline(0, color="black", linewidth=0.8)
    left.set(title=f"{metric}, each seed and the mean", yticks=range(len(values)), yticklabels=values)
    left.invert_yaxis()
    right.set(title=f"difference to {reference}, 95 % interval")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    return figure
