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

from jsonargparse import ArgumentParser, Namespace

from lightning_rdrop.compare.engine import Engine
from lightning_rdrop.compare.equal_cost import add_equal_cost
from lightning_rdrop.compare.plan import Plan
from lightning_rdrop.compare.progress import Progress
from lightning_rdrop.compare.report import Report
from lightning_rdrop.compare.results import Results, Row, finished
from lightning_rdrop.compare.run import Run, result_in
from lightning_rdrop.compare.summary import Summary


def parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="lightning-rdrop compare", description=__doc__)
    parser.add_argument("--config", action="append", default=[], help="Config of fit shared by all variants.")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        help="NAME=FILE.yaml, or NAME='--model.rdrop_alpha=1', applied over the config; the first is the reference.",
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        help="KEY=VALUE,VALUE makes variants of the config, NAME:KEY=VALUE,VALUE of a variant; grids are combined.",
    )
    parser.add_argument(
        "--equal-cost",
        nargs="?",
        const="",
        default=None,
        metavar="NAME",
        help="Add the reference trained for the time of this variant (default: the second), and this with alpha 0.",
    )
    parser.add_argument("--seeds", type=int | list[int], default=5, help="A number (5 is 1 to 5), or a list.")
    parser.add_argument("--seed-to", action="append", default=[], help="Also set this to the seed: data.init_args.draw")
    parser.add_argument("--out", type=str | None, default=None, help="Folder for results, report and runs.")
    parser.add_argument("--workers", type=int, default=1, help="Number of parallel runs.")
    parser.add_argument("--executor", type=Literal["local", "slurm"], default="local", help="Where to run.")
    parser.add_argument("--slurm", type=dict[str, Any], default={}, help="Options of sbatch: --slurm.partition gpu")
    parser.add_argument("--keep-checkpoints", type=bool, default=False, help="Keep checkpoints of finished runs.")
    parser.add_argument("--report", type=str | None, default=None, help="Only write the report of this folder.")
    return parser


def compare(args: Sequence[str]) -> None:
    """Run what is missing, and report."""
    missing = [name for name in ("submitit", "scipy", "rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"compare needs {', '.join(missing)}: pip install 'lightning-rdrop[compare]'")
    given = parser().parse_args(list(args))
    try:
        if given.report is not None:
            report_on(Path(given.report))
        else:
            compare_all(given)
    except KeyboardInterrupt:
        print("Stopped. Run the same command to continue.", file=sys.stderr)
        sys.exit(130)


def compare_all(given: Namespace) -> None:
    """Plan, run and report."""
    if given.out is None or not given.config or not (given.variant or given.grid):
        raise ValueError("pass --config, --out, and --variant or --grid; or only --report FOLDER.")
    if given.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {given.workers}.")
    seeds = [*range(1, given.seeds + 1)] if isinstance(given.seeds, int) else given.seeds
    if not seeds or len({*seeds}) < len(seeds):
        raise ValueError(f"--seeds must be a number >= 1, or a list of different seeds, got {given.seeds}.")
    plan = Plan.of(given.config, given.variant, given.grid, given.seed_to)
    matched = None if given.equal_cost is None else _equal_cost_variant(plan, given.equal_cost)
    folder = Path(given.out)
    with _locked(folder), _interruptible():
        whole = _continued(plan, folder)
        engine = Engine(given.executor, given.workers, given.slurm)
        names = [*plan.variants]
        rows = work(whole, names, seeds, folder, engine, given.keep_checkpoints)
        if matched is not None:
            whole = add_equal_cost(whole, rows, matched)
            added = [*whole.equal_cost[matched]]
            rows, names = work(whole, added, seeds, folder, engine, given.keep_checkpoints), names + added
        report_on(folder)
    rows = [row for row in rows if row["variant"] in names and row["seed"] in seeds]
    if failed := [row for row in rows if row["status"] != "done"]:
        last = failed[-1]
        print(
            f"{len(failed)} of {len(rows)} runs failed, such as {last['variant']}, seed {last['seed']}: "
            f"{last['status'].removeprefix('failed: ')}. Run the same command to retry them; {folder / 'report.md'} "
            "lists all.",
            file=sys.stderr,
        )
        sys.exit(1)


def work(
    plan: Plan, names: Sequence[str], seeds: Sequence[int], folder: Path, engine: Engine, keep_checkpoints: bool
) -> list[Row]:
    """Run these variants with these seeds unless already done, and keep ``results.csv`` up to date.

    All variants of a seed run before the next seed, so that the report has pairs from the beginning.
    """
    plan.write(folder)
    place = folder.absolute() / "runs"
    runs = [
        Run(name, seed, plan.variants[name], place / name / str(seed), tuple(plan.seed_to), keep_checkpoints)
        for seed in seeds
        for name in names
    ]
    table = Results(folder / "results.csv", [*plan.variants])
    for run in runs:  # runs that ended after an earlier command was killed
        if run.result is not None:
            table.add(run)
    waiting = [run for run in runs if not table.is_done(run)]
    with Progress(len(runs), waiting) as progress:
        for run in engine.execute(waiting):
            row, report = table.add(run), Report(Summary(plan, table.rows))
            report.write(folder)
            progress.ended(run, row, report)
    return table.rows


def report_on(folder: Path) -> None:
    """Print and write the report of the results in a folder."""
    from rich.console import Console  # an extra

    plan = Plan.read(folder)
    if plan is None:
        raise ValueError(f"--report {folder}: there is no comparison.yaml in it. Pass the --out of a comparison.")
    report, console = Report(Summary(plan, Results(folder / "results.csv").rows)), Console()
    if not console.is_terminal:  # rich assumes 80 columns for a file
        console.width = max(console.width, 200)
    report.write(folder)
    console.print(report.table())
    console.print(report.notes(), highlight=False)


def _equal_cost_variant(plan: Plan, name: str) -> str:
    """The variant of ``--equal-cost``, by default the second."""
    others = [*plan.families][1:]
    name = name or next(iter(others), "")
    if name not in others:
        raise ValueError(f"--equal-cost {name}: pass a variant besides the reference: {', '.join(others) or 'none'}.")
    return name


def _continued(plan: Plan, folder: Path) -> Plan:
    """The plan, extended by that of an earlier command with the same folder."""
    earlier = Plan.read(folder)
    begun = _begun(folder, earlier or plan)
    if earlier is not None:
        return plan.continues(earlier, begun)
    if begun:
        raise ValueError(
            f"--out {folder}: there are runs of {', '.join(sorted(begun))}, but comparison.yaml with their configs is "
            "missing. Use another --out."
        )
    return plan


def _begun(folder: Path, plan: Plan) -> set[str]:
    """The variants with a run that is done, or may still be running."""
    begun = {row["variant"] for row in finished(Results(folder / "results.csv").rows)}
    for name in plan.variants:
        results = [result_in(lock.parent) for lock in (folder / "runs" / name).glob("*/lock")]
        if any(result is None or result["status"] == "done" for result in results):
            begun.add(name)
    return begun


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other compare commands."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder}: another compare command is using it.") from None
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGINT interrupt this command and its runs.

    Runs are stopped by SIGINT, which a shell makes background commands and their children ignore.
    """
    earlier = {one: signal.signal(one, signal.default_int_handler) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in earlier.items():
            signal.signal(one, handler)
