"""The monitor: what it logs, that it leaves training as it is to the bit, and two processes."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import Small, ragged
from jsonargparse import ArgumentParser
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_rdrop import Bernoulli, Cosine, Gaussian, MaskedConsistency, RDropMixin, SimCSEMixin, Views, Weighted
from lightning_rdrop.callbacks import ConsistencyMonitor
from lightning_rdrop.distance.wrapped import Wrapped
from lightning_rdrop.metrics import average_gap, dropout_disagreement, dropout_kl

NAMES = {
    "val/dropout_kl",
    "val/dropout_kl_target",
    "val/dropout_kl_others",
    "val/dropout_disagreement",
    "val/average_gap",
    "val/average_gain",
}


class Validated(Small):
    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())


def table(number=30, batch_size=4, sampler=None):
    x = torch.randn(number, 8, generator=torch.Generator().manual_seed(1))
    rows = TensorDataset(x, x[:, :3].argmax(-1))
    return DataLoader(rows, batch_size, sampler=sampler and sampler(rows))


def watched(fit, module, monitor, rows=None, **trainer):
    """The metrics after training; each epoch's are in the list."""
    seen = []

    class Seen(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    module.val_dataloader = rows or table
    fit(module, table(), [monitor, Seen()], **trainer)
    return seen


class Alternating(nn.Module):
    """In the place of dropout: each view of a duplicated batch has a factor of its own, in training mode."""

    def __init__(self, views):
        super().__init__()
        self.views = views

    def forward(self, x):
        if not self.training:
            return x
        factors = torch.linspace(0.2, 2.0, self.views).repeat_interleave(len(x) // self.views)
        return x * factors.view(-1, *[1] * (x.dim() - 1))


class Known(Validated):
    """Eight numbers, or tokens of eight numbers, and passes that are known."""

    def __init__(self, views=4, **kwargs):
        super().__init__(**kwargs)
        self.views = views
        self.network = nn.Sequential(Alternating(views), nn.Linear(8, 3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def validation_step(self, batch, batch_idx):
        pass

    def passes(self, x):
        factors = torch.linspace(0.2, 2.0, self.views)
        with torch.no_grad():
            return torch.stack([self.network[1](x * factor) for factor in factors]), self.network[1](x)


@pytest.mark.parametrize("batch_size", [30, 4, 7])
def test_it_logs_what_the_metrics_say_of_all_rows(fit, batch_size):
    module = Known(rdrop_views=4)
    (found,) = watched(fit, module, ConsistencyMonitor(passes=4), lambda: table(30, batch_size))
    x, y = table().dataset.tensors
    passes, off = module.passes(x)
    expected = dropout_kl(passes, y) | average_gap(passes, off, y)
    expected["dropout_disagreement"] = dropout_disagreement(passes)
    for name in NAMES:
        assert found[name] == pytest.approx(float(expected[name.removeprefix("val/")]), rel=1e-5), name


def test_the_weight_average_has_no_dropout_where_validation_has_it(fit):
    class Sampled(Known):
        def on_validation_model_eval(self):
            super().on_validation_model_eval()
            self.network[0].train()

        def validation_step(self, batch, batch_idx):
            assert self.network[0].training

    module = Sampled()
    (found,) = watched(fit, module, ConsistencyMonitor(passes=4), lambda: table(8, 8))
    passes, off = module.passes(table(8).dataset.tensors[0])
    assert found["val/average_gap"] == pytest.approx(float(average_gap(passes, off)["average_gap"]), rel=1e-5)


def test_the_kl_of_training_and_of_validation_are_one_number(fit):
    class Both(Known):
        def val_dataloader(self):
            return table(30, 30)

    trainer = fit(Both(rdrop_views=4), table(30, 30), [ConsistencyMonitor(passes=4)])
    metrics = trainer.callback_metrics
    assert float(metrics["val/dropout_kl"]) == pytest.approx(float(metrics["train/kl"]), rel=1e-6)


def test_tokens(fit):
    module = Known(rdrop_views=4)
    (found,) = watched(fit, module, ConsistencyMonitor(passes=4), lambda: DataLoader(ragged(3, 8), 3))
    x, y = (torch.stack(column) for column in zip(*ragged(3, 8), strict=True))
    passes, off = module.passes(x)
    assert found["val/dropout_kl"] == pytest.approx(float(dropout_kl(passes, y)["dropout_kl"]), rel=1e-5)
    assert found["val/average_gain"] == pytest.approx(float(average_gap(passes, off, y)["average_gain"]), rel=1e-5)


class Thorough(nn.Module):
    """Everything that a pass may change: random states, BatchNorm, and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, x):
        self.calls += 1
        noise = random.random() + np.random.rand()
        return self.inner(x + 0.01 * noise if self.training else x)


class Augmented(Validated):
    """Draws random numbers where it reads a batch, in validation too."""

    def rdrop_unpack(self, batch):
        return batch[0] + 0.01 * torch.randn(8), batch[1]


def trained(fit, callbacks, **kwargs):
    pl.seed_everything(5)
    module = Augmented(rdrop_passes="separate", **kwargs)
    module.network = Thorough()
    module.network.inner[0].eval()
    module.val_dataloader = table
    fit(module, table(sampler=RandomSampler), callbacks, max_epochs=3, val_check_interval=0.5)
    assert module.network.inner[1].num_batches_tracked > 0
    states = [torch.get_rng_state(), *module.state_dict().values()]
    return states, [part.training for part in module.modules()], random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("views", [1, 2])
def test_training_is_the_same_to_the_bit(fit, views):
    tensors, *others = trained(fit, [], rdrop_views=views)
    again, *with_it = trained(fit, [ConsistencyMonitor(passes=3)], rdrop_views=views)
    assert all(map(torch.equal, tensors, again))
    assert with_it == others


def test_plain_training_shows_the_gap_that_it_leaves(fit):
    (found,) = watched(fit, Validated(p=0.5, rdrop_views=1), ConsistencyMonitor())
    assert found["train/kl"] == 0 < found["val/dropout_kl"]
    assert found["val/average_gap"] > 0
    assert set(found) >= NAMES


def test_the_sanity_check_is_run_and_not_logged(fit, tmp_path):
    class Counted(Validated):
        passes = 0

        def forward(self, x):
            self.passes += self.trainer.sanity_checking and self.network[2].training
            return super().forward(x)

    module = Counted()
    logger = CSVLogger(tmp_path)
    watched(fit, module, ConsistencyMonitor(), num_sanity_val_steps=2, logger=logger, log_every_n_steps=1)
    assert module.passes == 2
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val/dropout_kl")
    assert sum(bool(line.split(",")[column]) for line in lines[1:]) == 1


class Counted(Validated):
    """Keeps the epoch, and the number, of each validation batch that the monitor unpacks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.unpacked = []

    def rdrop_unpack(self, batch):
        if not self.training:
            number = next(number for number, (x, _) in enumerate(table()) if torch.equal(x, batch[0]))
            self.unpacked.append((self.current_epoch, number))
        return super().rdrop_unpack(batch)


def test_every_n_epochs(fit):
    module = Counted()
    watched(fit, module, ConsistencyMonitor(every_n_epochs=2), max_epochs=5, num_sanity_val_steps=0)
    assert module.unpacked == [(epoch, number) for epoch in (1, 3) for number in range(8)]


@pytest.mark.parametrize(
    ("batches", "looked_at"),
    [
        (1.0, [*range(8)]),
        (0.5, [0, 2, 4, 6]),
        (0.3, [0, 4, 7]),
        (0.01, [0]),
        (3, [0, 1, 2]),
        (1, [0]),
        (9, [*range(8)]),
        (3.0, [0, 1, 2]),  # a parser may make it of 3
    ],
)
def test_a_share_of_the_batches_is_spread_evenly(fit, batches, looked_at):
    module = Counted()
    watched(fit, module, ConsistencyMonitor(batches=batches), num_sanity_val_steps=0)
    assert [number for _, number in module.unpacked] == looked_at


@pytest.mark.parametrize(
    ("module", "epochs", "said"),
    [(Small(), 1, 1), (Validated(), 1, 1), (Validated(), 2, 0)],
    ids=["no validation", "too few epochs", "measured"],
)
def test_a_training_in_which_nothing_was_measured_is_a_warning(fit, module, epochs, said, recwarn):
    watched(fit, module, ConsistencyMonitor(2, every_n_epochs=2), max_epochs=epochs)
    texts = [str(warning.message) for warning in recwarn if "ConsistencyMonitor" in str(warning.message)]
    assert len(texts) == said
    assert all("measured nothing" in text and "(every_n_epochs=2)" in text for text in texts)


def test_validation_alone(fit):
    module = Validated()
    module.val_dataloader = table
    monitor = ConsistencyMonitor(every_n_epochs=10)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[monitor])
    assert trainer.validate(module)[0].keys() >= NAMES


@pytest.mark.parametrize("sanity", [0, 2])
def test_modes_are_those_of_training(fit, sanity):
    """A frozen part drops here if it did in training, and not where it was in eval mode."""

    class Parts(Validated):
        def __init__(self):
            super().__init__(rdrop_views=1)
            self.network = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Linear(8, 3))
            self.network[0].requires_grad_(False)

    on, off = Parts(), Parts()
    off.network[0].eval()
    steps = {"num_sanity_val_steps": sanity}  # which are before training, and tell nothing of its modes
    assert watched(fit, on, ConsistencyMonitor(), **steps)[0]["val/dropout_kl"] > 0
    with pytest.warns(UserWarning, match="passes of Parts are all the same"):
        found = watched(fit, off, ConsistencyMonitor(), rows=table, **steps)
    assert found[0]["val/dropout_kl"] == 0


def test_a_module_that_is_replaced_between_epochs_has_its_own_mode(fit):
    class Replaced(Validated):
        def on_train_epoch_start(self):
            self.network[2] = nn.Dropout(0.5)

    assert all(found["val/dropout_kl"] > 0 for found in watched(fit, Replaced(), ConsistencyMonitor(2), max_epochs=2))


def test_a_second_training_is_warned_of_what_it_does_itself(fit):
    monitor = ConsistencyMonitor(2)
    watched(fit, Validated(), monitor)
    for _ in range(2):
        with pytest.warns(UserWarning, match="passes of Validated are all the same"):
            watched(fit, Validated(p=0.0, rdrop_views=1), monitor)
    with pytest.warns(UserWarning, match="measured nothing"):
        watched(fit, Small(), monitor)


def test_another_module_is_measured_in_its_own_modes(fit):
    monitor, other = ConsistencyMonitor(2), Validated()
    watched(fit, Validated(), monitor)
    other.val_dataloader = table
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[monitor])
    assert trainer.validate(other)[0]["val/dropout_kl"] > 0


def test_of_views_the_first_is_looked_at(fit):
    class Twice(Validated):
        def rdrop_unpack(self, batch):
            return (Views(batch[0], -batch[0]) if self.views_in_validation or self.training else batch[0]), batch[1]

    found = []
    for views in (True, False):
        torch.manual_seed(0)
        module = Twice()
        module.views_in_validation = views
        found.append(watched(fit, module, ConsistencyMonitor())[-1])
    assert found[0] == found[1]


def test_a_batch_that_a_step_takes_apart(fit):
    """Neither the hook nor the validation_step may miss what the other took out of the batch."""

    class Takes(Validated):
        def rdrop_unpack(self, batch):
            return batch["x"], batch.pop("y")

        def validation_step(self, batch, batch_idx):
            x, y = batch.pop("x"), batch.pop("y")
            self.log("val/loss", F.cross_entropy(self(x), y), batch_size=len(x))

    def rows():
        x, y = table().dataset.tensors
        return DataLoader([{"x": one, "y": other} for one, other in zip(x, y, strict=True)], 4)

    module = Takes()
    module.val_dataloader = rows
    assert fit(module, rows(), [ConsistencyMonitor()]).callback_metrics.keys() >= NAMES


def test_a_forward_that_changes_its_inputs_in_place():
    class InPlace(Validated):
        def forward(self, x):
            return self.network(x.exp_())

    def metrics(*callbacks):
        torch.manual_seed(0)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=list(callbacks))
        return trainer.validate(InPlace(), table())[0]

    watched = metrics(ConsistencyMonitor())
    assert metrics()["val/accuracy"] == watched["val/accuracy"]
    assert 0 < watched["val/average_gap"] < 1


