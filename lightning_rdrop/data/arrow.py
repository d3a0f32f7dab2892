"""Read saved Hugging Face datasets: Parquet files and folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_rdrop.data.table import Row, Table
from lightning_rdrop.extras import require

SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test",),
    "predict": ("predict",),
    "unlabeled": ("unlabeled", "unsupervised"),
}
"""Names of each split in a ``DatasetDict``."""


def read_parquet(path: Path) -> Table:
    """Read a Parquet file.

    Raises:
        ValueError: it is not a Parquet file.
        ModuleNotFoundError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", "datasets", f"{path}: a Parquet file")
    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow has its own exceptions
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}).") from None
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    return _named(table.to_pylist(), described.get("info", {}).get("features", {}), str(path))


def read_folder(path: Path, split: str | None) -> Table:
    """Read a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    Raises:
        ValueError: the folder is not a saved dataset, or is a ``DatasetDict`` without this split.
        ModuleNotFoundError: datasets is not installed.
    """
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise ValueError(f"{path}: not the folder of a Hugging Face Dataset or DatasetDict (save_to_disk).")
    found = require("datasets", "datasets", f"{path}: a folder").load_from_disk(str(path))
    if isinstance(found, dict):
        name = next((name for name in SPLITS.get(split or "", ()) if name in found), None)
        if name is None:
            raise ValueError(
                f"{path}: the DatasetDict has the splits {', '.join(found)}, but none for {split!r}. "
                f"Pass the path of one of them, such as {path / next(iter(found), 'split')}."
            )
        path, found = path / name, found[name]
    return _named(found.to_list(), found.features.to_dict(), str(path))


def _named(rows: Sequence[Row], features: Mapping[str, Any], source: str) -> Table:
    """Replace class labels by their names, and -1 by None."""
    names = {column: found for column, feature in features.items() if (found := _class_names(feature))}
    if not names:
        return Table(rows, source)
    return Table([{**row, **{column: _name(row[column], names[column]) for column in names}} for row in rows], source)


def _class_names(feature: Any) -> list[str] | None:
    """The names of a class label, or of a list of them. A struct is a mapping without a ``_type``, but any field."""
    kind = feature.get("_type") if isinstance(feature, Mapping) else None
    if kind == "ClassLabel":
        names: list[str] | None = feature.get("names")
        return names
    return _class_names(feature["feature"]) if kind in ("List", "LargeList", "Sequence") else None


def _name(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_name(one, names) for one in value]
    return names[value] if isinstance(value, int) and value >= 0 else None
