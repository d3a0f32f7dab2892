"""Runs in processes of their own, on this machine or on a SLURM cluster, by submitit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_rdrop.compare.run import Run

if TYPE_CHECKING:
    from submitit import Job

_A_YEAR = 365 * 24 * 60
"""In minutes. submitit's local jobs end after 2 minutes otherwise."""


class Engine:
    """Runs, several at a time.

    A run locks its folder, and gives back the result that it finds there: one that is still going on, because the
    process that began it was killed, is awaited instead of being run a second time.

    Args:
        name: ``"local"`` or ``"slurm"``.
        workers: how many run at a time; on a SLURM cluster, how many jobs are queued.
        slurm: arguments of ``sbatch``, such as ``{"partition": "gpu", "time": 120}``.
    """

    def __init__(self, name: str = "local", workers: int = 1, slurm: dict[str, Any] | None = None) -> None:
        self.name = name
        self.workers = workers
        self.slurm = slurm or {}

    def execute(self, runs: Sequence[Run]) -> Iterator[Run]:
        """Run them in this order, and give each as it ends, with a result. What interrupts this, stops them."""
        waiting, free = list(runs), list(range(self.workers))
        running: list[tuple[Job[None], Run, int]] = []
        try:
            while waiting or running:
                while waiting and free:
                    run, slot = waiting.pop(0), free.pop(0)
                    running.append((self._submit(run, slot), run, slot))
                time.sleep(0.2)
                ended = [one for one in running if one[0].done()]
                running = [one for one in running if one not in ended]
                for job, run, slot in ended:
                    free.append(slot)
                    if run.result is None:
                        run.write({"status": f"failed: {self._how_it_ended(job, run)}"})
                    yield run
        finally:
            for job, *_ in running:
                job.cancel(check=False)
            while self.name == "local" and not all(job.done() for job, *_ in running):
                time.sleep(0.1)

    def _submit(self, run: Run, slot: int) -> Job[None]:
        import submitit  # an extra

        log = run.folder / "log"
        log.mkdir(parents=True, exist_ok=True)
        executor: submitit.LocalExecutor | submitit.SlurmExecutor
        if self.name == "slurm":
            executor = submitit.SlurmExecutor(log)
            executor.update_parameters(job_name=f"{run.variant}-{run.seed}", stderr_to_stdout=True, **self.slurm)
        else:
            executor, gpus = submitit.LocalExecutor(log), _share(slot, self.workers)
            executor.update_parameters(
                timeout_min=_A_YEAR, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True
            )
        with _output_into(log / "engine.txt"):
            return executor.submit(run)

    def _how_it_ended(self, job: Job[None], run: Run) -> str:
        state = job.state.lower() if self.name == "slurm" else "killed, or out of memory"
        log = job.paths.stdout
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        said = lines[-1][:200] if lines else "with nothing"
        return f"ended without a result ({state}); {log.relative_to(run.folder.parents[2])} ends: {said}"


def _share(slot: int, workers: int) -> list[int]:
    """The GPUs of one of several workers; where there are fewer than workers, they share them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        gpus = [int(gpu) for gpu in given.split(",") if gpu] if given is not None else range(torch.cuda.device_count())
    except ValueError:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={given} must list numbers, such as 0,1, to be shared out.") from None
    return [*gpus][slot::workers] or ([gpus[slot % len(gpus)]] if gpus else [])


@contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """A context in which a process is started that prints there: what an interrupt makes it say is not for the user.

    Nor is it to keep open, should it outlive this process, what this one prints to.
    """
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    try:
        with path.open("a") as file:
            for stream, _ in kept:
                os.dup2(file.fileno(), stream)
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
