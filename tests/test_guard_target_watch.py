"""Values of a target that cannot be, in whatever batch they come, and predictions that are no logits."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import Bernoulli, Categorical, Gaussian
from lightning_rdrop.guard.target_watch import TargetWatch
from tests.conftest import Net
from tests.networks import training_outputs


def network(*more):
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3), *more)


def spoiled(target, value):
    """Eight batches of four, with the value in that of number 5."""
    target[(22, 1)[: target.dim()]] = value
    return DataLoader(TensorDataset(torch.randn(32, 8), target), 4)


LATER = {
    "NaN for Gaussian": (Gaussian(), lambda: torch.randn(32, 3), math.nan),
    "-1 for Bernoulli": (Bernoulli(), lambda: torch.randint(2, (32, 3)).float(), -1.0),
    "a class that is none": (Categorical(), lambda: torch.arange(32) % 3, 3),
    "a second hot class": (Categorical(), lambda: F.one_hot(torch.arange(32) % 3, 3).float(), 7.0),
}


@pytest.mark.parametrize("case", LATER)
def test_a_later_batch_is_named_where_a_log_is_due(fit, case):
    distance, target, value = LATER[case]
    with pytest.raises(ValueError, match=r"target of batch 5 contains a value that is invalid.*ignore_value"):
        fit(Net(network(), rdrop_distance=distance), spoiled(target(), value), max_epochs=2, log_every_n_steps=4)


def test_of_the_first_batch_it_is_a_warning_where_that_is_asked_for():
    module = Net(network(), rdrop_distance=Gaussian(), rdrop_guard="warn")
    with pytest.warns(UserWarning, match="The target contains nan; Gaussian takes finite numbers"):
        module.rdrop_step((torch.randn(4, 8), torch.full((4, 3), math.nan)))


@pytest.mark.parametrize(("every", "batches"), [(6, 7), (50, 8)], ids=["log", "end of an epoch"])
def test_where_values_are_waited_for_they_are_read_at_the_next(monkeypatch, fit, every, batches):
    """As on a GPU."""
    monkeypatch.setattr("lightning_rdrop.guard.guard.is_readable", lambda tensor: False)
    distance, target, value = LATER["-1 for Bernoulli"]
    module = Net(network(), rdrop_distance=distance)
    seen = training_outputs(module)
    with pytest.raises(ValueError, match="target of batch 5 contains"):
        fit(module, spoiled(target(), value), max_epochs=2, log_every_n_steps=every)
    assert len(seen) == batches


def test_a_target_is_spoken_of_once():
    watch = TargetWatch()
    for invalid in (torch.tensor(False), None, torch.tensor(True), torch.tensor(True)):
        watch.note(invalid)
    assert watch.reason().startswith("The target of batch 2 contains")
    assert watch.reason() is None
    watch.note(torch.tensor(True))
    assert watch.reason() is None


def test_what_does_not_count_is_no_fault(fit):
    for distance in (Gaussian(ignore_value=math.nan), Bernoulli(ignore_value=math.nan)):
        fit(Net(network(), rdrop_distance=distance), spoiled(torch.rand(32, 3), math.nan), max_epochs=2)


@pytest.mark.parametrize(
    ("distance", "last", "target"),
    [
        (Categorical(), nn.Softmax(-1), torch.arange(6) % 3),
        (Categorical(), nn.LogSoftmax(-1), None),
        (Bernoulli(), nn.Sigmoid(), torch.randint(2, (6, 3)).float()),
    ],
    ids=["softmax", "log-softmax", "sigmoid"],
)
def test_a_prediction_that_is_no_logits_is_a_warning(recwarn, distance, last, target):
    module = Net(network(last), rdrop_distance=distance)
    module.rdrop_step((torch.randn(6, 8), torch.arange(6) % 3 if target is None else target))
    said = [str(one.message) for one in recwarn if "logits" in str(one.message)]
    assert len(said) == (0 if target is None else 1)  # log-probabilities are logits, too
