"""Read tables of JSON objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_rdrop.data.plain_text import read_text
from lightning_rdrop.data.table import Row, Table


def read_json(path: Path) -> Table:
    """Read an array of objects, or one object per line; NaN is a missing cell, as pandas writes it.

    Raises:
        ValueError: the file has other content.
    """
    text = read_text(path)
    table = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    if len(table) == 1 and table[0] and all(isinstance(cell, dict) for cell in table[0].values()):
        raise ValueError(
            f"{path}: the table is written by columns. Write it by rows; in pandas, "
            "to_json(path, orient='records', lines=True)."
        )
    return table


def _array(path: Path, text: str) -> Table:
    try:
        rows = _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}).") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: not a JSON object: {_excerpt(json.dumps(row))}.")
    return Table(rows, str(path))


def _lines(path: Path, text: str) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except json.JSONDecodeError as error:
            what = f"not a JSON object: {_excerpt(line)} ({error.msg} at column {error.colno})."
            raise ValueError(f"{path}, line {number}: {what}{_one_object(text)}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object: {_excerpt(line)}.")
        rows.append(row)
        lines.append(number)
    return Table(rows, str(path), lines)


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_constant, object_pairs_hook=_object)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice.")
    return row


def _one_object(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        return ""
    return " The file is a single object; write an array of objects, or one object per line."


def _excerpt(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
