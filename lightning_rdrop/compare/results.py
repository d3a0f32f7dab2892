"""The table of all runs, a line each, as a CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_rdrop.compare.run import Run

Row = dict[str, Any]
_COSTS = ("steps", "seconds", "peak_memory_mib")


def row_of(run: Run) -> Row:
    """The line of a run that has ended."""
    result = run.result or {}
    row: Row = {"variant": run.variant, "seed": run.seed} | result.get("test", {}) | result.get("validation", {})
    return row | {cost: result[cost] for cost in _COSTS if cost in result} | {"status": result["status"]}


def read(path: Path) -> list[Row]:
    """The lines of a ``results.csv``; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(name, text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file at once: whoever reads or interrupts finds a whole one."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in (*_COSTS, "status")))
    metrics = sorted(names[2:], key=lambda name: not name.startswith("test/"))
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names[:2], *metrics, *_COSTS, "status"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    part.replace(path)


def finished(rows: Iterable[Row]) -> list[Row]:
    """Those that did not fail."""
    return [row for row in rows if row["status"] == "done"]


def values(rows: Iterable[Row], variant: str, column: str) -> dict[int, float]:
    """A column of a variant's finished runs, by seed."""
    chosen = (row for row in finished(rows) if row["variant"] == variant)
    return {row["seed"]: row.get(column, math.nan) for row in chosen}


def _value(name: str, text: str) -> Any:
    if name in ("variant", "status"):
        return text
    return int(text) if name in ("seed", "steps") else float(text)


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
