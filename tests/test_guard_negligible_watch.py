"""A kl that never mattered is said once, with what to raise."""

import warnings

import pytest
import torch
from torch import nn, tensor
from torch.utils.data import DataLoader

from lightning_rdrop.guard import explain_negligible
from lightning_rdrop.guard.negligible_watch import STEPS, NegligibleWatch


def share(kls, ce=2.0):
    watch = NegligibleWatch()
    for kl in kls:
        watch.note(tensor(kl), tensor(ce))
    return watch.share()


def test_the_largest_share_of_a_hundred_steps():
    assert share([1e-6] * (STEPS - 1) + [1e-4]) == pytest.approx(5e-5)
    assert share([1e-6] * (STEPS - 1)) is None  # too few are known


@pytest.mark.parametrize("larger", [1e-3, float("nan")])
def test_one_larger_kl_is_enough(larger):
    assert share([1e-6] * 50 + [larger] + [1e-6] * (STEPS - 51)) is None


def test_a_task_loss_of_0_or_below():
    assert share([0.0] * STEPS, ce=0.0) == 0
    assert share([1e-6] * STEPS, ce=-2.0) == pytest.approx(5e-7)


@pytest.mark.parametrize("alpha", [4.0, 0.0])
def test_it_is_a_warning_once_in_a_fit(fit, small, alpha):
    module = small(p=1e-4, rdrop_alpha=alpha)
    module.network[3] = nn.Sequential(nn.Linear(16, 3), nn.Dropout(0.1), nn.Linear(3, 3))  # alive, and hardly seen
    nn.init.constant_(module.network[3][2].weight, 1e-5)
    batches = [(torch.randn(4, 8), torch.arange(4) % 3) for _ in range(130)]
    module.configure_optimizers = lambda: torch.optim.SGD(module.network[0].parameters(), 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, DataLoader(batches, batch_size=None), log_every_n_steps=5)
    said = [str(one.message) for one in caught if "kl was at most" in str(one.message)]
    assert len(said) == (1 if alpha else 0)
    if alpha:
        assert "Raise the dropout: network.2 (p = 0.0001), network.3.1 (p = 0.1)." in said[0]


def test_what_sleeps_is_named():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2).eval(), nn.Dropout(0.1))
    said = explain_negligible(network, 2e-6, STEPS)
    assert "at most 2e-06 of ce" in said
    assert "In eval mode inside a trained part: 1." in said
    assert "Raise the dropout: 2 (p = 0.1)." in said
    assert "target_modules" not in said
