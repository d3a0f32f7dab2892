"""Rounding is no difference, dropout is; and views that agree by chance are drawn again, without a trace."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_rdrop.guard import diagnose, same
from lightning_rdrop.guard.agreement import noise_for_tiny
from tests.networks import Blocks, DropPath, StochasticDepth, reason


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("head", "rows"),
    [
        (nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 3)), 1),
        (nn.Sequential(*(DropPath(0.05) for _ in range(4)), nn.Linear(4, 3)), 4),
        (nn.Sequential(StochasticDepth(0.3, "row"), nn.Linear(4, 3)), 2),
        (nn.Sequential(StochasticDepth(0.5, "batch"), nn.Dropout(0.5)), 2),
    ],
)
def test_equal_views_by_chance_are_drawn_again(head, rows, seed):
    torch.manual_seed(seed)
    assert reason(Blocks(p=0.0, head=copy.deepcopy(head)), rows) is None


class LoRA(nn.Module):
    """A frozen layer with a low-rank update that starts at zero, as peft's."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lora_dropout = nn.Dropout(0.1)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(self.lora_dropout(x)))


def test_dropout_behind_a_zero_weight_is_alive():
    network = Blocks(p=0.0, head=LoRA())
    up = network.head.up.weight
    assert reason(network) is None
    assert network.head.up.weight is up
    assert not up.any()
    network.head.lora_dropout.p = 0.0
    assert "head.lora_dropout" in reason(network)


def test_only_what_is_tiny_throughout_is_replaced_by_noise():
    network = nn.ParameterList([torch.full((2,), 1e-6), torch.tensor([1e-6, 1e-3]), torch.zeros(0), torch.zeros(2)])
    network[3].requires_grad_(False)
    before = list(network)
    with torch.no_grad(), noise_for_tiny(network):
        assert [now is then for now, then in zip(network, before, strict=True)] == [False, True, True, True]
        assert network[0].abs().max() > 1e-3
    assert all(now is then for now, then in zip(network, before, strict=True))


def test_diagnose_leaves_everything_as_it_was():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Dropout(0.0))
    batch = torch.randn(10, 4)
    draws = []

    def draw() -> Tensor:
        draws.append(torch.rand(()))
        return network(batch).expand(2, -1, -1)

    views = draw()
    state, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    buffers = list(network.buffers())
    assert diagnose(network, draw, views) is not None
    assert len(draws) == 1 + 16
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(now is then for now, then in zip(network.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    views.sum().backward()  # the graph of the step survived the redraws


def test_diagnose_draws_only_if_it_must():
    def draw() -> Tensor:
        raise AssertionError("drawn")

    views = torch.randn(2, 3, 4)
    assert diagnose(nn.Linear(1, 1), draw, views) is None
    assert diagnose(nn.Linear(1, 1), draw, torch.stack([views[0], views[0], views[1]])) is None
    with pytest.raises(AssertionError, match="drawn"):
        diagnose(nn.Linear(1, 1), draw, views[:1].expand(2, -1, -1))


def test_diagnose_restores_after_an_error():
    network = LoRA()
    up = network.up.weight

    def draw() -> Tensor:
        assert network.up.weight is not up
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        diagnose(network, draw, torch.zeros(2, 3, 4))
    assert network.up.weight is up


@pytest.mark.parametrize("rows", [1, 3, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_no_difference_and_dropout_is(rows, dtype):
    torch.manual_seed(rows)
    layers = [layer for _ in range(6) for layer in (nn.Linear(333, 333), nn.GELU(), nn.Dropout(0.05))]
    network = nn.Sequential(*layers, nn.Linear(333, 7)).to(dtype)
    batch = torch.randn(rows, 333, dtype=dtype).repeat(2, 1)
    first, second = network.eval()(batch).view(2, rows, 7)
    assert same(first, second)
    first, second = network.train()(batch).view(2, rows, 7)
    assert not same(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_last_bit_is_rounding(dtype):
    one = torch.linspace(-3, 3, 64, dtype=torch.float64).to(dtype)
    assert same(one, one * (1 + torch.finfo(dtype).eps))
    assert not same(one, one * (1 + 400 * torch.finfo(dtype).eps))


def test_a_small_number_is_judged_by_the_others():
    assert same(torch.tensor([1.0, 1.0, 1e-9]), torch.tensor([1.000001, 1.000001, 3e-9]))
    assert not same(torch.tensor([1e-9]), torch.tensor([3e-9]))  # without others, by itself


@pytest.mark.parametrize("mask", [-torch.inf, -1e9, torch.finfo(torch.float32).min])
def test_masked_classes_do_not_set_the_scale(mask):
    one = torch.randn(8, 10)
    other = one + 0.01
    one[:, 3:] = other[:, 3:] = mask
    assert not same(one, other)
    assert same(one, one.clone())


def test_a_few_masked_classes_that_differ_do_not_set_the_scale():
    one = torch.randn(8, 10)
    one[:, 7:] -= 1e5
    assert not same(one, one + 0.1)


def test_nan_and_infinity():
    nan, inf = torch.nan, torch.inf
    assert same(torch.tensor([nan, 1.0, inf]), torch.tensor([nan, 1.0, inf]))
    assert not same(torch.tensor([nan, 1.0]), torch.tensor([1.0, 1.0]))
    assert not same(torch.tensor([inf, 1.0]), torch.tensor([-inf, 1.0]))
    assert not same(torch.tensor([inf, 1.0]), torch.tensor([2.0, 1.0]))


def test_other_shapes_and_integers():
    assert not same(torch.zeros(2), torch.zeros(2, 1))
    assert same(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert not same(torch.tensor([10**9]), torch.tensor([10**9 + 1]))
    assert same(torch.zeros(0), torch.zeros(0))


def test_a_difference_in_the_last_piece_is_seen():
    one = torch.zeros(2**20 + 5)
    other = one.clone()
    other[-1] = 1.0
    assert not same(one, other)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float64, 100), (torch.float32, 100), (torch.bfloat16, 2)])
def test_the_tolerance(dtype, steps):
    one = torch.full((64,), 1.0, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert same(one.to(dtype), (one + 1.9 * steps * eps).to(dtype))
    assert not same(one.to(dtype), (one + 2.6 * steps * eps).to(dtype))
