import math
import re

import mpmath
import pytest
import torch
from torch import inf
from torch.distributions import Categorical, kl_divergence

from lightning_rdrop import jensen_shannon, symmetric_bernoulli_kl, symmetric_kl
from lightning_rdrop.divergence import kl, log_probabilities


def exactly(first, second):
    """1/2 [KL(p || q) + KL(q || p)] of two lists of logits, in fifty digits."""
    with mpmath.workdps(50):
        p, q = ([mpmath.exp(z) for z in logits] for logits in (first.tolist(), second.tolist()))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        return float(sum((x - y) * (mpmath.log(x) - mpmath.log(y)) for x, y in zip(p, q, strict=True)) / 2)


def test_against_torch_distributions():
    first, second = torch.randn(2, 7, 5, dtype=torch.float64)
    p, q = Categorical(logits=first), Categorical(logits=second)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)) / 2
    torch.testing.assert_close(symmetric_kl(first, second), expected)
    torch.testing.assert_close(symmetric_kl(first.T, second.T, dim=0), expected)
    torch.testing.assert_close(symmetric_kl(second, first), expected)


@pytest.mark.parametrize("gap", [1e-3, 3e-3, 1e-2, 1.0])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_float32_keeps_three_digits_of_nearly_equal_views(gap, offset):
    first = torch.randn(20, 30)
    second = first + gap * torch.randn(20, 30) + offset
    exact = torch.tensor([exactly(p, q) for p, q in zip(first, second, strict=True)])
    assert exact.min() * 2 < 2e-6 or gap > 1e-3  # J around 1e-6 is among them
    torch.testing.assert_close(symmetric_kl(first, second), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_views_are_exactly_zero(dtype):
    logits = (torch.randn(50, 100) * 10).to(dtype)
    assert (symmetric_kl(logits, logits.clone()) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [20.0, 110.0, 1e4])
def test_large_gaps(dtype, gap):
    first = torch.tensor([[gap, 0.0, -gap]]).to(dtype).requires_grad_()
    second = torch.tensor([[0.0, gap, -gap]]).to(dtype).requires_grad_()
    divergence = symmetric_kl(first, second)
    torch.testing.assert_close(divergence.item(), exactly(first[0], second[0]), rtol=1e-5, atol=0)
    assert torch.autograd.grad(divergence.sum(), first)[0].isfinite().all()


def test_a_class_masked_in_both_views_adds_nothing():
    first = torch.tensor([[1.0, 2.0, -inf], [-inf, 0.5, 1.0]], requires_grad=True)
    second = torch.tensor([[2.0, 1.0, -inf], [-inf, 1.0, 1.0]], requires_grad=True)
    divergence = symmetric_kl(first, second)
    without = torch.stack([symmetric_kl(first[0, :2], second[0, :2]), symmetric_kl(first[1, 1:], second[1, 1:])])
    torch.testing.assert_close(divergence, without)
    for gradient in torch.autograd.grad(divergence.sum(), (first, second)):
        assert gradient.isfinite().all()
        assert gradient[0, 2] == gradient[1, 0] == 0


def test_a_class_masked_in_one_view_is_infinitely_far():
    assert symmetric_kl(torch.tensor([1.0, -inf]), torch.tensor([1.0, 0.0])) == inf


def test_gradcheck():
    first, second = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(symmetric_kl, (first, second))
    assert torch.autograd.gradcheck(lambda p, q: symmetric_kl(p.mT, q.mT, dim=0), (first, second))


@pytest.mark.parametrize("function", [symmetric_kl, kl, symmetric_bernoulli_kl, jensen_shannon])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 1)])
def test_nothing_broadcasts(function, shape):
    message = rf"{function.__name__} takes.*first \(3, 4\) and second {re.escape(str(shape))}; nothing broadcasts"
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(3, 4), torch.zeros(shape))


@pytest.mark.parametrize("value", [-200.0, -1e4])
def test_a_class_masked_in_one_view_is_infinitely_far_where_the_other_underflows(value):
    """The probability of e^-200 is 0 in float32, and so is the difference of the two; but not the distance."""
    masked, tiny = torch.tensor([[0.0, -inf], [0.0, 1.0]]), torch.tensor([[0.0, value], [0.0, 2.0]])
    expected = torch.tensor([inf, exactly(masked[1], tiny[1])])
    torch.testing.assert_close(symmetric_kl(masked, tiny), expected)
    torch.testing.assert_close(symmetric_kl(tiny.mT, masked.mT, dim=0), expected)
    assert kl(tiny, masked)[0] == inf
    assert kl(masked, tiny)[0] == 0
    assert symmetric_bernoulli_kl(torch.tensor(inf), torch.tensor(-value)) == inf
    assert symmetric_bernoulli_kl(torch.tensor(value), torch.tensor(-inf)) == inf


@pytest.mark.parametrize("function", [symmetric_kl, kl, symmetric_bernoulli_kl, jensen_shannon])
def test_nan_stays_nan(function):
    nan = torch.tensor([[math.nan, 0.0]])
    for first, second in ((nan, torch.zeros(1, 2)), (torch.tensor([[0.0, -inf]]), nan)):
        assert function(first, second).isnan().any()
        assert function(second, first).isnan().any()


def test_kl_has_a_direction():
    first, second = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=first), Categorical(logits=second))
    torch.testing.assert_close(kl(first, second), expected)
    torch.testing.assert_close(kl(first.mT, second.mT, dim=0), expected)


@pytest.mark.parametrize("gap", [14.0, 16.0, 20.0])
def test_jensen_shannon_of_a_class_that_one_view_all_but_excludes(gap):
    """To the last digits of float64, to which the class adds exp(-gap)."""
    first, second = torch.tensor([0.0, -gap], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with mpmath.workdps(50):
        p = [mpmath.mpf(1) / (1 + mpmath.exp(-gap)), mpmath.exp(-gap) / (1 + mpmath.exp(-gap))]
        q = [mpmath.mpf(1) / 2] * 2
        middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        expected = sum(x * mpmath.log(x / m) + y * mpmath.log(y / m) for x, y, m in zip(p, q, middle, strict=True)) / 2
    assert float(jensen_shannon(first, second)) == pytest.approx(float(expected), rel=1e-14)


def test_classes_are_last_unless_it_is_said():
    logits = torch.randn(3, 4, 5)
    torch.testing.assert_close(log_probabilities(logits), logits.log_softmax(-1))
