"""Predictions as a table: input and output, row by row."""

from __future__ import annotations

import csv
import json
import math
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
from lightning_rdrop.predict import MCPrediction


class PredictionTable(BasePredictionWriter):
    """Writes the predictions of ``Trainer.predict`` to a table, in input order, for any number of processes.

    A row has the columns of the input, ``prediction``, and for classes its ``probability``. With ``mc_passes`` it also
    has ``entropy`` and ``mutual_information`` in nats, or the ``std`` of a number. In JSON, dates are texts and NaN is
    null. The file appears when it is complete and replaces an older one.

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
        """Reject before prediction what would fail after it."""
        super().setup(trainer, pl_module, stage)
        data = getattr(trainer, "datamodule", None)
        if stage != "predict" or not isinstance(data, TextDataModule):
            return
        source = data.tables["predict"]
        if source is not None and self.path.exists() and self.path.samefile(source):
            raise ValueError(f"predictions={str(self.path)!r} is the input table: choose another file.")
        new = {"prediction", "probability", "probabilities", "log_variance"}
        if getattr(pl_module, "mc_passes", 0):
            new |= {"entropy", "mutual_information", "std"}
        if taken := new & {*(data.rows("predict") or [{}])[0]}:
            raise ValueError(f"The input has a column {min(taken)!r}, a name that predictions use: rename it.")

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
        """Keep the table cells of a batch, which are small, instead of its tensors."""
        if dataloader_idx:
            raise ValueError("predictions are written to one table: predict with one data loader at a time.")
        prediction = move_data_to_device(prediction, torch.device("cpu"))
        if isinstance(pl_module, Task):
            rows = _cells(pl_module, prediction, self.all_probabilities)
        else:
            rows = one_each(prediction, type(pl_module).__name__)
        if not batch_indices:  # the loader makes its own batches
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
        older = ", replacing an older file" if self.path.exists() else ""
        self._write(rows)
        rank_zero_info(f"predictions: {self.path}, {len(rows)} rows{older}")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with unfinished.open("w", encoding="utf8", errors="backslashreplace", newline="") as file:
                (_write_csv if self.path.suffix.lower() == ".csv" else _write_json)(file, rows)
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def _cells(module: Task, prediction: Any, all_probabilities: bool) -> list[dict[str, Any]]:
    """The table cells of a batch; for a model average also the disagreement of its models."""
    if not isinstance(prediction, MCPrediction):
        return module.readable(prediction, all_probabilities=all_probabilities)
    if prediction.entropy is None or prediction.mutual_information is None:  # a number
        return [
            {"prediction": mean, "std": std}
            for mean, std in zip(prediction.mean.tolist(), prediction.std.tolist(), strict=True)
        ]
    rows = module.readable(prediction.mean, all_probabilities=all_probabilities)
    spread = zip(prediction.entropy.tolist(), prediction.mutual_information.tolist(), strict=True)
    return [
        row | {"entropy": entropy, "mutual_information": information}
        for row, (entropy, information) in zip(rows, spread, strict=True)
    ]


def _gathered(found: dict[int, Row]) -> dict[int, Row]:
    """The rows of all processes; a row that a sampler gave to several of them is kept once."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, found)
    return {index: row for part in parts for index, row in part.items()}


def _write_json(file: TextIO, rows: list[dict[str, Any]]) -> None:
    file.writelines(_json(row) + "\n" for row in rows)


def _write_csv(file: TextIO, rows: list[dict[str, Any]]) -> None:
    flat = [{name: value for cell in row.items() for name, value in _flat(*cell)} for row in rows]
    writer = csv.DictWriter(file, list(dict.fromkeys(column for row in flat for column in row)))
    writer.writeheader()
    writer.writerows(flat)


def _flat(column: str, cell: Any) -> Iterator[tuple[str, Any]]:
    """Write probabilities as one column per class, and other lists and mappings as JSON."""
    if column == "probabilities" and isinstance(cell, dict):
        yield from ((f"probability of {name}", value) for name, value in cell.items())
    else:
        yield column, _json(cell) if isinstance(cell, (list, dict)) else cell


def _json(cell: Any) -> str:
    """Write null for NaN and infinity, which JSON does not have, and other values such as dates as text."""
    return json.dumps(_finite(cell), ensure_ascii=False, default=str)


def _finite(cell: Any) -> Any:
    if isinstance(cell, dict):
        return {name: _finite(value) for name, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_finite(value) for value in cell]
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
