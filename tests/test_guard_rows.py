"""Rows that meet are told from rounding, from chance, and from an eval mode that tells nothing."""

import pytest
import torch
from torch import nn

from lightning_rdrop.guard.rows import row_dependence

CPU = torch.device("cpu")


def seen(predict, inputs, network=None, examples=None):
    return row_dependence(network or nn.Linear(1, 1), predict, inputs, examples or len(inputs), CPU)


def noisy(size, rows=1.0):
    """Rounding that depends on the size of the batch, of this relative size, in this share of the rows."""

    def predict(x):
        generator = torch.Generator().manual_seed(len(x))
        noise = torch.randn(x.shape, generator=generator) * (torch.arange(len(x)) < rows * len(x)).unsqueeze(1)
        return x * (1 + size * noise)

    return predict


@pytest.mark.parametrize(("precision", "rounding"), [("highest", 1e-4), ("high", 1e-3), ("medium", 1e-2)])
def test_rounding_of_a_precision_is_no_difference(precision, rounding):
    x = torch.randn(6, 1000)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert seen(noisy(rounding), x) is None
        assert "depends on the other examples" in seen(noisy(30 * rounding), x)
    finally:
        torch.set_float32_matmul_precision(before)


def test_where_torch_does_not_tell_its_precision_it_may_be_any(monkeypatch):
    def refuse():
        raise RuntimeError("you have used mix of the legacy and new APIs to set the matmul precision")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert seen(noisy(1e-2), torch.randn(6, 100)) is None
    assert seen(noisy(0.3), torch.randn(6, 100))


