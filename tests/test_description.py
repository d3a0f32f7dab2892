"""A checkpoint says what it was trained with; it is rebuilt on load, or a warning says why it cannot be."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import Small

from lightning_rdrop import FGM, VAT, AlphaScheduler, Bernoulli, Categorical, Distance, FromDistribution, JensenShannon
from lightning_rdrop.callbacks import UnlabeledWeightScheduler
from lightning_rdrop.description import describe, rebuild, same_description, spell


class SaveAt(pl.Callback):
    """Saves a checkpoint in the middle of a training."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def saved(fit, module, rows, path):
    fit(module, rows, limit_train_batches=2).save_checkpoint(path)
    torch.load(path, weights_only=True)
    return path


def test_what_is_not_given_is_made_again(fit, small, rows, tmp_path):
    weight = torch.tensor([1.0, 2.0, 3.0])
    module = small(
        rdrop_distance=JensenShannon(weight=weight, label_smoothing=0.1), rdrop_regularizers=[VAT(epsilon=2.0), FGM()]
    )
    path = saved(fit, module, rows, tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = small.load_from_checkpoint(path)
    assert type(again.rdrop_distance) is JensenShannon
    assert torch.equal(again.rdrop_distance.weight, weight)
    assert again.rdrop_distance.label_smoothing == 0.1
    assert [(type(one), one.epsilon) for one in again.rdrop_regularizers] == [(VAT, 2.0), (FGM, 1.0)]
    batch = next(iter(rows))
    losses = []
    for one in (module, again):
        torch.manual_seed(3)
        losses.append(one.train().rdrop_step(batch).loss)
    torch.testing.assert_close(*losses)


def test_a_hook_that_forgets_super_loses_nothing(fit, small, rows, tmp_path):
    class Forgetful(small):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 1

        def on_load_checkpoint(self, checkpoint):
            assert checkpoint["mine"] == 1

    path = saved(fit, Forgetful(rdrop_distance=JensenShannon()), rows, tmp_path / "last.ckpt")
    assert type(Forgetful.load_from_checkpoint(path).rdrop_distance) is JensenShannon


def test_a_resumed_fit_has_the_distance_of_the_checkpoint(fit, small, rows, tmp_path):
    path = saved(fit, small(rdrop_distance=JensenShannon()), rows, tmp_path / "last.ckpt")
    module = small()
    trainer = fit(module, rows, resume=path, max_epochs=2)
    assert "train/js" in trainer.callback_metrics


def test_another_one_that_is_given_stays_and_is_named(fit, small, rows, tmp_path):
    path = saved(fit, small(rdrop_distance=Categorical(label_smoothing=0.1)), rows, tmp_path / "last.ckpt")
    message = r"trained with rdrop_distance=Categorical\(label_smoothing=0\.1\).*JensenShannon\(\) was given"
    with pytest.warns(UserWarning, match=message):
        again = small.load_from_checkpoint(path, rdrop_distance=JensenShannon())
    assert type(again.rdrop_distance) is JensenShannon


def test_what_is_assigned_is_given(fit, small, rows, tmp_path):
    class Assigned(small):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.rdrop_distance = Categorical(label_smoothing=0.2)
            self.rdrop_regularizers.append(VAT())

    path = saved(fit, small(), rows, tmp_path / "last.ckpt")
    module = Assigned()
    with (
        pytest.warns(UserWarning, match=r"now: Categorical\(label_smoothing=0\.2\) was given here"),
        pytest.warns(UserWarning, match=r"now: \[VAT\(\)\] was given here"),
    ):
        fit(module, rows, resume=path)
    assert module.rdrop_distance.label_smoothing == 0.2
    assert len(module.rdrop_regularizers) == 1


def test_numbers_that_fall_back_to_their_defaults_are_named(fit, rows, tmp_path):
    class Unsaved(Small):
        def save_hyperparameters(self):
            pass

    path = tmp_path / "last.ckpt"
    numbers = {"rdrop_alpha": 1, "rdrop_views": 3, "rdrop_unlabeled_weight": 2, "rdrop_labeled_weight": 0.5}
    module = Unsaved(**numbers)
    trainer = fit(module, rows, [AlphaScheduler(ramp=4), UnlabeledWeightScheduler(ramp=4), SaveAt(2, path)])
    assert module.rdrop_alpha == 1
    with (
        pytest.warns(UserWarning, match=r"trained with rdrop_unlabeled_weight=2\.0, .*now: 1\.0 is the default\. Pass"),
        pytest.warns(UserWarning, match=r"trained with rdrop_labeled_weight=0\.5, .*now: 1\.0 is the default\. Pass"),
        pytest.warns(
            UserWarning, match=r"trained with rdrop_alpha=1\.0, which Unsaved.*now: 4\.0 is the default\. Pass"
        ),
        pytest.warns(UserWarning, match="trained with rdrop_views=3, which Unsaved.*now: 2 is the default"),
    ):
        Unsaved.load_from_checkpoint(path)
    trainer.save_checkpoint(path)
    assigned = Unsaved(rdrop_views=1, rdrop_labeled_weight=2)
    assigned.rdrop_alpha = assigned.rdrop_unlabeled_weight = 3.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint was trained with")
        Unsaved.load_from_checkpoint(path, **numbers)
        fit(assigned, rows, resume=path)
    assert (assigned.rdrop_alpha, assigned.rdrop_views) == (3.0, 1)


def test_a_second_checkpoint_replaces_what_the_first_gave(fit, small, rows, tmp_path):
    paths = [
        saved(fit, small(rdrop_distance=distance), rows, tmp_path / f"{distance}.ckpt")
        for distance in (JensenShannon(), Categorical(label_smoothing=0.1))
    ]
    module = copy.deepcopy(small.load_from_checkpoint(paths[0]))
    fit(module, rows, resume=paths[1])
    assert type(module.rdrop_distance) is Categorical


def test_numbers_of_numpy_are_plain(fit, small, rows, tmp_path):
    distance = Categorical(weight=np.array([1.0, 2.0, 3.0]), label_smoothing=np.float64(0.1))
    path = saved(
        fit,
        small(rdrop_distance=distance, rdrop_regularizers=[VAT(epsilon=np.float32(2))]),
        rows,
        tmp_path / "last.ckpt",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = small.load_from_checkpoint(path)
    assert torch.equal(again.rdrop_distance.weight, torch.tensor([1.0, 2.0, 3.0]))
    assert again.rdrop_distance.label_smoothing == 0.1
    assert again.rdrop_regularizers[0].epsilon == 2


def test_what_cannot_be_made_again_is_named(fit, small, rows, tmp_path):
    module = small(rdrop_distance=FromDistribution(lambda logits: torch.distributions.Categorical(logits=logits)))
    path = saved(fit, module, rows, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"FromDistribution\(make=<function.*is not a plain value.*Pass it"):
        again = small.load_from_checkpoint(path)
    assert type(again.rdrop_distance) is Categorical


def test_the_same_is_no_news(fit, small, rows, tmp_path):
    path = saved(fit, small(), rows, tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.load_from_checkpoint(path)
        small.load_from_checkpoint(path, rdrop_distance=Categorical())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bernoulli(ignore_value=float("nan")),
        lambda: FromDistribution(lambda logits: torch.distributions.Bernoulli(logits=logits)),
    ],
)
def test_what_a_class_makes_each_time_is_no_news(fit, small, rows, tmp_path, make):
    class Made(small):
        def __init__(self, **kwargs):
            super().__init__(rdrop_distance=make(), **kwargs)

        def rdrop_unpack(self, batch):
            return batch[0], torch.nn.functional.one_hot(batch[1], 3).float()

    path = saved(fit, Made(), rows, tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Made.load_from_checkpoint(path)


def test_a_checkpoint_that_describes_nothing_is_said_once(fit, small, rows, tmp_path, caplog):
    path = saved(fit, small(), rows, tmp_path / "last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["rdrop"]
    torch.save(checkpoint, path)
    with caplog.at_level("INFO"):
        small.load_from_checkpoint(path, rdrop_distance=JensenShannon())
    said = [one.message for one in caplog.records if "does not say" in one.message]
    assert len(said) == 1
    assert "those of Small: JensenShannon() and []." in said[0]


def test_a_checkpoint_of_another_network_is_told_by_its_parameters(fit, small, rows, tmp_path):
    path = saved(fit, small(), rows, tmp_path / "last.ckpt")
    other = small()
    other.network[3] = torch.nn.Linear(16, 5)
    with pytest.raises(RuntimeError, match=r"size mismatch for network\.3\.weight"):
        fit(other, rows, resume=path)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        fit(small(), rows, resume=tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        small.load_from_checkpoint(tmp_path / "none.ckpt")


def test_a_class_that_was_not_imported_is_not_looked_for():
    description = {"class": "os.system", "init_args": {"command": "false"}}
    with pytest.raises(ValueError, match=r"os\.system has not been imported"):
        rebuild(description, Distance)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"a": [1, 2.0]}, {"a": [1, 2.0]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([1], [1, 2], False),
        (1, True, False),
        (torch.ones(2), torch.ones(3), False),
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
        (*map(describe, [lambda x: x, lambda x: x]), True),
        (describe({"make": partial(pow, 2)}), describe({"make": partial(pow, 3)}), False),
        (describe(object()), describe(dict), False),
    ],
)
def test_when_two_say_the_same(first, second, same):
    assert same_description(first, second) is same


def test_names_of_arguments_that_come_by_position_or_through_kwargs():
    class Own(Bernoulli):
        def __init__(self, scale, **others):
            super().__init__(**others)
            self.scale = scale

    own = Own(3.0, pos_weight=torch.ones(2))
    assert spell(describe(own)) == "Own(scale=3.0, pos_weight=tensor([1.0, 1.0]))"
    assert rebuild(describe(own), Distance).scale == 3.0
