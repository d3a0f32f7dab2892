import math

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import Small, Two
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_rdrop import AlphaScheduler
from lightning_rdrop.callbacks import UnlabeledWeightScheduler


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


TWO_EPOCHS = [0] * 4 + [2 / 3] * 4 + [4 / 3] * 2 + [2] * 10  # 4, 4 and 2 batches a step, and half of 6 steps is 3


@pytest.mark.parametrize("first", [True, False], ids=["scheduler first", "accumulation first"])
@pytest.mark.parametrize(
    ("accumulate", "ramp", "expected", "trainer"),
    [
        ({0: 4}, 0.5, TWO_EPOCHS, {}),
        ({0: 1, 1: 2}, 1.0, [2 * s / 15 for s in range(10)] + [2 * s / 15 for s in range(10, 15) for _ in "ab"], {}),
        ({0: 4}, 0.5, [0] * 4 + [1] * 4 + [2] * 2 + [2] * 4, {"max_steps": 4}),
        ({1: 5}, 0.5, [2 * s / 6 for s in range(7)] + [2] * 13, {}),  # 10 + 2 steps
        ({0: 4}, 1.0, [0] * 4 + [2 / 3] * 4 + [4 / 3] * 2, {"max_epochs": 1}),
    ],
    ids=["4", "1 then 2", "max_steps", "from the second epoch", "one epoch"],
)
def test_shares_under_a_schedule_of_accumulation(fit, small, accumulate, ramp, expected, first, trainer):
    x = torch.randn(40, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=4)
    watch, callbacks = (
        Watch(),
        [AlphaScheduler("linear", ramp=ramp, peak=2.0), GradientAccumulationScheduler(accumulate)],
    )
    fit(small(), loader, [*(callbacks if first else callbacks[::-1]), watch], **{"max_epochs": 2} | trainer)
    assert watch.alphas == pytest.approx(expected)


def test_the_weight_of_unlabelled_examples_has_the_same_shares(fit, small):
    class WatchWeight(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            weights.append(pl_module.rdrop_unlabeled_weight)

    x, weights = torch.randn(40, 8), []
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=4)
    callbacks = [UnlabeledWeightScheduler("linear", ramp=0.5, peak=2.0), GradientAccumulationScheduler({0: 4})]
    fit(small(), loader, [*callbacks, WatchWeight()], max_epochs=2)
    assert weights == pytest.approx(TWO_EPOCHS)


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


def test_a_peak_out_of_reach_is_not_said_again_when_resumed(fit, small, rows, tmp_path, recwarn):
    save = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    fit(small(), rows, [AlphaScheduler(ramp=100), save], enable_checkpointing=True)
    fit(small(), rows, [AlphaScheduler(ramp=100)], resume=tmp_path / "step=5.ckpt")
    assert len([warning for warning in recwarn if "never reaches its peak" in str(warning.message)]) == 1


@pytest.mark.parametrize("module", [Small, Two])
def test_a_second_fit_of_the_same_trainer_keeps_the_planned_length(fit, rows, module):
    watch, module = Watch(), module()
    trainer = fit(module, rows, [AlphaScheduler("linear", ramp=0.5, peak=4.0), watch])
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, rows)
    assert watch.alphas == [0, 1, 2, 3] + [4] * 28


def test_alpha_is_put_back_when_training_fails(fit, small, rows):
    class Failing(Watch):
        def on_train_batch_end(self, *args, **kwargs):
            raise OSError("disk full")

    module = small(rdrop_alpha=4.0)
    with pytest.raises(OSError, match="disk full"):
        fit(module, rows, [AlphaScheduler("linear", ramp=10), Failing()])
    assert module.rdrop_alpha == 4.0


def test_the_own_alpha_is_put_back_whatever_the_peak(fit, small, rows):
    watch, module = Watch(), small(rdrop_alpha=1.5)
    fit(module, rows, [AlphaScheduler("linear", ramp=4, peak=3.0), watch])
    assert watch.alphas[-1] == 3.0
    assert module.rdrop_alpha == 1.5


