"""Long and rough: pytest -m slow tests/test_stress.py"""

import gc
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import Small
from torch.utils.data import Dataset

from lightning_rdrop import AlphaScheduler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


class Numbers(Dataset):
    """Batches of eight rows, as many as are wanted."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return self.batches

    def __getitem__(self, index):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(index))
        return x, x[:, :3].argmax(-1)


def train(batches, callbacks, folder=None, **trainer):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    loader = torch.utils.data.DataLoader(Numbers(batches), batch_size=None)
    trainer.fit(Small(), loader, ckpt_path="last" if folder else None)


class Resources(pl.Callback):
    """Resident memory in MB and open files, every so many steps."""

    def __init__(self, every):
        self.every = every
        self.memory, self.files = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            self.files.append(len(os.listdir("/proc/self/fd")))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_ten_thousand_steps_leak_nothing():
    resources = Resources(every=1000)
    train(1000, [AlphaScheduler("cyclical", ramp=700), resources], max_epochs=10)
    growth = resources.memory[-1] - resources.memory[1]  # the first 2,000 steps warm up
    print(f"resident MB: {[round(value, 2) for value in resources.memory]}, files: {resources.files}")
    assert len(resources.memory) == 10
    assert growth < 8  # 1 MB per 1,000 steps
    assert len(set(resources.files)) == 1


class Record(pl.Callback):
    """The alpha of each step, appended at once."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.global_step, pl_module.rdrop_alpha]) + "\n")


def keep_on(folder):
    """The training, from its last checkpoint if there is one: 2,994 steps in six epochs."""
    # No checkpoint falls on the end of an epoch: Lightning 2.6 takes those of the epoch after it, once resumed, for
    # ones of a finished epoch, and begins it anew.
    checkpoint = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=20, save_last=True)
    schedule = AlphaScheduler("linear", ramp=0.5, delay=500, peak=15.0)  # a share, and a number of steps
    train(499, [schedule, Record(folder / "alphas.jsonl"), checkpoint], folder, max_epochs=6)


def test_twenty_kills_at_random(tmp_path):
    draw, spawn, kills = random.Random(0), multiprocessing.get_context("spawn"), 0
    alphas = tmp_path / "alphas.jsonl"
    while True:
        process = spawn.Process(target=keep_on, args=(tmp_path,))
        process.start()
        begun = alphas.stat().st_size if alphas.exists() else 0
        while kills < 20 and process.is_alive() and (alphas.stat().st_size if alphas.exists() else 0) == begun:
            time.sleep(0.01)  # until it trains: the start takes seconds, and nothing is lost in it
        if kills < 20:
            process.join(draw.uniform(0.0, 0.6))
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    taken = [json.loads(line) for line in alphas.open()]
    print(f"{kills} kills, {len(taken)} steps taken for {len(dict(taken))}")
    assert kills == 20
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2980
    # (s - 500) / 1497, up to 15, at every step that was ever taken, the lost ones and those taken in their place
    expected = [0.0 if step < 500 else 15.0 * min(1.0, (step - 500) / 1497) for step in range(2994)]
    assert dict(taken) == dict(enumerate(expected))
    assert all(alpha == expected[step] for step, alpha in taken)
