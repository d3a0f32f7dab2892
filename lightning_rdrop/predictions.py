"""Predictions as a table: what went in, and what came out, row by row."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities import move_data_to_device, rank_zero_info

from lightning_rdrop.data import Row, TextDataModule
from lightning_rdrop.modules import Task
from lightning_rdrop.modules.task import one_each


class PredictionTable(BasePredictionWriter):
    """Writes what ``Trainer.predict`` finds as a table, in the order of the input, from however many processes.

    A row has the columns of the input, ``prediction``, and for classes ``probability``, that of the prediction. The
    file appears when it is complete, and takes the place of an older one.

    Args:
        path: a ``.csv`` or ``.jsonl`` file.
        all_probabilities: write the probability of each class: as ``probabilities`` by name in a ``.jsonl`` file, as
            columns ``probability of ...`` in a ``.csv`` file.

    Raises:
        ValueError: another suffix; the file is the input; a column of the input has the name of a new one; several
            data loaders.
    """

    def __init__(self, path: str | Path, *, all_probabilities: bool = False) -> None:
        super().__init__("batch")
        self.path = Path(path)
        self.all_probabilities = all_probabilities
        if self.path.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"predictions must be a .csv or .jsonl file, got {str(path)!r}.")
        self._found: dict[int, Row] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before the prediction what would fail after it."""
        super().setup(trainer, pl_module, stage)
        data = getattr(trainer, "datamodule", None)
        if stage != "predict" or not isinstance(data, TextDataModule):
            return
        source = data.tables["predict"]
        if source is not None and self.path.exists() and self.path.samefile(source):
            raise ValueError(f"predictions={str(self.path)!r} is the table of the input: give another file.")
        taken = {"prediction", "probability", "probabilities"} & {*(data.rows("predict") or [{}])[0]}
        if taken:
            raise ValueError(f"The input has a column {min(taken)!r}, and so would the predictions: rename it.")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._found = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the cells of a batch, which are small, and not its tensors."""
        if dataloader_idx:
            raise ValueError("predictions are one table: predict with one data loader at a time.")
        prediction = move_data_to_device(prediction, torch.device("cpu"))
        if isinstance(pl_module, Task):
            rows = pl_module.readable(prediction, all_probabilities=self.all_probabilities)
        else:
            rows = one_each(prediction, type(pl_module).__name__)
        if batch_indices is None:  # the loader makes its own batches
            if trainer.world_size > 1:
                raise ValueError("predictions from several processes need a DataLoader with a batch size.")
            batch_indices = range(len(self._found), len(self._found) + len(rows))
        self._found |= zip(batch_indices, rows, strict=True)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = _gathered(self._found)
        if not trainer.is_global_zero:
            return
        data = getattr(trainer, "datamodule", None)
        order = sorted(found)
        cells = [found[index] for index in order]
        if isinstance(data, TextDataModule):
            inputs = data.rows("predict") or []
            given = [inputs[index] for index in order]
            rows = [{**row, **new} for row, new in zip(given, data.align(given, cells), strict=True)]
        else:
            rows = [dict(row) for row in cells]
        older = " in the place of an older file" if self.path.exists() else ""
        self._write(rows)
        rank_zero_info(f"predictions: {self.path}, {len(rows)} rows{older}")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with unfinished.open("w", encoding="utf8", newline="") as file:
                (_write_csv if self.path.suffix.lower() == ".csv" else _write_json)(file, rows)
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def _gathered(found: dict[int, Row]) -> dict[int, Row]:
    """Those of all processes; a row that a sampler gave to several of them counts once."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, found)
    return {index: row for part in parts for index, row in part.items()}


def _write_json(file: TextIO, rows: list[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_csv(file: TextIO, rows: list[dict[str, Any]]) -> None:
    flat = [{name: value for cell in row.items() for name, value in _flat(*cell)} for row in rows]
    writer = csv.DictWriter(file, list(dict.fromkeys(column for row in flat for column in row)))
    writer.writeheader()
    writer.writerows(flat)


def _flat(column: str, cell: Any) -> Iterator[tuple[str, Any]]:
    """The probabilities in a column for each class, and other lists and mappings as JSON."""
    if column == "probabilities" and isinstance(cell, dict):
        yield from ((f"probability of {name}", value) for name, value in cell.items())
    else:
        yield column, json.dumps(cell, ensure_ascii=False) if isinstance(cell, (list, dict)) else cell
