"""Real runs of `lightning-rdrop compare`, each a process that takes seconds to start, so that there are few of them."""

import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lightning_rdrop.compare.engine import Engine
from lightning_rdrop.compare.run import Run

pytest.importorskip("submitit")

pytestmark = pytest.mark.timeout(900)  # a dozen processes, each of which imports torch and Lightning

MINE = """
import os, signal, sys, time
from pathlib import Path
import pytorch_lightning as pl, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Network(nn.Sequential):
    def __init__(self, p: float = 0.3):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 3))

class Data(pl.LightningDataModule):
    def __init__(self, rows: int = 32, draw: int = 0):
        super().__init__()
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(draw))
        self.rows = TensorDataset(x, x[:, :3].argmax(-1))
    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8, shuffle=True)
    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=8)
    test_dataloader = val_dataloader

class Diary(pl.Callback):
    '''Writes down who trains, and waits for a file to go away.'''
    def write(self, trainer, what):
        run = "/".join(Path(trainer.default_root_dir).parts[-3:-1])
        with open("diary.txt", "a") as file:
            file.write(f"{what} {run} {os.getpid()}\\n")
    def on_train_start(self, trainer, module):
        self.write(trainer, "begins")
        while Path("hold").exists():
            time.sleep(0.05)
    def on_test_end(self, trainer, module):
        self.write(trainer, "ends")

class Fails(pl.Callback):
    def __init__(self, how: str):
        self.how = how
    def on_train_start(self, trainer, module):
        if self.how == "crash" and not Path("mended").exists():
            raise KeyError("nothing there")
        elif self.how == "greed":
            torch.empty(2**60, dtype=torch.uint8)
        elif self.how == "killed":  # as the kernel does where memory is short
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "exit":
            sys.exit(3)
"""

CONFIG = {
    "model": {
        "class_path": "Classifier",
        "init_args": {"network": {"class_path": "mine.Network"}, "num_classes": 3, "rdrop_alpha": 2.0},
    },
    "data": {"class_path": "mine.Data"},
    "callbacks": {
        "alpha": {"class_path": "AlphaScheduler", "init_args": {"shape": "linear", "ramp": 4}},
        "best": {
            "class_path": "ModelCheckpoint",
            "init_args": {"monitor": "val/accuracy", "mode": "max", "dirpath": "weights"},
        },
        "diary": {"class_path": "mine.Diary"},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "logger": {
            "class_path": "pytorch_lightning.loggers.CSVLogger",
            "init_args": {"save_dir": "logs", "name": "run"},
        },
    },
}
TWO = ["--config", "base.yaml", "--variant", "plain=plain.yaml", "--variant", "rdrop=", "--seed-to", "data.draw"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE)
    (folder / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "plain.yaml").write_text("model: {init_args: {rdrop_views: 1}}")
    return folder


def start(folder, *arguments, deaf=False, **environment):
    """The command, with SIGINT ignored as by what a shell starts in the background, if it is deaf."""
    repository = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": repository, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_rdrop", "compare", *arguments],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN if deaf else signal.SIG_DFL),
    )  # fmt: skip


def run(folder, *arguments, status=0, **environment):
    process = start(folder, *arguments, **environment)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == status, printed
    return printed


def table(folder):
    """The lines of the CSV by variant and seed."""
    with (folder / "results.csv").open() as file:
        return {(row["variant"], int(row["seed"])): row for row in csv.DictReader(file)}


def metrics(folder):
    """Those that are the same in every run."""
    changing = ("seconds", "peak_memory_mib")
    return {key: {k: v for k, v in row.items() if k not in changing} for key, row in table(folder).items()}


def diary(folder, what):
    path = folder / "diary.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(run, int(pid)) for kind, run, pid in lines if kind == what]


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("nothing happened for five minutes", pytrace=False)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def whole(folder):
    """Two variants and two seeds, two at a time, never interrupted."""
    run(folder, *TWO, "--seeds", "2", "--out", "whole", "--workers", "2")
    (folder / "diary.txt").unlink()
    return folder / "whole"


