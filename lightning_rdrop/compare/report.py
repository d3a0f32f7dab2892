"""What a comparison shows: a table with intervals, for the terminal and as Markdown, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from lightning_rdrop.compare.plan import Plan
from lightning_rdrop.compare.results import Row, finished, values
from lightning_rdrop.compare.statistics import Difference, paired_difference

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ("variant", "seeds", "mean", "sd", "difference", "95 % interval", "shown", "seeds needed", "time", "memory")


@dataclass(frozen=True)
class Line:
    """A variant in the table of one metric."""

    variant: str
    seeds: int
    failed: int
    mean: float
    sd: float
    difference: Difference | None
    seconds: float
    memory: float

    def cells(self, better: int = 0) -> list[str]:
        """The text of each column; ``better`` is 1 where higher values are better, -1 where lower are, 0 if unknown."""
        seeds = f"{self.seeds}" + (f", {self.failed} failed" if self.failed else "")
        cells = [self.variant, seeds, number(self.mean), number(self.sd)]
        if (difference := self.difference) is None:
            cells += ["reference", "", "", ""]
        else:
            verdicts = {0: "not shown", 1: "higher", -1: "lower"}
            if better:
                verdicts |= {better: "better", -better: "worse"}
            interval = f"{number(difference.low, '+')} to {number(difference.high, '+')}"
            many = "" if difference.needed is None else str(difference.needed)
            cells += [number(difference.mean, "+"), interval, verdicts[difference.sign], many]
        return [*cells, ratio(self.seconds), ratio(self.memory)]


class Report:
    """The tables of a comparison.

    Args:
        plan: what is compared.
        rows: the runs so far.
    """

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self.plan = plan
        self.rows = rows

    @property
    def metrics(self) -> list[str]:
        """The metrics of the test; that of the checkpoints first."""
        names = list(dict.fromkeys(name for row in self.rows for name in row if name.startswith("test/")))
        main = None if self.plan.monitor is None else "test/" + self.plan.monitor[0].rpartition("/")[2]
        return sorted(names, key=lambda name: name != main)

    def lines(self, metric: str) -> list[Line]:
        """A line for each variant that has a finished or failed run."""
        return [self._line(name, metric) for name in self.plan.variants if any(r["variant"] == name for r in self.rows)]

    def better(self, metric: str) -> int:
        """1 where higher values of the metric are better, -1 where lower are, 0 if that is unknown."""
        if self.plan.monitor is None or self.plan.monitor[0].rpartition("/")[2] != metric.removeprefix("test/"):
            return 0
        return 1 if self.plan.monitor[1] == "max" else -1

    def table(self) -> Table:
        """The table of the first metric, for the terminal."""
        from rich.table import Table  # an extra

        table = Table(*HEADER)
        if not self.metrics:
            return table
        table.title = self.metrics[0]
        for line in self.lines(self.metrics[0]):
            table.add_row(*line.cells(self.better(self.metrics[0])))
        return table

    def markdown(self) -> str:
        """The tables of all metrics."""
        parts = [f"# {len(self.plan.variants)} variants, {len(finished(self.rows))} runs"]
        for metric in self.metrics:
            parts += [
                f"## {metric}",
                _markdown(HEADER, [line.cells(self.better(metric)) for line in self.lines(metric)]),
            ]
        failed = [row for row in self.rows if row["status"] != "done"]
        if failed:
            parts += ["## Failed runs", *(f"- {row['variant']}, seed {row['seed']}: {row['status']}" for row in failed)]
        parts.append(
            f"Differences are paired, over the seeds that a variant has in common with {self.plan.reference}; the "
            "interval is that of Student's t. Where it contains 0, no difference is shown. Seeds needed: those with "
            "which a difference of this size, varying as much as these do, would be seen with a probability of 80 %. "
            f"Time and memory are relative to {self.plan.reference}; the time is that of training and validation."
        )
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """``report.md`` beside the results."""
        (folder / "report.md").write_text(self.markdown())

    def _line(self, variant: str, metric: str) -> Line:
        reference = self.plan.reference
        own = values(self.rows, variant, metric)
        other = values(self.rows, reference, metric)
        common = [seed for seed in own if seed in other]
        paired = variant != reference and common
        failed = sum(row["variant"] == variant and row["status"] != "done" for row in self.rows)
        return Line(
            variant,
            len(own),
            failed,
            mean(own.values()) if own else math.nan,
            stdev(own.values()) if len(own) > 1 else math.nan,
            paired_difference([own[s] for s in common], [other[s] for s in common]) if paired else None,
            self._relative(variant, "seconds"),
            self._relative(variant, "peak_memory_mib"),
        )

    def _relative(self, variant: str, column: str) -> float:
        own, other = (values(self.rows, name, column) for name in (variant, self.plan.reference))
        common = [seed for seed in own if seed in other]
        return sum(own[seed] for seed in common) / sum(other[seed] for seed in common) if common else math.nan


def number(value: float, sign: str = "") -> str:
    """With four decimals; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:{sign}.4f}"


def ratio(value: float) -> str:
    """Times the reference."""
    return "" if math.isnan(value) else f"{value:.2f}x"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
