import math

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from conftest import Two
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, IterableDataset

from lightning_rdrop import AlphaScheduler


class Watch(pl.Callback):
    """Alpha at every batch of a training."""

    def __init__(self):
        self.alphas = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.alphas.append(pl_module.rdrop_alpha)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(8), torch.tensor(1)


def sigmoid(progress):
    return math.exp(-5 * (1 - progress) ** 2)


def test_alpha_follows_the_formula_at_every_step_and_is_put_back(fit, small, rows):
    watch, module = Watch(), small(rdrop_alpha=4.0)
    fit(module, rows, [AlphaScheduler("sigmoid", ramp=10, delay=3), watch], max_epochs=2)  # 16 steps
    expected = [0.0] * 3 + [4 * sigmoid(i / 10) for i in range(10)] + [4.0] * 3
    assert watch.alphas == expected
    assert module.rdrop_alpha == 4.0


def test_floats_are_shares_of_the_training(fit, small, rows):
    watch = Watch()
    fit(small(), rows, [AlphaScheduler("linear", ramp=0.5, delay=0.25, peak=2.0), watch], max_epochs=2)
    assert watch.alphas == pytest.approx([0] * 4 + [2 * i / 8 for i in range(8)] + [2] * 4)


def test_a_share_is_of_the_training_that_is_under_way(fit, small, rows):
    scheduler = AlphaScheduler("linear", ramp=1.0, peak=8.0)
    for epochs in (2, 1):
        watch = Watch()
        fit(small(), rows, [scheduler, watch], max_epochs=epochs)
        assert watch.alphas == [step / epochs for step in range(8 * epochs)]


def test_a_cyclical_shape_starts_anew(fit, small, rows):
    watch = Watch()
    fit(small(), rows, [AlphaScheduler("cyclical", ramp=4, peak=1.0), watch], max_epochs=1)
    assert watch.alphas == [0, 0.5, 1, 1, 0, 0.5, 1, 1]


def test_any_function_is_a_shape(fit, small, rows):
    watch = Watch()
    fit(small(), rows, [AlphaScheduler(lambda t: t * t, ramp=4, peak=1.0), watch])
    assert watch.alphas == [0, 1 / 16, 4 / 16, 9 / 16, 1, 1, 1, 1]


def test_no_ramp_is_a_jump(fit, small, rows):
    watch = Watch()
    fit(small(), rows, [AlphaScheduler("linear", ramp=0, delay=2, peak=3.0), watch])
    assert watch.alphas == [0, 0, 3, 3, 3, 3, 3, 3]


def test_accumulated_batches_share_the_alpha_of_their_optimizer_step(fit, small, rows):
    watch = Watch()
    fit(small(), rows, [AlphaScheduler("linear", ramp=1.0, peak=1.0), watch], accumulate_grad_batches=2)
    assert watch.alphas == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_two_optimizers_do_not_double_the_pace(fit, rows):
    watch = Watch()
    trainer = fit(Two(), rows, [AlphaScheduler("linear", ramp=8, peak=8.0), watch])
    assert trainer.global_step == 16
    assert watch.alphas == list(range(8))


def test_resumed_training_takes_the_same_alphas(fit, small, rows, tmp_path):
    whole, resumed = Watch(), Watch()
    halfway = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=11, save_top_k=-1)
    schedule = {"shape": "cosine", "ramp": 0.7, "delay": 3}
    fit(small(), rows, [AlphaScheduler(**schedule), whole, halfway], max_epochs=3, enable_checkpointing=True)
    fit(small(), rows, [AlphaScheduler(**schedule), resumed], max_epochs=3, resume=tmp_path / "step=11.ckpt")
    assert len(whole.alphas) == 24
    assert resumed.alphas == whole.alphas[11:]


def test_alpha_is_put_back_when_training_fails(fit, small, rows):
    class Failing(Watch):
        def on_train_batch_end(self, *args, **kwargs):
            raise OSError("disk full")

    module = small(rdrop_alpha=4.0)
    with pytest.raises(OSError, match="disk full"):
        fit(module, rows, [AlphaScheduler("linear", ramp=10), Failing()])
    assert module.rdrop_alpha == 4.0


def test_a_share_of_an_unknown_length_is_refused(fit, small):
    loader = DataLoader(Endless(), batch_size=4)
    with pytest.raises(ValueError, match=r"ramp=0\.1 is a share .* unknown .* max_steps"):
        fit(small(), loader, [AlphaScheduler(ramp=0.1)], max_epochs=-1)
    with pytest.raises(ValueError, match=r"delay=0\.5 is a share"):
        fit(small(), loader, [AlphaScheduler(ramp=5, delay=0.5)], max_epochs=1)


def test_endless_data_with_steps(fit, small):
    loader, counted, shared = DataLoader(Endless(), batch_size=4), Watch(), Watch()
    fit(small(), loader, [AlphaScheduler("linear", ramp=4, peak=4.0), counted], max_epochs=-1, max_steps=6)
    fit(small(), loader, [AlphaScheduler("linear", ramp=0.5, peak=3.0), shared], max_epochs=-1, max_steps=6)
    assert counted.alphas == [0, 1, 2, 3, 4, 4]
    assert shared.alphas == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "sigmod"}, "shape must be one of constant, linear, sigmoid, cosine, cyclical.*'sigmod'"),
        ({"ramp": 10.0}, r"ramp must be .* got 10\.0\. For 10 steps write an int"),
        ({"ramp": -1}, "ramp must not be negative"),
        ({"delay": math.nan}, "delay must not be negative or NaN"),
        ({"peak": -1.0}, r"peak must be a finite number >= 0.*-1\.0"),
        ({"peak": math.inf}, "peak must be a finite number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlphaScheduler(**arguments)


@pytest.mark.parametrize("ramp", [True, "fast", None])
def test_a_duration_is_a_number(ramp):
    with pytest.raises(TypeError, match="ramp must be an int"):
        AlphaScheduler(ramp=ramp)


def test_a_shape_that_leaves_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"returned 2\.0 at progress 1\.0.*peak"):
        AlphaScheduler(lambda t: 2 * t, ramp=5, peak=1.0).value_at(5)
    with pytest.raises(ValueError, match="returned nan"):
        AlphaScheduler(lambda t: math.nan, ramp=5, peak=1.0).value_at(5)


def test_a_module_without_the_mixin_is_refused(fit, rows):
    with pytest.raises(TypeError, match="AlphaScheduler works on a module that inherits RDropMixin, and BoringModel"):
        fit(BoringModel(), rows, [AlphaScheduler()])


@pytest.mark.parametrize("lightning_name", [pl, lightning.pytorch])
def test_it_is_a_callback_of_both_distributions(lightning_name):
    assert isinstance(AlphaScheduler(), lightning_name.Callback)