def test_every_run_is_a_fit_and_a_test_of_its_own(whole):
    rows = table(whole)
    assert list(rows) == [("plain", 1), ("plain", 2), ("rdrop", 1), ("rdrop", 2)]
    assert {row["status"] for row in rows.values()} == {"done"}
    assert {row["steps"] for row in rows.values()} == {"8"}
    assert len({row["test/ce"] for row in rows.values()}) == 4  # seeds and variants make a difference
    for (variant, seed), row in rows.items():
        (logged,) = (whole / "runs" / variant / str(seed)).rglob("metrics.csv")
        with logged.open() as file:
            lines = list(csv.DictReader(file))
        best = max(float(line["val/accuracy"]) for line in lines if line["val/accuracy"])
        assert float(row["val/accuracy"]) == pytest.approx(best, abs=1e-5)
        assert float(row["test/accuracy"]) == pytest.approx(best, abs=1e-5)  # of the best weights, on the same rows
        (config,) = (whole / "runs" / variant / str(seed) / "train").rglob("config.yaml")
        config = yaml.safe_load(config.read_text())
        assert (config["seed_everything"], config["data"]["init_args"]["draw"]) == (seed, seed)
        assert 0 < float(row["seconds"]) < 100
        assert 100 < float(row["peak_memory_mib"]) < 10_000
    assert not list(whole.rglob("*.ckpt"))
    assert (whole / "report.png").stat().st_size > 10_000
    assert "| plain | 2 | " in (whole / "report.md").read_text()


def test_validation_and_test_are_of_the_checkpoint_with_a_metric(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    first = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3}}
    run = Run("two", 1, CONFIG | {"callbacks": {"first": first, "best": CONFIG["callbacks"]["best"]}}, folder / "two")
    run.prepare()
    run()
    assert run.result["validation"] == {"val/accuracy": run.result["test"]["test/accuracy"]}  # the rows are the same


def test_the_config_is_there_before_any_process_of_a_run_starts(tmp_path, monkeypatch):
    run, configs = Run("plain", 1, CONFIG | {"trainer": {}}, tmp_path / "plain/1"), []

    def submit(executor, run):
        configs.append(yaml.safe_load((run.folder / "config.yaml").read_text()))
        (run.folder / "result.json").write_text('{"status": "done"}')
        return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr("submitit.LocalExecutor.submit", submit)
    assert [*Engine().execute([run])] == [run]
    assert configs[0]["test_after_fit"] is True


def test_a_logger_that_takes_no_folder_is_given_none(tmp_path):
    file, server = CONFIG["trainer"]["logger"], {"class_path": "pytorch_lightning.loggers.CometLogger"}
    run = Run("plain", 1, CONFIG | {"trainer": {"logger": [file, server]}}, tmp_path)
    run.prepare()
    loggers = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["logger"]
    assert loggers[0]["init_args"] == {"save_dir": str(tmp_path / "train"), "name": "run"}
    assert loggers[1] == server


def test_a_failure_ends_without_a_full_stop(tmp_path):
    run = Run("plain", 1, CONFIG, tmp_path)
    run.fail("ValueError: there is no train.csv.")  # the messages that contain it have their own
    assert run.result == {"status": "failed: ValueError: there is no train.csv"}


