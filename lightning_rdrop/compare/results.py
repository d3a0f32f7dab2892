"""The table of all runs, a row each, as a CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_rdrop.compare import atomic
from lightning_rdrop.compare.run import Run

Row = dict[str, Any]
_COSTS = ("steps", "seconds", "peak_memory_mib")
_OTHERS = ("variant", "seed", *_COSTS, "status")


class Results:
    """``results.csv``: variant, seed, test metrics, best validation metric, costs, status.

    Args:
        path: of the file, which may not exist yet.
        variants: in the order of the table; others follow in the order of the file.
    """

    def __init__(self, path: Path, variants: Sequence[str] = ()) -> None:
        self.path = path
        self._rows = {(row["variant"], row["seed"]): row for row in _read(path)}
        self._order = {name: i for i, name in enumerate(dict.fromkeys([*variants, *(name for name, _ in self._rows)]))}

    @property
    def rows(self) -> list[Row]:
        """The rows, sorted by variant and seed."""
        return [self._rows[key] for key in sorted(self._rows, key=lambda key: (self._order[key[0]], key[1]))]

    def is_done(self, run: Run) -> bool:
        """Whether the run is finished; a failed one is not."""
        return bool(self._rows.get((run.variant, run.seed), {}).get("status") == "done")

    def add(self, run: Run) -> Row:
        """Add a run that has ended, and replace the file atomically."""
        result = run.result or {}
        row: Row = {"variant": run.variant, "seed": run.seed} | result.get("test", {}) | result.get("validation", {})
        row |= {cost: result[cost] for cost in _COSTS if cost in result} | {"status": result["status"]}
        if not self.is_done(run) or row["status"] == "done":
            self._rows[run.variant, run.seed] = row
            self._write()
        return row

    def _write(self) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, ["variant", "seed", *metrics(self.rows), *_COSTS, "status"], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
        atomic.write(self.path, table.getvalue())


def metrics(rows: Iterable[Row]) -> list[str]:
    """The columns of test and validation metrics."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in _OTHERS))


def finished(rows: Iterable[Row]) -> list[Row]:
    """The rows of runs that did not fail."""
    return [row for row in rows if row["status"] == "done"]


def values(rows: Iterable[Row], variant: str, column: str) -> dict[int, float]:
    """A column of a variant's finished runs, by seed."""
    return {row["seed"]: row.get(column, math.nan) for row in finished(rows) if row["variant"] == variant}


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(name, text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]


def _value(name: str, text: str) -> Any:
    if name in ("variant", "status"):
        return text
    return int(text) if name in ("seed", "steps") else float(text)