def test_half_precision_rounds_more():
    x = torch.randn(6, 1000)
    assert seen(noisy(1e-2), x)
    assert seen(noisy(1e-2), x, nn.Linear(1, 1).bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert seen(noisy(1e-2), x) is None


def test_a_row_is_measured_as_a_whole():
    """Among many elements rounding is larger in some."""
    x = torch.randn(4, 1000)
    assert seen(lambda x: noisy(1e-6)(x) + 0.01 * (torch.arange(1000) == len(x)), x) is None
    assert seen(lambda x: noisy(1e-6)(x) + 0.01 * (torch.arange(1000) < 30 * len(x)), x)


def test_a_large_row_is_measured_by_itself():
    x = torch.randn(4, 1000)
    x[2] *= 1e4
    assert seen(noisy(1e-4), x) is None


def test_numbers_near_zero_are_measured_by_the_others():
    x = torch.tensor([[1.0], [2.0], [1e-7], [3.0]])
    assert seen(lambda x: x + 1e-6 * len(x), x) is None
    assert seen(lambda x: x + 1e-2 * len(x), x)


def test_a_tie_that_rounding_decides_is_no_difference():
    assert seen(noisy(1.0, rows=1 / 40), torch.randn(40, 3)) is None
    assert seen(noisy(1.0, rows=4 / 40), torch.randn(40, 3))


def test_a_row_of_many_numbers_is_compared():
    x = torch.randn(2, 3)
    assert seen(lambda x: x[:, :1].expand(-1, 2**20 + 1), x) is None
    assert seen(lambda x: (x - x.mean(0))[:, :1].expand(-1, 2**20 + 1), x)


@pytest.mark.parametrize("mask", [-torch.inf, -1e9, torch.nan])
def test_masked_classes_do_not_hide_the_others(mask):
    def masked(function):
        return lambda x: function(x).masked_fill(torch.arange(10) > 2, mask)

    x = torch.randn(6, 10)
    assert seen(masked(noisy(1e-5)), x) is None
    assert seen(masked(noisy(1e-1)), x)
    assert seen(lambda x: x.masked_fill(torch.arange(10) > len(x), mask), x)  # another mask


def test_integers_are_equal_or_not():
    x = torch.randn(6, 10)
    assert seen(lambda x: (x, x.argmax(-1)), x) is None
    assert seen(lambda x: (x, x.argmax(-1) + len(x)), x)


def test_every_tensor_of_a_prediction_is_looked_at():
    x = torch.randn(6, 10)
    assert seen(lambda x: {"own": x, "scale": torch.ones(()), "none": x[:, :0]}, x) is None
    assert seen(lambda x: {"scale": torch.ones(()), "none": x[:, :0], "own": x, "others": x - x.mean(0)}, x)
    assert "another number of tensors" in seen(lambda x: [x] * (len(x) // 6), x)
    assert "the shape (6, 6), and that for twice as many has (12, 12)" in seen(lambda x: x @ x.T, x)


def test_rows_of_tokens_belong_to_their_example():
    x = torch.randn(4, 5, 3)
    assert seen(lambda x: x.flatten(0, 1), x) is None
    assert seen(lambda x: x.flatten(0, 1).cumsum(0), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x[:1],
        lambda x: x - x[-1:],
        lambda x: x + x.roll(1, 0),
        lambda x: x + x.roll(-1, 0),
        lambda x: x.cumsum(0),
        lambda x: x.flip(0).cumsum(0).flip(0),
        lambda x: (x @ x.T).softmax(-1) @ x,
        lambda x: x / x.norm(),
        lambda x: x[torch.arange(len(x)) // 2 * 2],
    ],
    ids=["first", "last", "before", "after", "all before", "all after", "attention", "norm", "pairs"],
)
def test_whatever_stands_beside_a_row(function):
    assert "depends on the other examples" in seen(function, torch.randn(6, 10))
    assert seen(function, torch.randn(2, 10))


class Switches(nn.Module):
    """Does something else in training than in evaluation."""

    def __init__(self, training, evaluation):
        super().__init__()
        self.functions = {True: training, False: evaluation}

    def forward(self, x):
        return self.functions[self.training](x)


@pytest.mark.parametrize(
    "evaluation",
    [
        lambda x: x.flatten()[:4],  # the best of all
        lambda x: x.mean(0),
        lambda x: (x, x.mean(0)),
        lambda x: x + torch.randn_like(x),
        lambda x: 1 / 0,
    ],
    ids=["the best of all", "one for all", "two", "random", "fails"],
)
def test_an_eval_mode_that_tells_nothing(evaluation):
    network = Switches(lambda x: x, evaluation)
    assert seen(network, torch.randn(6, 10), network) is None
    assert network.training


def test_a_difference_that_training_has_too():
    network = Switches(lambda x: x @ x.T + 1, lambda x: x @ x.T)
    assert seen(network, torch.randn(6, 10), network)


class Counted(nn.Linear):
    def __init__(self, **more):
        super().__init__(10, 3)
        self.passes = []
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        self.passes.append((self.training, len(x), torch.is_grad_enabled()))
        return super().forward(x)


def test_the_cost_is_two_passes_without_gradients():
    network = Counted()
    assert seen(network, torch.randn(6, 10), network) is None
    assert network.passes == [(False, 6, False), (False, 12, False)]


@pytest.mark.parametrize("examples", [1, 6])
def test_ranks_that_share_weights_make_the_same_passes_whatever_they_see(examples):
    network = Counted(elsewhere=nn.Parameter(torch.zeros(0)))  # as a parameter that is sharded away
    assert seen(network, torch.randn(examples, 10), network) is None
    assert [(training, rows // examples) for training, rows, _ in network.passes] == [
        (False, 1), (False, 2), (False, 1), (True, 2),
    ]  # fmt: skip


def test_modules_that_take_the_sequence_first_are_named():
    network = nn.ModuleDict({"first": nn.LSTM(4, 3), "second": nn.LSTM(4, 3, batch_first=True), "third": nn.GRU(4, 3)})
    said = seen(lambda x: network["first"](x)[0], torch.randn(5, 2, 4), network)
    assert "With batch_first=False, so that the time dimension is duplicated: first, third. Otherwise look" in said
    assert "a batch dimension that is not the first" in seen(lambda x: x.cumsum(0), torch.randn(5, 2))


def test_rows_that_meet_by_design_are_left_in_peace():
    x = torch.randn(6, 10)
    for network in (nn.BatchNorm1d(10, track_running_stats=False), Counted(expert_capacity=2)):
        assert seen(lambda x: x.cumsum(0), x, nn.Sequential(network)) is None
    for network in (nn.BatchNorm1d(10), Counted(expert_capacity="full")):
        assert seen(lambda x: x.cumsum(0), x, nn.Sequential(network))