def test_after_the_training_alpha_is_the_users(fit, small, rows):
    class Evaluated(small):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    module, scheduler = Evaluated(rdrop_alpha=1.5), AlphaScheduler("linear", ramp=0.5)
    trainer = fit(module, rows, [scheduler])
    module.rdrop_alpha = 7.0
    trainer.validate(module, rows, verbose=False)  # whose teardown is the scheduler's as well
    assert module.rdrop_alpha == 7.0
    with pytest.raises(ValueError, match="no module is being trained"):
        scheduler.value_at(0)
    assert scheduler.state_dict() == {"training_steps": 8}  # a checkpoint may still be saved


def test_before_a_training_alpha_is_the_users(small, rows):
    class Evaluated(small):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    module, scheduler = Evaluated(rdrop_alpha=1.5), AlphaScheduler("linear", ramp=4)
    with pytest.raises(ValueError, match="no module is being trained"):
        scheduler.value_at(1)
    with pytest.raises(ValueError, match="whose length is unknown here"):
        AlphaScheduler("linear", ramp=0.5, peak=1.0).value_at(1)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[scheduler])
    trainer.validate(module, rows, verbose=False)
    assert module.rdrop_alpha == 1.5


def test_a_share_of_an_unknown_length_is_refused(fit, small):
    loader = DataLoader(Endless(), batch_size=4)
    with pytest.raises(ValueError, match=r"^ramp=0\.1 is a share .* unknown .* max_steps"):
        fit(small(), loader, [AlphaScheduler(ramp=0.1)], max_epochs=-1)
    with pytest.raises(ValueError, match=r"^delay=0\.5 is a share"):
        fit(small(), loader, [AlphaScheduler(ramp=5, delay=0.5)], max_epochs=1)


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_share_of_the_optimizer_steps_of_manual_optimization_is_refused(optimizers, fit, rows):
    class Manual(Two):
        def configure_optimizers(self):
            return super().configure_optimizers()[:optimizers]

        def optimizers(self):
            return [super().optimizers()] if optimizers == 1 else super().optimizers()

    with pytest.raises(ValueError, match=r"^ramp=0\.5 is a share .* manual optimization.*max_epochs"):
        fit(Manual(), rows, [AlphaScheduler(ramp=0.5)], max_steps=8)
    fit(Manual(), rows, [AlphaScheduler(ramp=0.5)], fast_dev_run=True)
    watch = Watch()
    fit(Manual(), rows, [AlphaScheduler("linear", ramp=4, peak=4.0), watch], max_steps=4 * optimizers)
    assert watch.alphas == [0, 1, 2, 3]


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
        ({"ramp": 1.5}, r"ramp must be an int >= 0, .* or a float in \[0, 1\], .* got 1\.5"),
        ({"ramp": -1}, "ramp must be .* got -1"),
        ({"delay": math.nan}, "delay must be .* got nan"),
        ({"peak": -1.0}, r"peak must be a finite number >= 0.*-1\.0"),
        ({"peak": math.inf}, "peak must be a finite number"),
        ({"peak": "4"}, "peak must be a finite number >= 0, got '4'"),
        ({"peak": True}, "peak must be a finite number >= 0, got True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        AlphaScheduler(**arguments)


@pytest.mark.parametrize("ramp", [10, 10.0, np.float32(10), np.int64(10)])
def test_whole_numbers_beyond_one_are_steps(ramp):
    """A parser that tries float before int makes 10.0 of 10."""
    assert AlphaScheduler(ramp=ramp).ramp == 10
    assert type(AlphaScheduler(ramp=ramp).ramp) is int


@pytest.mark.parametrize("ramp", [True, "fast", None])
def test_a_duration_is_a_number(ramp):
    with pytest.raises(TypeError, match="ramp must be an int"):
        AlphaScheduler(ramp=ramp)


def test_numbers_of_numpy_are_numbers():
    scheduler = AlphaScheduler("linear", ramp=np.int64(4), delay=np.int32(2), peak=np.float32(2))
    assert [scheduler.value_at(step) for step in (2, 4, 6, 8)] == [0, 1, 2, 2]
    assert repr(scheduler) == "AlphaScheduler(shape='linear', ramp=4, delay=2, peak=2.0)"
    assert type(AlphaScheduler(ramp=np.float32(0.5)).ramp) is float


@pytest.mark.parametrize(("ramp", "steps"), [(1, "1"), (0.1, "0.8")])
def test_a_cycle_of_one_step_is_refused(fit, small, rows, ramp, steps):
    message = f"ramp={ramp} is {steps} optimizer steps.* rdrop_alpha would stay 0.* two steps"
    with pytest.raises(ValueError, match=message):
        fit(small(), rows, [AlphaScheduler("cyclical", ramp=ramp)])


def test_a_cycle_of_no_steps_is_a_jump():
    assert [AlphaScheduler("cyclical", ramp=0, delay=1, peak=1.0).value_at(step) for step in range(3)] == [0, 1, 1]


def test_a_cycle_of_two_steps_reaches_its_peak():
    assert [AlphaScheduler("cyclical", ramp=2, peak=1.0).value_at(step) for step in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "until", "last"),
    [
        ({"ramp": 1000}, 1000, 4 * sigmoid(7 / 1000)),
        ({"ramp": 6, "delay": 4}, 10, 4 * sigmoid(3 / 6)),
        ({"ramp": 0.5, "delay": 0.75}, 10, 4 * sigmoid(1 / 4)),
        ({"ramp": 5, "delay": 9}, 14, 0),
        ({"ramp": 9}, 9, 4 * sigmoid(7 / 9)),
    ],
)
def test_a_peak_out_of_reach_is_said_once(fit, small, rows, arguments, until, last):
    with pytest.warns(UserWarning, match="never reaches its peak") as warned:
        fit(small(), rows, [AlphaScheduler(**arguments)])
    (text,) = (str(warning.message) for warning in warned if "its peak" in str(warning.message))
    assert f"rdrop_alpha rises until step {until}, but the training has 8 steps" in text
    assert f"in the last step it is {last:.3g} instead of 4. Set delay and ramp to shares of training" in text


