"""What a comparison shows: a table with intervals, for the terminal and as Markdown, and a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from lightning_rdrop.compare.plan import Plan
from lightning_rdrop.compare.results import Row, finished, metrics, values
from lightning_rdrop.compare.statistics import Difference, paired_difference
from lightning_rdrop.plots import paired_differences

if TYPE_CHECKING:
    from rich.table import Table

_VERDICTS = {
    1: {1: "better", 0: "not shown", -1: "worse"},
    0: {1: "higher", 0: "not shown", -1: "lower"},
    -1: {1: "worse", 0: "not shown", -1: "better"},
}
"""What is said of the sign of a difference, by which way is better."""


@dataclass(frozen=True)
class Line:
    """A variant in the table of one metric.

    Args:
        variant: its name.
        chosen: whether it stands for a grid.
        seeds, failed: how many runs were finished, and how many failed.
        validation: the mean of the best validation metric.
        values: the metric of each seed.
        difference: to the reference; None for the reference itself, and without a seed in common.
        seconds, memory: relative to the reference.
    """

    variant: str
    chosen: bool
    failed: int
    validation: float
    values: list[float]
    difference: Difference | None
    seconds: float
    memory: float

    @property
    def mean(self) -> float:
        return mean(self.values) if self.values else math.nan

    @property
    def sd(self) -> float:
        return stdev(self.values) if len(self.values) > 1 else math.nan


class Report:
    """The tables of a comparison.

    Args:
        plan: what is compared.
        rows: the runs so far.
    """

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self.plan = plan
        self.rows = [row for row in rows if row["variant"] in plan.variants]

    @property
    def metrics(self) -> list[str]:
        """The metrics of the test; that of the checkpoints first."""
        names = [name for name in metrics(self.rows) if self.plan.monitor is None or name != self.plan.monitor[0]]
        return sorted(names, key=lambda name: not self._better(name))

    @property
    def reference(self) -> str:
        """The variant that the others are compared with: the first, or the chosen one of its grid."""
        return self.chosen(next(iter(self.plan.families)))

    def chosen(self, family: str) -> str:
        """The variant of a grid with the best validation metric, a mean over the seeds that all of them have.

        Raises:
            ValueError: there is no such variant or grid.
        """
        if family not in self.plan.families:
            raise ValueError(f"there is no variant {family} among {', '.join(self.plan.families)}.")
        members = self.plan.families[family]
        if len(members) == 1 or self.plan.monitor is None:
            return members[0]
        monitor, mode = self.plan.monitor
        scores = {name: values(self.rows, name, monitor) for name in members}
        scores = {name: score for name, score in scores.items() if score}
        common = [seed for seed in next(iter(scores.values()), {}) if all(seed in score for score in scores.values())]
        if not common:
            return members[0]
        means = {name: mean(score[seed] for seed in common) for name, score in scores.items()}
        best = max if mode == "max" else min
        return best((name for name in means if not math.isnan(means[name])), key=means.__getitem__, default=members[0])

    def lines(self, metric: str) -> list[Line]:
        """A line for each variant that has a finished or failed run."""
        run = {row["variant"] for row in self.rows}
        grids = [family for family, members in self.plan.families.items() if len(members) > 1]
        chosen = {self.chosen(family) for family in grids}
        return [self._line(name, metric, name in chosen) for name in self.plan.variants if name in run]

    def relative(self, variant: str, column: str) -> float:
        """A cost relative to that of the reference, over the seeds of both."""
        own, other = (values(self.rows, name, column) for name in (variant, self.reference))
        common = [seed for seed in own if seed in other]
        return sum(own[seed] for seed in common) / sum(other[seed] for seed in common) if common else math.nan

    def table(self) -> Table:
        """The table of the first metric, for the terminal."""
        from rich.box import SIMPLE_HEAD  # an extra
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, title=self.metrics[0] if self.metrics else None)
        for name in self._header():
            numeric = name not in ("variant", "shown")
            table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "variant", overflow="fold")
        for cells in self._cells(self.metrics[0]) if self.metrics else []:
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """The tables of all metrics, and what they say."""
        parts = [f"# {len(self.plan.variants)} variants, {len(finished(self.rows))} runs"]
        for metric in self.metrics:
            parts += [f"## {metric}", _markdown([self._header(), *self._cells(metric)])]
        parts.append(self.notes())
        failed = [row for row in self.rows if row["status"] != "done"]
        if failed:
            runs = (f"- {row['variant']}, seed {row['seed']}: {row['status']}" for row in failed)
            parts += ["## Failed runs", "\n".join(runs)]
        return "\n\n".join(parts) + "\n"

    def notes(self) -> str:
        """How to read the tables."""
        reference = self.reference
        notes = [
            f"difference: paired, over the seeds that a variant has in common with {reference}, with its 95 % interval "
            "by Student's t. Where that contains 0, a difference is not shown. The interval is that of one comparison: "
            "of twenty variants that change nothing, one will seem to.",
            "needs: the seeds with which a paired t-test at 5 % would see a difference of this size and this variance "
            "with a probability of 80 %.",
            f"time, of training and validation, and peak memory are relative to {reference}.",
        ]
        for family, members in self.plan.families.items():
            if len(members) > 1 and self.plan.monitor is not None:
                notes.append(
                    f"{self.chosen(family)} (marked *) was chosen among {len(members)} variants by the mean of "
                    f"{self.plan.monitor[0]}, on validation data only, to stand for {family}. To pick another of them "
                    "by its test metric would overstate it."
                )
        for added in self.plan.equal_cost.values():
            notes += [f"{name} is {reason}." for name, reason in added.items()]
        return "\n".join(f"- {note}" for note in notes)

    def write(self, folder: Path) -> None:
        """``report.md`` and ``report.png``, beside the results."""
        picture = ""
        if self.metrics:
            lines = [line for line in self.lines(self.metrics[0]) if line.values]
            intervals = {line.variant: (d.mean, d.margin) for line in lines if (d := line.difference)}
            figure = paired_differences(
                {line.variant: line.values for line in lines}, intervals, self.metrics[0], self.reference
            )
            figure.savefig(folder / "report.png", dpi=150)
            picture = "\n![The values of each seed, and the differences with their intervals](report.png)\n"
        (folder / "report.md").write_text(self.markdown() + picture)

    def _header(self) -> list[str]:
        monitored = [] if self.plan.monitor is None else ["best " + self.plan.monitor[0].rpartition("/")[0]]
        return ["variant", "n", *monitored, "mean", "sd", "difference", "shown", "needs", "time", "memory"]

    def _cells(self, metric: str) -> list[list[str]]:
        lines = self.lines(metric)
        digits = 4 if all(not abs(line.mean) >= 2 for line in lines) else 2
        return [self._cells_of(line, digits, self._better(metric)) for line in lines]

    def _cells_of(self, line: Line, digits: int, better: int) -> list[str]:
        def number(value: float, sign: str = "") -> str:
            return "" if math.isnan(value) else f"{value:{sign}.{digits}f}"

        name = f"{line.variant} *" if line.chosen else line.variant
        runs = f"{len(line.values)}" + (f" ({line.failed} failed)" if line.failed else "")
        validation = [] if self.plan.monitor is None else [number(line.validation)]
        compared = ["reference" if line.variant == self.reference else "", "", ""]
        if difference := line.difference:
            verdict = _VERDICTS[better][difference.sign]
            interval = f" ± {margin}" if (margin := number(difference.margin)) else ""
            needed = str(difference.needed or "")
            compared = [number(difference.mean, "+") + interval, verdict, needed]
        costs = ["" if math.isnan(cost) else f"{cost:.2f}x" for cost in (line.seconds, line.memory)]
        return [name, runs, *validation, number(line.mean), number(line.sd), *compared, *costs]

    def _better(self, metric: str) -> int:
        """1 where higher values of a metric are better, -1 where lower are; 0 where that is unknown."""
        monitor, mode = self.plan.monitor or ("", "")
        if metric != re.sub(r"^val(id|idation)?(?=[/_])", "test", monitor):
            return 0
        return 1 if mode == "max" else -1

    def _line(self, variant: str, metric: str, chosen: bool) -> Line:
        own, other = (values(self.rows, name, metric) for name in (variant, self.reference))
        validation = [] if self.plan.monitor is None else values(self.rows, variant, self.plan.monitor[0]).values()
        common = [seed for seed in own if seed in other]
        paired = variant != self.reference and common
        return Line(
            variant,
            chosen,
            sum(row["variant"] == variant and row["status"] != "done" for row in self.rows),
            mean(validation) if validation else math.nan,
            [*own.values()],
            paired_difference([own[s] for s in common], [other[s] for s in common]) if paired else None,
            self.relative(variant, "seconds"),
            self.relative(variant, "peak_memory_mib"),
        )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
