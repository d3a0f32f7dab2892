"""`lightning-rdrop compare`."""

from __future__ import annotations

import fcntl
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from lightning_rdrop.compare import results
from lightning_rdrop.compare.engine import Engine
from lightning_rdrop.compare.plan import Plan
from lightning_rdrop.compare.report import Report
from lightning_rdrop.compare.run import Run


def parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="lightning-rdrop compare", description=__doc__)
    parser.add_argument("--config", action="append", default=[], help="Config of fit that all variants share.")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        help="NAME=FILE.yaml, or NAME='--model.rdrop_alpha=1', laid over the config; the first is the reference.",
    )
    parser.add_argument("--seeds", type=int | list[int], default=5, help="5 is 1 to 5; or a list.")
    parser.add_argument("--seed-to", action="append", default=[], help="Also set to the seed: data.init_args.draw")
    parser.add_argument("--out", type=str | None, default=None, help="Folder of results, report and runs.")
    parser.add_argument("--workers", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--executor", type=Literal["local", "slurm"], default="local", help="Where runs take place.")
    parser.add_argument("--slurm", type=dict[str, Any], default={}, help="Of sbatch: --slurm.partition gpu")
    parser.add_argument("--keep-checkpoints", type=bool, default=False, help="Keep those of finished runs.")
    parser.add_argument("--report", type=str | None, default=None, help="Only report on this folder.")
    return parser


def compare(args: Sequence[str]) -> None:
    """Run what has not been run yet, and report."""
    missing = [name for name in ("submitit", "scipy", "rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"compare needs {', '.join(missing)}: pip install 'lightning-rdrop[compare]'")
    command = parser()
    given = command.parse_args(list(args))
    try:
        if given.report is not None:
            report(Path(given.report))
            return
        if given.out is None or not given.config or not given.variant:
            raise ValueError("give --config, --variant and --out; or --report FOLDER for the report alone.")
        if given.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {given.workers}.")
        seeds = list(range(1, given.seeds + 1)) if isinstance(given.seeds, int) else given.seeds
        plan = Plan.of(given.config, given.variant, given.seed_to)
        folder = Path(given.out)
        with _alone(folder), _interruptible():
            earlier = Plan.read(folder)
            whole = plan.continues(earlier) if earlier else plan
            whole.write(folder)
            engine = Engine(given.executor, given.workers, given.slurm)
            runs = [
                Run(
                    name,
                    seed,
                    config,
                    folder.absolute() / "runs" / name / str(seed),
                    plan.seed_to,
                    given.keep_checkpoints,
                )
                for seed in seeds
                for name, config in plan.variants.items()
            ]
            work(whole, folder, runs, engine)
            report(folder)
    except ValueError as error:
        print(f"lightning-rdrop compare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def work(plan: Plan, folder: Path, runs: Sequence[Run], engine: Engine) -> None:
    """Run what is not finished, and keep ``results.csv`` up to date."""
    rows = {(row["variant"], row["seed"]): row for row in results.read(folder / "results.csv")}
    rows |= {(run.variant, run.seed): results.row_of(run) for run in runs if run.result is not None}

    def save() -> None:
        order = {name: position for position, name in enumerate(plan.variants)}
        ordered = sorted(rows.values(), key=lambda row: (order.get(row["variant"], len(order)), row["seed"]))
        results.write(folder / "results.csv", ordered)

    save()
    waiting = [run for run in runs if rows.get((run.variant, run.seed), {}).get("status") != "done"]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished.", flush=True)
    for done, run in enumerate(engine.execute(waiting), len(runs) - len(waiting) + 1):
        row = rows[run.variant, run.seed] = results.row_of(run)
        save()
        said = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name.startswith("test/"))
        print(f"[{done}/{len(runs)}] {run.variant}, seed {run.seed}: {said or row['status']}", flush=True)


def report(folder: Path) -> None:
    """Print and write the report of the results in a folder."""
    from rich.console import Console  # an extra

    plan = Plan.read(folder)
    if plan is None:
        raise ValueError(f"--report {folder}: there is no comparison.yaml in it, which every comparison begins with.")
    made = Report(plan, results.read(folder / "results.csv"))
    made.write(folder)
    Console().print(made.table())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A context in which no other command compares in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder}: another compare is at work in it.") from None
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """A context in which SIGTERM is what Ctrl-C is."""
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