def test_interrupted_twice_it_goes_on_and_gives_the_same_table(folder, whole):
    command, out = [*TWO, "--seeds", "2", "--out", "stopped"], folder / "stopped"
    (folder / "hold").touch()

    process = start(folder, *command, deaf=True)
    wait_for(lambda: len(diary(folder, "begins")) == 1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Stopped. Run the same command to continue." in printed
    assert "Traceback" not in printed
    assert not is_alive(diary(folder, "begins")[0][1])

    process = start(folder, *command)
    wait_for(lambda: len(diary(folder, "begins")) == 2)
    process.kill()
    process.communicate()
    _, orphan = diary(folder, "begins")[1]
    assert is_alive(orphan)

    process = start(folder, *command)
    wait_for(lambda: len(list((out / "runs/plain/1/log").glob("*_log.out"))) == 3)
    time.sleep(2)
    second = start(folder, *command)
    assert "another compare command is using it" in second.communicate(timeout=300)[0]
    assert second.returncode == 1
    (folder / "hold").unlink()
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed

    assert metrics(out) == metrics(whole)
    # the one that was stopped has begun once more; the one that was left alone was awaited, not run again
    assert [run for run, _ in diary(folder, "begins")] == ["plain/1", "plain/1", "rdrop/1", "plain/2", "rdrop/2"]
    assert [run for run, _ in diary(folder, "ends")] == ["plain/1", "rdrop/1", "plain/2", "rdrop/2"]
    assert diary(folder, "ends")[0][1] == orphan

    (folder / "diary.txt").unlink()
    run(folder, *command)
    assert not (folder / "diary.txt").exists()  # nothing is run twice
    assert metrics(out) == metrics(whole)


def test_a_run_that_fails_does_not_stop_the_others(folder, whole):
    def fails(how):
        return ["--variant", f"{how}=--callbacks.fails=mine.Fails --callbacks.fails.how={how}"]

    command = [*TWO, *(argument for how in ("crash", "greed", "killed", "exit") for argument in fails(how))]
    before = metrics(whole)
    printed = run(folder, *command, "--seeds", "1", "--out", "whole", "--workers", "2", status=1)
    assert "4 of 6 runs failed, such as exit, seed 1: ended without a result" in printed
    rows = table(whole)
    assert {key: row for key, row in metrics(whole).items() if key[0] in ("plain", "rdrop")} == before
    assert rows["crash", 1]["status"] == "failed: KeyError: 'nothing there'"
    assert rows["greed", 1]["status"].startswith("failed: out of memory (RuntimeError: ")
    for how in ("killed", "exit"):
        assert rows[how, 1]["status"].startswith("failed: ended without a result (exited, killed, or out of memory); ")
        assert f"; runs/{how}/1/log/" in rows[how, 1]["status"]  # where to look, on whatever machine
    assert "crash, seed 1: failed: KeyError" in printed
    report = (whole / "report.md").read_text()
    assert "| crash | 0 (1 failed) |" in report
    assert "- greed, seed 1: failed: out of memory" in report

    # what failed is run again, and what is finished is not
    (folder / "mended").touch()
    (folder / "diary.txt").unlink(missing_ok=True)
    run(folder, *TWO, *fails("crash"), "--seeds", "1", "--out", "whole")
    assert [run for run, _ in diary(folder, "ends")] == ["crash/1"]
    assert table(whole)["crash", 1]["status"] == "done"
    assert len(table(whole)) == 8


SBATCH = """#!/bin/bash
grep '^#SBATCH' "$1" > sbatch.txt
job=$$
export SLURM_JOB_ID=$job SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=localhost SLURM_JOB_NAME=interactive SUBMITIT_EXECUTOR=slurm
bash "$1" > slurm.txt 2>&1 &
echo "Submitted batch job $job"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do
    if [[ "$1" == --output || "$1" == --error ]]; then shift; fi
    shift
done
exec "$@"
"""


def test_a_cluster_is_told_what_the_command_says(folder):
    commands = folder / "bin"
    commands.mkdir()
    sacct = "#!/bin/bash\necho 'JobID|State|NodeList'\n"
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": sacct, "scancel": "#!/bin/bash\n"}.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    (folder / "diary.txt").unlink(missing_ok=True)
    arguments = ["--config", "base.yaml", "--variant", "rdrop=", "--seeds", "[7]", "--out", "cluster"]
    slurm = ["--executor", "slurm", "--slurm.partition", "small", "--slurm.time", "30"]
    run(folder, *arguments, *slurm, PATH=f"{commands}:{os.environ['PATH']}")
    assert table(folder / "cluster")["rdrop", 7]["status"] == "done"
    asked = (folder / "sbatch.txt").read_text()
    assert "--partition=small" in asked
    assert "--time=30" in asked
    assert "--job-name=rdrop-7" in asked
