"""One run: an ordinary `fit` of one config with one seed, in its own process."""

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
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_rdrop._lightning import monitored_checkpoint
from lightning_rdrop.compare import atomic
from lightning_rdrop.compare.config import Config, callbacks, instances
from lightning_rdrop.lightning_cli import RDropCLI


@dataclass(frozen=True)
class Run:
    """A variant with one seed.

    Args:
        variant: its name.
        seed: value of ``seed_everything``, and of the arguments in ``seed_to``.
        config: of the variant.
        folder: for everything that the run writes.
        seed_to: further arguments that are set to the seed, such as ``data.init_args.draw``.
        keep_checkpoints: whether to keep the checkpoints after the test.
    """

    variant: str
    seed: int
    config: Config
    folder: Path
    seed_to: tuple[str, ...] = ()
    keep_checkpoints: bool = False

    @property
    def result(self) -> dict[str, Any] | None:
        """The measurements, or why the run failed; None if it has not ended."""
        return result_in(self.folder)

    def prepare(self) -> None:
        """Write the config of ``fit``, which every process of a distributed run reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = _isolated(self.config, self.folder / "train")
        atomic.write(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def fail(self, reason: str) -> None:
        """Write that the run failed."""
        self._write_result({"status": f"failed: {reason.removesuffix('.')}"})

    def __call__(self) -> None:
        """Train and test a prepared run once: a finished run is not repeated, and a running one is waited for."""
        if _rank():  # another process of the same run
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
                self.fail(_say(error))
                raise
            if not self.keep_checkpoints:
                for checkpoint in (self.folder / "train").rglob("*.ckpt"):
                    shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
            self._write_result({"status": "done"} | result)

    def _fit(self) -> dict[str, Any]:
        seeds = [f"--{key}={self.seed}" for key in ("seed_everything", *self.seed_to)]
        return Measured(args=["fit", "--config", str(self.folder / "config.yaml"), *seeds]).measured()

    def _write_result(self, result: dict[str, Any]) -> None:
        atomic.write(self.folder / "result.json", json.dumps(result, indent=1))


class Measured(RDropCLI):
    """The CLI, with time and memory measured."""

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
        """The values of one row of the table."""
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


def result_in(folder: Path) -> dict[str, Any] | None:
    """The result of the run in this folder; None if it has not ended."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _isolated(config: Config, folder: Path) -> Config:
    """The config with a separate folder for everything that training writes, so that parallel runs do not conflict."""
    config = copy.deepcopy(config)
    config.pop("seed_everything", None)
    config["test_after_fit"] = True
    trainer = config.setdefault("trainer", {})
    trainer["default_root_dir"] = str(folder)
    for logger in instances(config, "trainer.logger"):
        if "save_dir" in ArgumentParser().add_function_arguments(resolve_name(logger["class_path"])):
            logger["init_args"] = (logger.get("init_args") or {}) | {"save_dir": str(folder)}
    for callback in callbacks(config):
        if (callback.get("init_args") or {}).get("dirpath"):
            callback["init_args"]["dirpath"] = str(folder / "checkpoints")
    if not any("ProgressBar" in callback["class_path"] for callback in callbacks(config)):
        trainer["enable_progress_bar"] = False  # of no use in a log file
    return config


def _rank() -> int:
    """The rank of this process in a distributed run."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def _peak_memory() -> float:
    """Peak memory in MiB, of the tensors on the GPU or of the whole process on the CPU."""
    if used := (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0):
        return used / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _say(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    # torch has an out-of-memory error for the GPU only
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said
    return f"out of memory ({said})" if memory else said
