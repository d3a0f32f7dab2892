"""Execute runs in separate processes with submitit, on this machine or on a SLURM cluster."""

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
"""In minutes. Otherwise submitit stops local jobs after 2 minutes."""


class Engine:
    """Execute several runs at a time.

    A run locks its folder, and returns the result that it finds there. If it is still active because the process that
    started it was killed, the engine waits for it instead of running it again.

    Args:
        name: ``"local"`` or ``"slurm"``.
        workers: number of parallel runs; on a SLURM cluster, of queued jobs.
        slurm: arguments of ``sbatch``, such as ``{"partition": "gpu", "time": 120}``.
    """

    def __init__(self, name: str = "local", workers: int = 1, slurm: dict[str, Any] | None = None) -> None:
        self.name = name
        self.workers = workers
        self.slurm = slurm or {}

    def execute(self, runs: Sequence[Run]) -> Iterator[Run]:
        """Execute runs in this order, and yield each when it has a result. An interruption stops them all."""
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
                        run.fail(self._how_it_ended(job, run))
                    yield run
        finally:
            for job, *_ in running:
                job.cancel(check=False)
            while self.name == "local" and not all(job.done() for job, *_ in running):
                time.sleep(0.1)

    def _submit(self, run: Run, slot: int) -> Job[None]:
        import submitit  # an extra

        run.prepare()
        log = run.folder / "log"
        log.mkdir(exist_ok=True)
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
        state = job.state.lower() if self.name == "slurm" else "exited, killed, or out of memory"
        log = job.paths.stdout
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        said = lines[-1][:200] if lines else "(empty)"
        return f"ended without a result ({state}); {log.relative_to(run.folder.parents[2])} ends: {said}"


def _share(slot: int, workers: int) -> list[int]:
    """The GPUs of one of several workers; they share GPUs if there are fewer of these."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        gpus = [int(gpu) for gpu in given.split(",") if gpu] if given is not None else range(torch.cuda.device_count())
    except ValueError:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={given} must list numbers, such as 0,1, to be divided.") from None
    return [*gpus][slot::workers] or ([gpus[slot % len(gpus)]] if gpus else [])


@contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Redirect the output of a process that is started in this context to a file.

    What it prints on an interrupt is not for the user, and if it outlives this process it must not keep our output
    open.
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
