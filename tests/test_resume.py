"""A training that was interrupted goes on as if it had not been."""

import csv
import json
import math
import multiprocessing
import os
import signal

import pytest
import pytorch_lightning as pl
import torch
from conftest import Small, Two
from torch import nn
from torch.utils.data import DataLoader

from lightning_rdrop import AlphaScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


class Shuffled:
    """Eight batches of four examples in another order every epoch; it goes on where its state says."""

    def __init__(self):
        self.x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        self.batches = 0

    def __len__(self):
        return 8

    def __iter__(self):
        epoch, position = divmod(self.batches, len(self))
        order = torch.randperm(32, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(4)[position:]:
            self.batches += 1
            yield self.x[rows], self.x[rows, :3].argmax(-1)

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class RandomState(pl.Callback):
    """Keeps the state of the random numbers in the checkpoint, which Lightning does not."""

    def __init__(self):
        self.saved = None

    def state_dict(self):
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state):
        self.saved = state["torch"]

    def on_train_start(self, trainer, pl_module):
        if self.saved is not None:
            torch.set_rng_state(self.saved)


class Record(pl.Callback):
    """Writes the alpha of every batch, a file a rank, at once: a process that is killed writes nothing later."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(pl_module.rdrop_alpha) + "\n")

    def read(self, rank=0):
        return [json.loads(line) for line in (self.folder / f"{rank}.jsonl").open()]


class Kill(pl.Callback):
    """No handler, no clean-up: the gradient of the step is there, the optimizer has not stepped."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Fail(Kill):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            raise OSError("disk full")


class Plain(pl.LightningModule):
    """conftest's Small without the mixin."""

    def __init__(self, p: float = 0.3):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 3))


class Validated(Small):
    def validation_step(self, batch, batch_idx):
        self.log("val", self(batch[0]).sum())


def train(folder, schedule, callbacks=(), loader=None, resume=None, module=None, val=None, **trainer):
    """24 steps in three epochs, with a checkpoint after every fifth; logs and alphas are written at each step."""
    torch.manual_seed(0)
    module, record = module or Small(), Record(folder)
    folder.mkdir(exist_ok=True)
    if not any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks):
        callbacks = [pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=5, save_last=True), *callbacks]
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 3, "log_every_n_steps": 1} | trainer,
        callbacks=[AlphaScheduler(**schedule), RandomState(), record, *callbacks],
        logger=pl.loggers.CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Shuffled() if loader is None else loader, val, ckpt_path=resume)
    return module, record


def in_order():
    return DataLoader([(x, x[:3].argmax()) for x in Shuffled().x], batch_size=4)


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]  # of steps, not of epochs


def bits(module):
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def sigmoid_of(step):  # exp(-5 (1 - t)^2), t = (s - 3) / 10, up to 4
    return 0.0 if step < 3 else 4.0 * math.exp(-5 * (1 - min(1.0, (step - 3) / 10)) ** 2)


