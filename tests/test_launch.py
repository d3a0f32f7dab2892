"""The recipes for several machines, here two that are the same one."""

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

ROOT = Path(__file__).parents[1]


def test_two_nodes_by_torchrun(tmp_path):
    pytest.importorskip("snownlp")
    options = (
        "--trainer.accelerator=cpu --trainer.max_epochs=2 --trainer.log_every_n_steps=1 --trainer.limit_val_batches=1 "
        "--trainer.limit_test_batches=1 --trainer.enable_progress_bar=false --data.init_args.train_size=256 "
        f"--callbacks.alpha.init_args.ramp=0.5 --trainer.logger=CSVLogger --trainer.logger.save_dir={tmp_path}"
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NODES": "2",
        "DEVICES": "1",
        "MASTER": "127.0.0.1",
        "PORT": free_port(),
    }
    nodes = [
        subprocess.Popen(
            ["bash", "examples/torchrun.sh", *options.split()],
            cwd=ROOT,
            env=environment | {"NODE": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        for node in (0, 1)
    ]
    try:
        printed = [node.communicate(timeout=120)[0] for node in nodes]
    except subprocess.TimeoutExpired:
        for node in nodes:
            os.killpg(node.pid, signal.SIGKILL)
        pytest.fail("".join(node.communicate()[0] for node in nodes), pytrace=False)
    assert [node.returncode for node in nodes] == [0, 0], "".join(printed)
    assert "test/accuracy" in printed[0]
    with next(tmp_path.glob("**/metrics.csv")).open() as file:
        alphas = [float(row["train/alpha"]) for row in csv.DictReader(file) if row["train/alpha"]]
    # 256 examples are four steps of 32 on each of two nodes; two epochs are eight steps, and half of them the rise
    assert alphas == pytest.approx([4 * math.exp(-5 * (1 - min(1, step / 4)) ** 2) for step in range(8)])
    assert len(list(tmp_path.glob("**/curves.png"))) == 1