class Regression(Validated):
    def __init__(self, distance, outputs):
        super().__init__(rdrop_distance=distance)
        self.network = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, outputs))

    def rdrop_unpack(self, batch):
        target = (batch[0][:, :3] > 0).float()
        return batch[0], (target, torch.ones(len(target))) if isinstance(self.rdrop_distance, Wrapped) else target

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    ("distance", "names"),
    [
        (Bernoulli(), NAMES),
        (Gaussian(), {"val/dropout_kl", "val/average_gap"}),
        (Cosine(), {"val/dropout_kl"}),
        (Weighted(Bernoulli()), NAMES),
        (MaskedConsistency(Bernoulli()), NAMES),
        (Weighted(Gaussian()), {"val/dropout_kl", "val/average_gap"}),
    ],
    ids=["Bernoulli", "Gaussian", "Cosine", "Weighted", "MaskedConsistency", "Weighted Gaussian"],
)
def test_what_has_a_meaning_is_logged(fit, distance, names):
    (found,) = watched(fit, Regression(distance, 3), ConsistencyMonitor())
    assert {name for name in found if name.startswith("val/")} == names


def test_several_predictions_by_name(fit):
    class Named(Validated):
        def rdrop_predict(self, inputs):
            logits = self(inputs)
            return {"signs": logits, "size": logits[:, 0]}

        def rdrop_unpack(self, batch):
            return batch[0], {"signs": (batch[0][:, :3] > 0).float(), "size": batch[0][:, 0]}

    module = Named(rdrop_distance={"signs": Bernoulli(), "size": Gaussian()})
    (found,) = watched(fit, module, ConsistencyMonitor())
    assert {"val/signs_dropout_disagreement", "val/signs_average_gain", "val/size_average_gap"} <= set(found)
    assert "val/size_average_gain" not in found


