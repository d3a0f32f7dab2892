"""The mixin and the callbacks under both names of Lightning, in scripts and in the LightningCLI of each."""

import subprocess
import sys

import lightning.pytorch
import lightning.pytorch.cli
import pytest
import pytorch_lightning
import pytorch_lightning.cli
import torch
from torch import nn

from lightning_rdrop import RDropMixin
from lightning_rdrop._lightning import extend_hook
from lightning_rdrop.callbacks import AlphaScheduler, Curves, DropoutProbability, ExactAccumulation

BOTH = pytest.mark.parametrize("name", [pytorch_lightning, lightning.pytorch], ids=lambda module: module.__name__)
CALLBACKS = (AlphaScheduler, Curves, DropoutProbability, ExactAccumulation)


class Network:
    """What the two modules share."""

    def __init__(self, width: int = 16, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(nn.Linear(8, width), nn.Dropout(0.3), nn.Linear(width, 3))

    def forward(self, x):
        return self.network(x)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([(torch.randn(8), i % 3) for i in range(16)], batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OfPytorchLightning(Network, RDropMixin, pytorch_lightning.LightningModule):
    pass


class OfLightning(Network, RDropMixin, lightning.pytorch.LightningModule):
    pass


MODULES = {pytorch_lightning: OfPytorchLightning, lightning.pytorch: OfLightning}


@BOTH
def test_every_callback_in_a_list(name, tmp_path):
    logger = name.loggers.CSVLogger(tmp_path)
    trainer = name.Trainer(
        accelerator="cpu", max_epochs=1, log_every_n_steps=1, logger=logger, callbacks=[kind() for kind in CALLBACKS],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MODULES[name]())
    assert trainer.callback_metrics["train/kl"] > 0
    assert trainer.callback_metrics["train/alpha"] == 4.0


@BOTH
@pytest.mark.parametrize("kind", CALLBACKS)
def test_every_callback_alone(name, kind, tmp_path):
    logger = name.loggers.CSVLogger(tmp_path)
    trainer = name.Trainer(fast_dev_run=2, accelerator="cpu", logger=logger, callbacks=kind())
    trainer.fit(MODULES[name]())
    assert trainer.callback_metrics["train/kl"] > 0


def test_a_hook_is_extended_once_whether_or_not_an_override_calls_super():
    calls = []

    def first(self, *args, **kwargs):
        calls.append((args, kwargs))

    class Base:
        def hook(self, value):
            return value

    class Calls(Base):
        def hook(self, value):
            return 1 + super().hook(value=value)

    class Forgets(Calls):
        def hook(self, value):
            raise OSError("disk full")

    for cls in (Base, Calls, Forgets):
        extend_hook(cls, "hook", first)
    assert Calls().hook(1) == 2
    forgets = Forgets()
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            forgets.hook(value=1)
    assert calls == [((1,), {}), ((), {"value": 1}), ((), {"value": 1})]


@BOTH
def test_the_hooks_take_keywords(name):
    class Overrides(MODULES[name]):
        def on_fit_start(self):
            super().on_fit_start()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs=outputs, batch=batch, batch_idx=batch_idx)

        def on_save_checkpoint(self, checkpoint):
            super().on_save_checkpoint(checkpoint=checkpoint)

        def on_load_checkpoint(self, checkpoint):
            super().on_load_checkpoint(checkpoint=checkpoint)

    module, checkpoint = Overrides(), {}
    for each in (module, MODULES[name]()):
        each.on_fit_start()
        each.on_train_batch_end(outputs=None, batch=None, batch_idx=0)
        each.on_save_checkpoint(checkpoint=checkpoint)
        each.on_load_checkpoint(checkpoint=checkpoint)
    assert "rdrop" in checkpoint


@BOTH
def test_the_cli_of_each(name, tmp_path):
    arguments = [
        "fit",
        "--model.rdrop_alpha=2.0",
        "--model.width=8",
        "--trainer.callbacks=AlphaScheduler",
        "--trainer.callbacks.shape=linear",
        "--trainer.callbacks.ramp=2",
        "--trainer.callbacks+=DropoutProbability",
        "--trainer.callbacks.p=0.5",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli = name.cli.LightningCLI(MODULES[name], args=arguments)
    assert cli.model.rdrop_alpha == 2.0
    assert cli.trainer.callback_metrics["train/alpha"] == 2.0
    assert cli.trainer.callback_metrics["train/kl"] > 0


@pytest.mark.parametrize("absent", ["pytorch_lightning", "lightning"])
def test_one_distribution_is_enough(absent):
    """In a process of its own, where the other one cannot be imported."""
    present = {"pytorch_lightning": "lightning.pytorch", "lightning": "pytorch_lightning"}[absent]
    code = f"import sys; sys.modules[{absent!r}] = None; import {present} as pl; import lightning_rdrop as r; "
    code += "print(isinstance(r.AlphaScheduler(), pl.Callback), r.RDropMixin.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "RDropMixin"], done.stderr
