"""The progress of a running comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from lightning_rdrop.compare.report import Report
from lightning_rdrop.compare.results import Row
from lightning_rdrop.compare.run import Run

if TYPE_CHECKING:
    from types import TracebackType


class Progress:
    """The table so far, a bar over all runs and the time left; without a terminal, a line for each run.

    Args:
        total: the number of runs.
        waiting: the runs that are not finished yet.
    """

    def __init__(self, total: int, waiting: Sequence[Run]) -> None:
        from rich.console import Console  # an extra
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.waiting = [*waiting]
        self.console = Console()
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.bar = Bar(*columns, console=self.console)
        self.task = self.bar.add_task("", total=total, completed=total - len(waiting))
        self.live = Live(self.bar, console=self.console, refresh_per_second=2)
        self._start = time.monotonic()
        self._seconds = 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def ended(self, run: Run, row: Row, report: Report) -> None:
        """Show that a run has ended, with this row of the table."""
        from rich.console import Group

        self.waiting.remove(run)
        self._seconds += row.get("seconds", 0.0)
        left = self._left(report.summary.rows)
        self.bar.update(self.task, advance=1, description=left)
        if self.console.is_terminal:
            self.live.update(Group(report.table(), self.bar))
        else:
            task = self.bar.tasks[0]
            metrics = ", ".join(f"{name} {row[name]:.4f}" for name in report.summary.metrics if name in row)
            said = metrics if row["status"] == "done" else row["status"]
            print(f"[{task.completed:.0f}/{task.total:.0f}] {run.variant}, seed {run.seed}: {said}. {left}", flush=True)

    def _left(self, rows: Sequence[Row]) -> str:
        """The time left, from the mean seconds of each variant and the overhead per run."""
        known = [row for row in rows if "seconds" in row]
        if not self.waiting or not self._seconds:
            return ""
        overall = mean(row["seconds"] for row in known)
        expected = (
            mean([row["seconds"] for row in known if row["variant"] == run.variant] or [overall])
            for run in self.waiting
        )
        minutes = sum(expected) * (time.monotonic() - self._start) / self._seconds / 60
        return f"about {minutes / 60:.1f} h left" if minutes > 90 else f"about {minutes:.0f} min left"
