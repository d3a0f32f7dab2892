"""Read CSV and TSV tables."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from lightning_rdrop.data.plain_text import read_text
from lightning_rdrop.data.table import Row, Table


def read_csv(path: Path) -> Table:
    """Read a CSV file; a cell with a comma, a quote or a line break must be in double quotes.

    Raises:
        ValueError: the file is malformed.
    """
    return _read(path, delimiter=",")


def read_tsv(path: Path) -> Table:
    """Read a TSV file; quotes have no special meaning.

    Raises:
        ValueError: the file is malformed.
    """
    return _read(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read(path: Path, delimiter: str, **dialect: Any) -> Table:
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # no limit on the length of a cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **dialect)
    header: list[str] = []
    rows: list[Row] = []
    lines: list[int] = []
    line = 1
    try:
        for cells in reader:
            if not cells:
                pass  # a blank line
            elif not header:
                header = _checked_header(path, line, cells, delimiter)
            elif len(cells) == len(header):
                rows.append(dict(zip(header, cells, strict=True)))
                lines.append(line)
            else:
                hint = " A text with a comma must be in double quotes." if delimiter == "," else ""
                raise ValueError(
                    f"{path}, line {line}: the header has {len(header)} columns, but this row has {len(cells)}.{hint}"
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: wrong quoting ({error}). Put a text with a quote in double quotes, and double the "
            "quote inside it."
        ) from None
    return Table(rows, str(path), lines)


def _checked_header(path: Path, line: int, header: list[str], delimiter: str) -> list[str]:
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise ValueError(f"{path}, line {line}: the header has the column {twice[0]!r} twice.")
    other = next((sign for sign in ",;\t|" if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise ValueError(
            f"{path}, line {line}: the cells are separated by {other!r}, but a {path.suffix} file needs {delimiter!r}."
        )
    return header
