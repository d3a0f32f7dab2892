"""Plot what was logged over the steps of one or several runs."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

History = Mapping[str, Sequence[tuple[int, float]]]
"""What was logged in a run: pairs of optimizer step and value, by name."""

TASK = tuple(f"train/{name}" for name in ("ce", "bce", "mse", "nll", "focal", "ctc", "cosine"))
CONSISTENCY = ("train/kl", "train/js", "train/consistency")
VALIDATION = ("val/accuracy", "val/f1", "val/pearson", "val/sacrebleu", "val/chrf", "val/rouge", "val/perplexity")
USUAL = (TASK, CONSISTENCY, ("train/alpha",), VALIDATION)
"""The quantities plotted by default: the first of each group that was logged."""

_SMOOTHED = 40  # fewer points are not smoothed
_COLUMNS = 4
_STYLES = ("-", "--", ":", "-.")


def curves(
    runs: str | Path | Mapping[str, str | Path | History], panels: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Plot logged quantities over the optimizer steps, for one run or several in one figure.

    Many points are drawn faintly, under a line of their moving average. Among several runs, plain training, whose alpha
    or kl is always 0, is gray.

    Args:
        runs: the ``metrics.csv`` of a Lightning ``CSVLogger``; or several runs by name, each such a file or a
            :data:`History`.
        panels: the columns of each panel, by its title; ``None`` makes one panel each for the task loss, the
            consistency (in training and as measured by :class:`~lightning_rdrop.callbacks.ConsistencyMonitor`), alpha,
            the first validation metric, and the gap that the monitor measured, if they were logged.

    Raises:
        ValueError: a column that was never logged.
        FileNotFoundError: a file is missing, since nothing was logged.
    """
    from matplotlib.figure import Figure  # optional dependency

    named = runs if isinstance(runs, Mapping) else {str(runs): runs}
    histories = {name: run if isinstance(run, Mapping) else read_csv(run) for name, run in named.items()}
    logged = set(chain.from_iterable(histories.values()))
    if panels is None:
        panels = _usual_panels(histories.values())
    missing = sorted({name for names in panels.values() for name in names} - logged)
    if missing or not panels:
        usual = list(chain.from_iterable(USUAL))
        raise ValueError(f"{', '.join(named)}: nothing was logged as {missing or usual}, only {sorted(logged)}.")

    columns = len(panels) if len(panels) <= _COLUMNS else (len(panels) + 1) // 2
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (title, names) in zip(grid, panels.items(), strict=False):
        _draw(axes, histories, names)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.remove()
    if len(histories) > 1:
        handles = _handles((run, color, "-") for run, color in _colors(histories).items())
        figure.legend(handles=handles, loc="outside lower center", ncols=_COLUMNS)
    return figure


def read_csv(metrics: str | Path) -> History:
    """Read the columns written by a ``CSVLogger``.

    Raises:
        FileNotFoundError: the file does not exist, since nothing was logged.
    """
    history: dict[str, list[tuple[int, float]]] = {}
    with Path(metrics).open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    history.setdefault(name, []).append((int(row["step"]), float(value)))
    return history


def find_runs(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Find the ``metrics.csv`` files in or below each folder, named by the part of their paths that differs.

    Raises:
        FileNotFoundError: a folder has none.
    """
    found = []
    for folder in folders:
        files = sorted(Path(folder).glob("**/metrics.csv"))
        if not files:
            raise FileNotFoundError(f"There is no metrics.csv of a CSVLogger in {folder} or below it.")
        found += [file for file in files if file not in found]
    if len(found) == 1:
        return {found[0].parent.name: found[0]}
    common = os.path.commonpath([file.parent for file in found])
    return {str(file.parent.relative_to(common)): file for file in found}


def is_plain(history: History) -> bool:
    """Whether a run is plain training: alpha is always 0, or kl is, as with a single view.

    Example:
        >>> is_plain({"train/kl": [(0, 0.0), (1, 0.0)], "train/alpha": [(0, 4.0), (1, 4.0)]})
        True
    """
    return any(
        name in history and all(value == 0 for _, value in history[name]) for name in (*CONSISTENCY, "train/alpha")
    )


def _usual_panels(histories: Iterable[History]) -> dict[str, list[str]]:
    logged = list(dict.fromkeys(chain.from_iterable(histories)))
    first = [next((name for name in group if name in logged), None) for group in USUAL]
    if first[-1] is None:
        own = [name for name in logged if name.startswith("val") and not ("dropout_" in name or "average_" in name)]
        first[-1] = next(iter(own), None)
    panels = {name: [name] for name in (*first, "val/average_gap") if name in logged}
    if "val/dropout_kl" in logged:
        kl = first[1]
        panels = {
            "kl" if name == kl else name: [*names, "val/dropout_kl"] if name == kl else names
            for name, names in panels.items()
        }
    return panels


def _draw(axes: Axes, histories: Mapping[str, History], names: Sequence[str]) -> None:
    """Draw the lines of a panel: colors for runs and styles for quantities, or colors for the quantities of one run."""
    several = len(histories) > 1
    styles = dict(zip(names, cycle(_STYLES if several else _STYLES[:1]), strict=False))
    for run, color in _colors(histories).items():
        for number, name in enumerate(names):
            if name in histories[run]:
                _line(axes, histories[run][name], name, color if several else f"C{number % 10}", styles[name])
    if len(names) > 1:
        axes.legend(handles=_handles([(name, "black", style) for name, style in styles.items()]) if several else None)


def _line(axes: Axes, points: Sequence[tuple[int, float]], label: str, color: str, style: str) -> None:
    import numpy as np  # a dependency of matplotlib

    steps, values = zip(*points, strict=True)
    if len(points) < _SMOOTHED:
        axes.plot(steps, values, style, label=label, color=color, marker=".", linewidth=1.2)
        return
    window = np.ones(len(points) // 20 * 2 + 1)
    smooth = np.convolve(values, window, "same") / np.convolve(np.ones(len(points)), window, "same")
    axes.plot(steps, values, ".", color=color, markersize=2, alpha=0.25)
    axes.plot(steps, smooth, style, label=label, color=color, linewidth=1.5)


def _colors(histories: Mapping[str, History]) -> dict[str, str]:
    """A color for each run, gray for plain training."""
    others = (f"C{number % 7}" for number in count())  # C7 is gray
    return {run: "grey" if is_plain(history) else next(others) for run, history in histories.items()}


def _handles(lines: Iterable[tuple[str, str, Any]]) -> list[Line2D]:
    """Legend handles for labels, colors and styles."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=label, color=color, linestyle=style) for label, color, style in lines]
