"""The numbers of a comparison, computed from its runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from lightning_rdrop.compare.plan import Plan
from lightning_rdrop.compare.results import Row, finished, metrics, values
from lightning_rdrop.compare.statistics import Difference, paired_difference


@dataclass(frozen=True)
class Line:
    """A variant in the table of one metric.

    Args:
        variant: its name.
        chosen: whether it represents a grid.
        failed: the number of failed runs.
        validation: the mean over the seeds of the best validation metric.
        values: the metric of each finished seed.
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
        return stdev(self.values) if len(self.values) > 1 and all(map(math.isfinite, self.values)) else math.nan


class Summary:
    """The variants of a comparison, measured against the reference.

    Args:
        plan: what is compared.
        rows: the runs so far.
    """

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self.plan = plan
        self.rows = [row for row in rows if row["variant"] in plan.variants]

    @property
    def metrics(self) -> list[str]:
        """The test metrics, first the counterpart of the one that selects checkpoints."""
        names = [name for name in metrics(self.rows) if self.plan.monitor is None or name != self.plan.monitor[0]]
        return sorted(names, key=lambda name: not self.better(name))

    @property
    def reference(self) -> str:
        """The variant that the others are compared with, which is the first, or the chosen one of its grid."""
        family, members = next(iter(self.plan.families.items()))
        return self.chosen(family) or members[0]

    def chosen(self, family: str) -> str | None:
        """The variant of a grid with the best mean validation metric, over the seeds that all its variants have.

        None if no such mean is known.

        Raises:
            ValueError: there is no such variant or grid.
        """
        if family not in self.plan.families:
            raise ValueError(f"there is no variant {family} among {', '.join(self.plan.families)}.")
        members = self.plan.families[family]
        if len(members) == 1:
            return members[0]
        if self.plan.monitor is None:
            return None
        monitor, mode = self.plan.monitor
        scores = {name: values(self.rows, name, monitor) for name in members}
        scores = {name: score for name, score in scores.items() if score}
        common = [seed for seed in next(iter(scores.values()), {}) if all(seed in score for score in scores.values())]
        means = {name: mean(score[seed] for seed in common) for name, score in scores.items()} if common else {}
        best = max if mode == "max" else min
        return best((name for name in means if math.isfinite(means[name])), key=means.__getitem__, default=None)

    def not_finite(self) -> Iterator[str]:
        """The finished runs with NaN or infinite values, and these values."""
        for row in finished(self.rows):
            bad = [f"{name} is {row[name]}" for name in metrics([row]) if not math.isfinite(row[name])]
            if bad:
                yield f"{row['variant']}, seed {row['seed']}: {', '.join(bad)}"

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

    def better(self, metric: str) -> int:
        """1 if higher values of a metric are better, -1 if lower are, 0 if unknown."""
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