@pytest.mark.parametrize("kind", [AlphaScheduler, UnlabeledWeightScheduler])
def test_a_peak_of_nothing_is_said_once(fit, small, rows, kind, recwarn):
    module = small(rdrop_alpha=0, rdrop_unlabeled_weight=0)
    for peak, said in ((None, [f"its peak is the module's {kind.attribute}, which is 0. Pass peak"]), (0, [])):
        recwarn.clear()
        trainer = fit(module, rows, [kind(ramp=5, peak=peak)])
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, rows)
        found = [str(warning.message) for warning in recwarn if "its peak" in str(warning.message)]
        assert len(found) == len(said)
        assert all(part in text for part, text in zip(said, found, strict=True))


class Stop(pl.Callback):
    """Ends a training early, as EarlyStopping and Timer do."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.mark.parametrize(
    ("arguments", "epochs", "text"),
    [
        ({"shape": "linear", "ramp": 0.5}, 1000, "4000, but the training, planned to have 8000 steps, ended after 20 "),
        ({"shape": "linear", "ramp": 40}, 1000, "40, but the training, planned to have 8000 steps, ended after 20 "),
        ({"shape": "linear", "ramp": 40}, -1, "40, but the training ended after 20 "),
        ({"shape": "cyclical", "ramp": 99}, 1000, "99, but the training, planned to have 8000 steps, ended after 20 "),
    ],
)
def test_a_training_that_ended_within_the_rise_is_said_once(fit, small, rows, arguments, epochs, text, recwarn):
    watch = Watch()
    fit(small(), rows, [AlphaScheduler(**arguments), watch, Stop(20)], max_epochs=epochs)
    (said,) = (str(warning.message) for warning in recwarn if "its peak" in str(warning.message))
    assert f"did not reach its peak: rdrop_alpha rises until step {text}steps; in the last step it is " in said
    assert f"it is {watch.alphas[-1]:.3g} instead of 4. Set delay and ramp to numbers of optimizer steps" in said
    assert "such as ramp=2." in said


@pytest.mark.parametrize(
    ("arguments", "trainer"),
    [
        ({"ramp": 0.01}, {}),  # 8 steps
        ({"ramp": 20}, {"max_epochs": -1}),
        ({"ramp": 9000}, {}),  # which was said before
        ({"ramp": 0.5}, {"fast_dev_run": 7}),
    ],
)
def test_a_training_that_ended_after_the_rise_is_no_warning(fit, small, rows, arguments, trainer, recwarn):
    fit(small(), rows, [AlphaScheduler(**arguments), Stop(20)], **{"max_epochs": 100} | trainer)
    assert not [warning for warning in recwarn if "did not reach its peak" in str(warning.message)]


def test_a_training_that_failed_within_the_rise_is_no_warning(fit, small, rows, recwarn):
    class Failing(pl.Callback):
        def on_train_batch_end(self, *args):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fit(small(), rows, [AlphaScheduler(ramp=1.0), Failing()])
    assert not [warning for warning in recwarn if "its peak" in str(warning.message)]


def test_a_peak_out_of_reach_is_said_where_the_callback_is_new(fit, small, rows, tmp_path):
    fit(small(), rows).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="never reaches its peak"):
        fit(small(), rows, [AlphaScheduler(ramp=100)], max_epochs=2, resume=tmp_path / "plain.ckpt")


@pytest.mark.parametrize(
    ("arguments", "trainer"),
    [
        ({"ramp": 1.0}, {}),
        ({"ramp": 0.7, "delay": 0.3}, {}),
        ({"ramp": 8}, {}),
        ({"ramp": 4, "delay": 4}, {}),
        ({"shape": lambda progress: 1 - progress, "ramp": 8}, {}),  # it falls, as it was told
        ({"shape": "constant", "ramp": 1000}, {}),
        ({"shape": "cyclical", "ramp": 12}, {}),  # at its peak from the sixth step on
        ({"ramp": 1000, "peak": 0.0}, {}),
        ({"ramp": 1000}, {"fast_dev_run": True}),
        ({"ramp": 1000}, {"max_epochs": -1, "max_time": {"seconds": 0}}),  # nobody knows
    ],
)
def test_a_peak_that_is_reached_is_no_warning(fit, small, rows, arguments, trainer, recwarn):
    fit(small(), rows, [AlphaScheduler(**arguments)], **trainer)
    assert not [warning for warning in recwarn if "its peak" in str(warning.message)]


def test_a_shape_that_leaves_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"returned 2\.0 at progress 1\.0.*peak"):
        AlphaScheduler(lambda t: 2 * t, ramp=5, peak=1.0).value_at(5)
    with pytest.raises(ValueError, match="returned nan"):
        AlphaScheduler(lambda t: math.nan, ramp=5, peak=1.0).value_at(5)


def test_a_module_without_the_mixin_is_refused(fit, rows):
    with pytest.raises(TypeError, match="AlphaScheduler needs a module that inherits RDropMixin, but BoringModel"):
        fit(BoringModel(), rows, [AlphaScheduler()])


@pytest.mark.parametrize("lightning_name", [pl, lightning.pytorch])
def test_it_is_a_callback_of_both_distributions(lightning_name):
    assert isinstance(AlphaScheduler(), lightning_name.Callback)
