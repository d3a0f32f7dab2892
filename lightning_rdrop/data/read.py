"""Read a table from a file of any supported format."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from lightning_rdrop.data.arrow import read_folder, read_parquet
from lightning_rdrop.data.delimited import read_csv, read_tsv
from lightning_rdrop.data.json_rows import read_json
from lightning_rdrop.data.table import Table

READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": read_parquet,
}
"""The function that reads a file, by its suffix."""


def read_table(path: str | Path, split: str | None = None) -> Table:
    """Read a table with one row per example, as mappings from column names to cells.

    ``.csv`` and ``.tsv`` have a header line. ``.json`` and ``.jsonl`` contain one object per line, or an array of
    objects. ``.parquet`` and the folder of a Hugging Face ``Dataset`` or ``DatasetDict`` (``save_to_disk``) work as
    well; class labels are replaced by their names. Text is UTF-8, with or without a byte-order mark.

    Args:
        path: the file or folder.
        split: ``"train"``, ``"val"``, ``"test"``, ``"predict"`` or ``"unlabeled"``: the part of a ``DatasetDict``.

    Raises:
        ValueError: an unknown format, or a malformed file; the message has the file and the line.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the package that reads a Parquet file or a folder is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix not in READERS:
        raise ValueError(
            f"{path}: a table must be a .csv, .tsv, .json, .jsonl or .parquet file, or the folder of a Hugging Face "
            f"DatasetDict, not {suffix or 'a file without a suffix'}."
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.{similar_file(path)}")
    table = read_folder(path, split) if path.is_dir() else READERS[suffix](path)
    if not table:
        raise ValueError(f"{path}: the table has no rows.")
    return table


def similar_file(path: Path) -> str:
    """Suggest the file name closest to a missing one; empty if none is similar."""
    stems = {other.stem: other.name for other in path.parent.glob(f"*{path.suffix}")}
    near = difflib.get_close_matches(path.stem, stems, n=1)
    return f" Did you mean {stems[near[0]]}?" if near else ""
