"""What else a Lightning Trainer can do, with R-Drop in it."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from conftest import Small, Two
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_rdrop import AlphaScheduler, Categorical

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Watch(pl.Callback):
    """Alpha, kl, the rows of x, and the weights after each batch."""

    def __init__(self):
        self.alphas, self.kls, self.rows, self.weights = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.alphas.append(pl_module.rdrop_alpha)
        self.kls.append(float(outputs["kl"]))
        self.rows.append(batch[0])
        self.weights.append(weights(pl_module))


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Noisy(Small):
    """A noise that depends on a row and its view alone, not on the batch."""

    def forward(self, x):
        if not self.training:
            return self.network(x)
        view = torch.arange(len(x)) * 2 // len(x) if len(x) % 2 == 0 else torch.zeros(len(x))
        return self.network(x * (1 + 0.5 * torch.sin((10 + view.unsqueeze(1)) * x)))


@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
def test_accumulation_and_clipping(fit, rows, clip):
    trained = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        module = Noisy(p=0.0)
        before = weights(module)
        x, y = rows.dataset.tensors
        loader = DataLoader(TensorDataset(x[:24], y[:24]), batch_size=batch_size)
        watch = Watch()
        fit(module, loader, [watch], accumulate_grad_batches=accumulate, **clip)
        trained.append(weights(module))
        step = (watch.weights[accumulate - 1] - before) / 0.1  # the gradient of the first step
        if len(clip) == 1:
            assert step.norm() == pytest.approx(0.05, rel=1e-3)
        elif clip:
            assert step.abs().max() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(*trained)


def test_two_optimizers_by_hand_are_the_one(fit, rows):
    trained = []
    for kind in (Small, Two):
        torch.manual_seed(0)
        module = kind()
        metrics = fit(module, rows, [AlphaScheduler(ramp=4)]).callback_metrics
        trained.append([weights(module), *(metrics[name] for name in ("train/loss", "train/kl", "train/kl_epoch"))])
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"fast_dev_run": 3}, 3),
        ({"limit_train_batches": 5}, 5),
        ({"limit_train_batches": 0.5, "max_epochs": 2}, 8),
        ({"overfit_batches": 2, "max_epochs": 3}, 6),
        ({"barebones": True, "default_root_dir": None}, 8),
        ({"max_steps": 11, "max_epochs": -1}, 11),
        ({"min_steps": 10, "max_epochs": 2}, 16),
    ],
    ids=str,
)
def test_alpha_rises_over_the_training_as_it_is(fit, rows, trainer, steps):
    watch = Watch()
    if trainer.get("barebones"):
        bare = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=None)
        bare.callbacks += [AlphaScheduler("linear", ramp=1.0), watch]
        bare.fit(Small(), rows)
    else:
        fit(Small(), rows, [AlphaScheduler("linear", ramp=1.0), watch], **trainer)
    assert watch.alphas == pytest.approx([4 * step / steps for step in range(steps)])
    assert all(kl > 0 for kl in watch.kls)
    if "overfit_batches" in trainer:
        torch.testing.assert_close(watch.rows[0:2], watch.rows[4:6])


class Unknown(IterableDataset):
    """Data of a length that nobody knows."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        yield from ((torch.randn(8, generator=generator), i % 3) for i in range(20))


def test_data_of_unknown_length(fit):
    watch = Watch()
    fit(Small(), DataLoader(Unknown(), batch_size=4), [AlphaScheduler("linear", ramp=8), watch], max_epochs=2)
    assert watch.alphas == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4]


def test_a_training_that_ends_by_the_clock(fit, rows):
    watch, module = Watch(), Small()
    fit(module, rows, [AlphaScheduler("linear", ramp=4), watch], max_time={"seconds": 1}, max_epochs=-1)
    assert watch.alphas[:6] == [0, 1, 2, 3, 4, 4]
    assert module.rdrop_alpha == 4.0