def cosine_of(step):  # (1 - cos pi t) / 2, t = (s - 6) / 12: a quarter and a half of 24 steps, up to 2
    return 0.0 if step < 6 else 2.0 * (1 - math.cos(math.pi * min(1.0, (step - 6) / 12))) / 2


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ({"shape": "sigmoid", "ramp": 10, "delay": 3}, sigmoid_of),
        ({"shape": "cosine", "ramp": 0.5, "delay": 0.25, "peak": 2.0}, cosine_of),
    ],
)
def test_killed_in_the_middle_of_an_epoch(schedule, formula, tmp_path):
    whole, record = train(tmp_path / "whole", schedule)
    expected = [formula(step) for step in range(24)]
    assert record.read() == expected

    folder = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=train, args=(folder, schedule, [Kill(13)]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Record(folder).read() == expected[:13]
    before = logged(folder)
    assert len(before) == 13

    last = folder / "last.ckpt"
    resumed, record = train(tmp_path / "resumed", schedule, resume=last)
    assert record.read() == expected[10:]
    assert before[:10] + logged(tmp_path / "resumed") == logged(tmp_path / "whole")
    assert bits(resumed) == bits(whole)

    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 10
    assert checkpoint["state_dict"].keys() == Plain().state_dict().keys()
    plain = Plain.load_from_checkpoint(last, weights_only=True)
    torch.testing.assert_close(plain.state_dict(), checkpoint["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Small, Two])
def test_a_checkpoint_of_a_step_that_failed(kind, tmp_path):
    schedule, batches = {"shape": "linear", "ramp": 24, "peak": 24.0}, 11
    steps = batches * (2 if kind is Two else 1)  # the Trainer counts the steps of both optimizers
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "failed", save_on_exception=True, every_n_epochs=9)
    with pytest.raises(OSError, match="disk full"):
        train(tmp_path / "failed", schedule, [keep, Fail(steps)], in_order(), module=kind())
    _, record = train(tmp_path / "resumed", schedule, (), in_order(), tmp_path / "failed.ckpt", module=kind())
    assert record.read() == list(range(batches, 24))


@pytest.mark.parametrize(
    ("every", "accumulate", "steps"),
    [
        ({"every_n_train_steps": 2}, 3, [2, 4, 6, 8]),
        ({"every_n_train_steps": 1}, 4, [1, 2, 3, 4, 5]),
        ({"every_n_epochs": 1}, 1, [3, 6, 11, 14, 19, 22]),  # whenever it is validated, thrice in eight batches
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 1, [8, 16]),
    ],
)
def test_resumed_from_any_checkpoint(every, accumulate, steps, tmp_path):
    # an epoch of eight batches: the last step takes those that are left
    expected = [epoch * math.ceil(8 / accumulate) + batch // accumulate for epoch in range(3) for batch in range(8)]
    arguments = {
        "loader": in_order(),
        "val": in_order(),
        "val_check_interval": 3,
        "accumulate_grad_batches": accumulate,
    }
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **every)
    schedule = {"shape": "linear", "ramp": 24, "peak": 24.0}
    train(tmp_path / "whole", schedule, [keep], module=Validated(), **arguments)
    for step in steps:
        checkpoint, folder = tmp_path / f"step={step}.ckpt", tmp_path / f"from_{step}"
        _, record = train(folder, schedule, resume=checkpoint, module=Validated(), **arguments)
        assert record.read() == expected[expected.index(step) :]


def test_more_epochs_leave_alpha_where_it_was(tmp_path):
    schedule = {"shape": "linear", "ramp": 1.0, "peak": 24.0}  # in 24 steps, as planned
    module, _ = train(tmp_path / "short", schedule)
    module.trainer.save_checkpoint(tmp_path / "over.ckpt")
    for name, alphas in (("short/last.ckpt", [20, 21, 22, 23, *[24] * 16]), ("over.ckpt", [24] * 16)):
        _, record = train(tmp_path / f"from_{name[:4]}", schedule, resume=tmp_path / name, max_epochs=5)
        assert record.read() == alphas


def in_parts(folder, part, step, **trainer):
    schedule = {"shape": "linear", "ramp": 0.5, "delay": 3, "peak": 12.0}  # half of 24 steps, as planned
    checkpoint = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)
    _, record = train(folder / part, schedule, [checkpoint], loader=in_order(), **trainer)
    return record


def of_a_rank(folder):
    """Four batches for each."""
    in_parts(folder, "two", 14, resume=folder / "step=11.ckpt", strategy="ddp", devices=2)


def test_another_number_of_processes(pair, tmp_path):
    in_parts(tmp_path, "one", 11)
    pair.run(of_a_rank, tmp_path)
    # three batches of the second epoch were done, so it has one more, and the third has four
    assert Record(tmp_path / "two").read(0) == Record(tmp_path / "two").read(1) == [8, 9, 10, 11, 12]
    record = in_parts(tmp_path, "again", 99, resume=tmp_path / "step=14.ckpt")
    assert record.read() == [11, 12, 12, 12, 12, 12]  # two of the third epoch's eight were done
