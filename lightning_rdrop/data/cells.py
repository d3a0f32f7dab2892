"""Read and check the cells of a table."""

from __future__ import annotations

import difflib
import math
from typing import Any

from lightning_rdrop.data.table import Row


def cell(row: Row, column: str) -> Any:
    """The cell of a row in a column.

    Raises:
        ValueError: the column is missing, or the cell is blank.

    Example:
        >>> cell({"Label": "x"}, "label")
        Traceback (most recent call last):
        ValueError: no column 'label', only 'Label'. Did you mean 'Label'?
    """
    if column not in row:
        raise ValueError(no_column(row, column))
    value = row[column]
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    ):
        raise ValueError(f"the column {column!r} is blank.")
    return value


def no_column(row: Row, column: str) -> str:
    """The message for a missing column, with the one that was probably meant."""
    near = [name for name in row if name.strip().casefold() == column.casefold()]
    near = near or difflib.get_close_matches(column, row, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"no column {column!r}, only {', '.join(map(repr, row)) or 'an empty row'}.{hint}"


def text(row: Row, column: str) -> str:
    """The text in a cell.

    Raises:
        ValueError: the cell is blank or not a text.
    """
    value = cell(row, column)
    if not isinstance(value, str):
        raise ValueError(f"the column {column!r} must be a text, got {spell(value)}.")
    return value


def number(row: Row, column: str) -> float:
    """The finite number in a cell.

    Raises:
        ValueError: the cell is blank or not a finite number.

    Example:
        >>> number({"score": "2.5"}, "score")
        2.5
    """
    value = cell(row, column)
    try:
        found = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)  # float takes 1_000
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"the column {column!r} must be a finite number, got {spell(value)}.")
    return found


def items(row: Row, column: str, what: str) -> list[Any]:
    """The list in a cell.

    Raises:
        ValueError: the cell is blank or not a list.
    """
    value = cell(row, column)
    if not isinstance(value, list):
        raise ValueError(f"the column {column!r} must be a list of {what}, got {spell(value)}. Use JSON for lists.")
    return value


def spell(value: Any) -> str:
    """A value and its type, shortened, for a message.

    Example:
        >>> spell([1, 2])
        '[1, 2] (list)'
    """
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
