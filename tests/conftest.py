import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import RDropMixin


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture
def fit(tmp_path):
    """Train a module on the CPU, quietly; returns the Trainer."""

    def run(module, loader, callbacks=(), lightning=pl, resume=None, **trainer):
        trainer = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        } | trainer
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
            trainer = lightning.Trainer(callbacks=list(callbacks), **trainer)
            trainer.fit(module, loader, ckpt_path=resume)
        return trainer

    return run


class Small(RDropMixin, pl.LightningModule):
    """Eight numbers in, three classes out."""

    def __init__(self, p: float = 0.3, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 3))

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Two(Small):
    """Manual optimization, with an optimizer for each layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.network[0], self.network[3])]

    def training_step(self, batch, batch_idx):
        terms = self.rdrop_step(batch)
        self.rdrop_log(terms)
        self.manual_backward(terms.loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Net(RDropMixin, pl.LightningModule):
    """Whatever network, called with whatever inputs."""

    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.network = network

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ragged(classes, features):
    """Eight sentences, of one to eight tokens that count."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (8, 1, 3, 2, 7, 1, 5, 4):
        target = torch.randint(classes, (8,), generator=generator)
        target[length:] = -100
        rows.append((torch.randn(8, features, generator=generator), target))
    return rows


@pytest.fixture
def small():
    return Small


@pytest.fixture
def rows():
    """Thirty examples in batches of 4 (seven full ones and one of two)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=4)