def test_two_loaders(fit):
    class Loaders(Validated):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    (found,) = watched(fit, Loaders(), ConsistencyMonitor(), lambda: [table(), table(12)])
    assert {"val/average_gap/dataloader_idx_0", "val/average_gap/dataloader_idx_1"} <= set(found)


def test_lightning_of_both_names(fit):
    lightning = pytest.importorskip("lightning.pytorch")

    class Other(RDropMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))

        def forward(self, x):
            return self.network(x)

        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return table()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert fit(Other(), table(), [ConsistencyMonitor()], lightning).callback_metrics.keys() >= NAMES


def test_half_precision(fit):
    (found,) = watched(fit, Validated(), ConsistencyMonitor(), precision="bf16-mixed")
    assert 0 < found["val/dropout_kl"] < 10


@pytest.mark.parametrize("batches", ["1", "2", "1.0", "0.5"])
def test_batches_of_the_command_line(batches):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ConsistencyMonitor, "monitor")
    found = parser.parse_args([f"--monitor.batches={batches}"]).monitor.batches
    assert repr(found) == batches
    assert ConsistencyMonitor(batches=found).batches == found


@pytest.mark.parametrize(
    "wrong",
    [{"passes": 1}, {"passes": 2.0}, {"every_n_epochs": 0}, {"batches": 0}, {"batches": 1.5}, {"batches": True}],
    ids=str,
)
def test_arguments_are_checked(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        ConsistencyMonitor(**wrong)


class Embeddings(SimCSEMixin, pl.LightningModule):
    def configure_optimizers(self):
        return None


def test_modules_that_it_cannot_measure(fit):
    with pytest.raises(TypeError, match="needs a module that inherits RDropMixin"):
        fit(BoringModel(), table(), [ConsistencyMonitor()])
    with pytest.raises(TypeError, match="Embeddings learns embeddings by SimCSE"):
        fit(Embeddings(), table(), [ConsistencyMonitor()])