class Tuned(Small):
    """Takes a learning rate and a batch size that are searched for, and remembers each alpha it trained with."""

    def __init__(self, lr=0.1, batch_size=2, **kwargs):
        super().__init__(**kwargs)
        self.lr, self.batch_size, self.alphas = lr, batch_size, []

    def rdrop_log(self, terms):
        self.alphas.append(self.rdrop_alpha)
        super().rdrop_log(terms)

    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.fixture
def trainer(tmp_path):
    return pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AlphaScheduler("linear", ramp=4)], default_root_dir=tmp_path,
    )  # fmt: skip


def search_lr(trainer, module):
    found = Tuner(trainer).lr_find(module, num_training=20)
    assert len(found.results["loss"]) == 20


def search_batch_size(trainer, module):
    assert Tuner(trainer).scale_batch_size(module, max_trials=3, init_val=2, steps_per_trial=2) > 2


@pytest.mark.parametrize("search", [search_lr, search_batch_size])
def test_a_search_has_the_whole_alpha(trainer, search):
    module = Tuned()
    search(trainer, module)
    assert set(module.alphas) == {4.0}
    module.alphas.clear()
    trainer.fit(module)
    assert module.alphas[:6] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("finder", [LearningRateFinder(num_training_steps=20), BatchSizeFinder(max_trials=3)])
def test_a_search_by_callback_has_the_whole_alpha(trainer, finder):
    module = Tuned()
    trainer.callbacks.append(finder)  # after the scheduler
    trainer.fit(module)
    searched = module.alphas.index(0)
    assert searched >= 9
    assert set(module.alphas[:searched]) == {4.0}
    assert module.alphas[searched:][:6] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("log_every", [5, 50])
def test_a_search_that_ran_into_nan_is_forgotten(trainer, log_every):
    module = Tuned()
    trainer.log_every_n_steps = log_every
    Tuner(trainer).lr_find(module, min_lr=1.0, max_lr=1e30, num_training=60, early_stop_threshold=None)
    module.lr = 0.1
    trainer.fit(module)
    assert weights(module).isfinite().all()


class Normed(Small):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.network.insert(1, nn.BatchNorm1d(16))


@pytest.mark.parametrize("kind", [Small, Normed])
def test_stochastic_weight_averaging(fit, rows, kind):
    watch, module = Watch(), kind()
    average = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2, annealing_epochs=1)
    fit(module, rows, [AlphaScheduler(ramp=4), average, watch], max_epochs=4)
    averaged = watch.weights[7], watch.weights[15], watch.weights[23]  # at the start of the second to the fourth epoch
    # BatchNorm's statistics take another pass, at whose end Lightning 2.6 steps once more, without R-Drop as well
    last = weights(module) if kind is Small else watch.weights[32]
    torch.testing.assert_close(last, sum(averaged) / 3)
    assert all(kl > 0 for kl in watch.kls)


def test_exponential_moving_average(fit, rows):
    weight_averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    watch, module = Watch(), Small()
    expected = weights(copy.deepcopy(module))
    fit(module, rows, [AlphaScheduler(ramp=4), watch, weight_averaging.EMAWeightAveraging(decay=0.8)])
    for index, step in enumerate(watch.weights):
        expected = 0.8 * expected + 0.2 * step if index else step
    torch.testing.assert_close(weights(module), expected)


def test_class_weights_out_of_a_checkpoint_are_not_averaged(fit, rows, tmp_path):
    """The average is a copy of the module before it loads the checkpoint: its buffers are paired with the module's."""
    weight_averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    given, module = Normed(rdrop_distance=Categorical(weight=[1.0, 2.0, 30.0])), Normed()
    first = fit(given, rows, [weight_averaging.EMAWeightAveraging(decay=0.8)])
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = weight_averaging.EMAWeightAveraging(decay=0.8, use_buffers=True)
    fit(module, rows, [again], max_epochs=2, resume=tmp_path / "last.ckpt")
    assert module.rdrop_distance.weight.tolist() == [1.0, 2.0, 30.0]
