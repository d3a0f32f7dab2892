"""One run: an ordinary `fit` of one config with one seed, in a process of its own."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_rdrop._lightning import monitored_checkpoint
from lightning_rdrop.compare.config import Config, callbacks, instances
from lightning_rdrop.lightning_cli import RDropCLI


@dataclass(frozen=True)
class Run:
    """A variant with one seed.

    Args:
        variant: its name.
        seed: given to ``seed_everything``, and to the arguments of ``seed_to``.
        config: of the variant.
        folder: where all that it writes is put.
        seed_to: further arguments that are set to the seed, such as ``data.init_args.draw``.
        keep_checkpoints: whether the checkpoints stay after the test.
    """

    variant: str
    seed: int
    config: Config
    folder: Path
    seed_to: tuple[str, ...] = ()
    keep_checkpoints: bool = False

    @property
    def result(self) -> dict[str, Any] | None:
        """What it measured, or why it failed; None if it has not ended."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, result: dict[str, Any]) -> None:
        """Write the result at once: there is none, or a whole one."""
        path = self.folder / "result.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1))
        part.replace(path)

    def __call__(self) -> None:
        """Train and test, once, whoever else does the same: a finished run is not run again, a running one awaited."""
        if _rank():  # a further process of a distributed run
            self._fit()
            return
        with (self.folder / "lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if (self.result or {}).get("status") == "done":
                return
            (self.folder / "result.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder / "train", ignore_errors=True)
            try:
                result = self._fit()
            except Exception as error:
                self.write({"status": f"failed: {_say(error)}"})
                raise
            if not self.keep_checkpoints:
                for checkpoint in (self.folder / "train").rglob("*.ckpt"):
                    shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
            self.write({"status": "done"} | result)

    def _fit(self) -> dict[str, Any]:
        config = self.folder / "config.yaml"
        if not _rank():
            config.write_text(yaml.safe_dump(_isolated(self.config, self.folder / "train"), sort_keys=False))
        seeds = [f"--{key}={self.seed}" for key in ("seed_everything", *self.seed_to)]
        return Measured(args=["fit", "--config", str(config), *seeds]).measured()


class Measured(RDropCLI):
    """The CLI, with a stop-watch."""

    def before_fit(self) -> None:
        super().before_fit()
        self._start = time.perf_counter()

    def after_fit(self) -> None:
        self._seconds = time.perf_counter() - self._start
        self._memory = _peak_memory()
        self._steps = self.trainer.global_step
        checkpoint = monitored_checkpoint(self.trainer)
        best = getattr(checkpoint, "best_model_score", None)
        self._validation = {} if best is None else {checkpoint.monitor: float(best)}
        super().after_fit()

    def measured(self) -> dict[str, Any]:
        """What one line of the table needs."""
        test = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if both := test.keys() & self._validation.keys():
            raise ValueError(f"validation and test both log {both.pop()}: log them as val/... and test/...")
        return {
            "test": test,
            "validation": self._validation,
            "steps": self._steps,
            "seconds": self._seconds,
            "peak_memory_mib": self._memory,
        }


def _isolated(config: Config, folder: Path) -> Config:
    """The config with a folder of its own for all that a training writes, so that runs at the same time do not meet."""
    config = copy.deepcopy(config)
    config.pop("seed_everything", None)
    config["test_after_fit"] = True
    trainer = config.setdefault("trainer", {})
    trainer["default_root_dir"] = str(folder)
    for logger in instances(config, "trainer.logger"):
        logger.setdefault("init_args", {})["save_dir"] = str(folder)
    for callback in callbacks(config):
        if (callback.get("init_args") or {}).get("dirpath"):
            callback["init_args"]["dirpath"] = str(folder / "checkpoints")
    if not any("ProgressBar" in callback["class_path"] for callback in callbacks(config)):
        trainer["enable_progress_bar"] = False  # nobody watches a log
    return config


def _rank() -> int:
    """Which process of a distributed run this is."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def _peak_memory() -> float:
    """MiB that tensors took on the GPU, or all of the process did on the CPU."""
    if used := (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0):
        return used / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _say(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    # torch has an error for the memory of a GPU, and none for that of a CPU
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said
    return f"out of memory ({said})" if memory else said
