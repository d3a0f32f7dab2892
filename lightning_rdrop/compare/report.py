"""The report of a comparison: a table with intervals, for the terminal and as Markdown, and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rdrop.compare.plan import settings_of
from lightning_rdrop.compare.results import finished
from lightning_rdrop.compare.summary import Line, Summary
from lightning_rdrop.plots import heat_map, paired_differences

if TYPE_CHECKING:
    from rich.table import Table

_VERDICTS = {
    1: {1: "better", 0: "not shown", -1: "worse"},
    0: {1: "higher", 0: "not shown", -1: "lower"},
    -1: {1: "worse", 0: "not shown", -1: "better"},
}
"""The verdict on a difference, by which direction is better and by its sign."""


class Report:
    """The tables of a comparison.

    Args:
        summary: the numbers.
    """

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def table(self) -> Table:
        """The table of the first metric, for the terminal."""
        from rich.box import SIMPLE_HEAD  # an extra
        from rich.table import Table

        table = Table(
            box=SIMPLE_HEAD, padding=0, pad_edge=False, title=self.summary.metrics[0] if self.summary.metrics else None
        )
        for name in self._header():
            numeric = name not in ("variant", "shown")
            table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "variant", overflow="fold")
        for cells in self._cells(self.summary.metrics[0]) if self.summary.metrics else []:
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """The tables of all metrics, with notes and failed runs."""
        parts = [f"# {len(self.summary.plan.variants)} variants, {len(finished(self.summary.rows))} runs"]
        for metric in self.summary.metrics:
            parts += [f"## {metric}", _markdown([self._header(), *self._cells(metric)])]
        parts.append(self.notes())
        failed = [row for row in self.summary.rows if row["status"] != "done"]
        if failed:
            runs = (f"- {row['variant']}, seed {row['seed']}: {row['status']}" for row in failed)
            parts += ["## Failed runs", "\n".join(runs)]
        return "\n\n".join(parts) + "\n"

    def notes(self) -> str:
        """How to read the tables."""
        plan, reference = self.summary.plan, self.summary.reference
        notes = [
            f"difference: paired, over the seeds that a variant has in common with {reference}, with its 95% interval "
            "by Student's t. If the interval contains 0, the verdict is 'not shown'. It is not corrected for "
            "multiple comparisons: of twenty variants without any effect, one will seem to have one.",
            "needs: the number of seeds with which a paired t-test at 5% detects a difference of this size and "
            "variance with a power of 80%.",
            f"time, of training and validation, and peak memory are relative to {reference}.",
        ]
        for family, members in plan.families.items():
            if len(members) > 1 and plan.monitor is not None:
                chosen, metric = self.summary.chosen(family), plan.monitor[0]
                notes.append(
                    f"{chosen} (marked *) was chosen among {len(members)} variants by the mean of {metric}, on "
                    f"validation data only, to represent {family}. Picking another one by its test metric would "
                    "overstate it."
                    if chosen
                    else f"none of the {len(members)} variants of {family} was chosen: no mean of {metric} is known."
                )
        for added in plan.equal_cost.values():
            notes += [f"{name} is {reason}." for name, reason in added.items()]
        notes += [f"{run}. A mean with such a value is left blank." for run in self.summary.not_finite()]
        return "\n".join(f"- {note}" for note in notes)

    def write(self, folder: Path) -> None:
        """Write ``report.md`` and its pictures to the folder of the results."""
        pictures = ""
        plan = self.summary.plan
        if self.summary.metrics:
            lines = [line for line in self.summary.lines(self.summary.metrics[0]) if line.values]
            intervals = {line.variant: (d.mean, d.margin) for line in lines if (d := line.difference)}
            figure = paired_differences(
                {line.variant: line.values for line in lines},
                intervals,
                self.summary.metrics[0],
                self.summary.reference,
            )
            figure.savefig(folder / "report.png", dpi=150)
            pictures = "\n![The values of each seed, and the differences with their intervals](report.png)\n"
            pictures += "".join(self._write_grid(folder, family, members) for family, members in plan.families.items())
        (folder / "report.md").write_text(self.markdown() + pictures)

    def _write_grid(self, folder: Path, family: str, members: Sequence[str]) -> str:
        """Draw a grid of two settings; returns the Markdown that shows it, or nothing for other grids."""
        settings = {name: settings_of(name) for name in members}
        axes, *others = {tuple(keys) for keys in settings.values()}
        metric, reference = self.summary.metrics[0], self.summary.reference
        means = {line.variant: line.mean for line in self.summary.lines(metric) if math.isfinite(line.mean)}
        if others or len(axes) != 2 or not means.keys() & settings.keys():
            return ""
        pairs = {name: tuple(values.values()) for name, values in settings.items()}
        chosen = self.summary.chosen(family)
        figure = heat_map(
            {pairs[name]: means[name] for name in members if name in means},
            axes,
            f"{metric}, mean" + (f"; {reference} {means[reference]:.4g}" if reference in means else ""),
            pairs[chosen] if chosen else None,
        )
        figure.savefig(folder / f"{family}.png", dpi=150)
        framed = ", the chosen variant framed" if chosen else ""
        return f"\n![{metric} over the grid {family}{framed}]({family}.png)\n"

    def _header(self) -> list[str]:
        monitor, _ = self.summary.plan.monitor or (None, None)
        monitored = [] if monitor is None else ["best " + (monitor.rpartition("/")[0] or monitor)]
        return ["variant", "n", *monitored, "mean", "sd", "difference", "shown", "needs", "time", "memory"]

    def _cells(self, metric: str) -> list[list[str]]:
        lines = self.summary.lines(metric)
        digits = 2 if any(2 <= abs(line.mean) < math.inf for line in lines) else 4
        return [self._cells_of(line, digits, self.summary.better(metric)) for line in lines]

    def _cells_of(self, line: Line, digits: int, better: int) -> list[str]:
        def number(value: float, sign: str = "") -> str:
            return f"{value:{sign}.{digits}f}" if math.isfinite(value) else ""

        name = f"{line.variant} *" if line.chosen else line.variant
        runs = f"{len(line.values)}" + (f" ({line.failed} failed)" if line.failed else "")
        validation = [] if self.summary.plan.monitor is None else [number(line.validation)]
        compared = ["reference" if line.variant == self.summary.reference else "", "", ""]
        if difference := line.difference:
            verdict = _VERDICTS[better][difference.sign]
            interval = f" ± {margin}" if (margin := number(difference.margin)) else ""
            needed = str(difference.needed or "")
            compared = [number(difference.mean, "+") + interval, verdict, needed]
        costs = ["" if math.isnan(cost) else f"{cost:.2f}x" for cost in (line.seconds, line.memory)]
        return [name, runs, *validation, number(line.mean), number(line.sd), *compared, *costs]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
