"""Rows that know their place in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class Table(list[Row]):
    """The rows of a table, each with its place in the file.

    Args:
        rows: mappings from columns to cells.
        source: the file.
        lines: the line on which each row begins; None for files without lines.

    Example:
        >>> Table([{"sentence": "a"}], "train.csv", [2]).place(0)
        'train.csv, line 2'
        >>> Table([{"sentence": "a"}], "train.parquet").place(0)
        'train.parquet, row 1'
    """

    def __init__(self, rows: Iterable[Row], source: str, lines: Sequence[int] | None = None) -> None:
        super().__init__(rows)
        self.source = source
        self.lines = lines

    def place(self, index: int) -> str:
        """The place of a row, for a message."""
        return f"{self.source}, row {index + 1}" if self.lines is None else f"{self.source}, line {self.lines[index]}"

    def check(self, refuse: Callable[[Row], object]) -> None:
        """Call a check with each row.

        Raises:
            ValueError: the check's message, after the place of the row.
        """
        for index, row in enumerate(self):
            try:
                refuse(row)
            except ValueError as error:
                raise ValueError(f"{self.place(index)}: {error}") from None
