"""The focal loss, against the formula of the paper."""

import pytest
import torch
from torch.nn import functional as F

from lightning_rdrop import Categorical, Focal, Head, RDropLoss, symmetric_kl


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_the_loss_written_out(gamma, weighted, class_dim):
    logits = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (4, 6))
    target[1, 2:] = -100
    counted = target >= 0
    alpha = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64) if weighted else torch.ones(5).double()
    p = logits.softmax(-1)[:, counted].gather(-1, target[counted].expand(2, -1).unsqueeze(-1)).squeeze(-1)
    ce = (-alpha[target[counted]] * (1 - p) ** gamma * p.log()).sum() / (2 * alpha[target[counted]].sum())
    kl = symmetric_kl(*logits)[counted].mean() / 2
    distance = Focal(gamma, class_dim=class_dim, weight=alpha if weighted else None)
    terms = RDropLoss(distance)(logits if class_dim == -1 else logits.mT, target, 3.0)
    torch.testing.assert_close((terms.ce, terms.kl, terms.loss), (ce, kl, ce + 3.0 * kl))
    found, wanted = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (terms.loss, ce + 3.0 * kl))
    torch.testing.assert_close(found, wanted)


def test_gamma_0_is_the_cross_entropy():
    logits, target = torch.randn(2, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 4, -100])
    focal, plain = (RDropLoss(distance)(logits, target, 3.0) for distance in (Focal(0.0), Categorical()))
    torch.testing.assert_close((focal.loss, focal.rows), (plain.loss, plain.rows))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient(gamma):
    logits, target = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, -100, 4])
    assert torch.autograd.gradcheck(lambda x: Focal(gamma).to_target(x, target).mean, logits)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_row_that_is_certain_has_no_gradient_and_no_nan(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0], [torch.inf, 0.0]], requires_grad=True)
    loss = Focal(gamma).to_target(logits, torch.tensor([0, 0, -100])).total
    torch.testing.assert_close(loss.detach(), torch.tensor(200.0))
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.tensor([[0.0, 0], [-1, 1], [0, 0]]))


def test_half_precision_is_computed_in_float32():
    logits, target = torch.randn(4, 5).bfloat16(), torch.arange(4)
    found, exact = (Focal().to_target(x, target).mean for x in (logits, logits.double()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"gamma must be a finite number >= 0, got -1"):
        Focal(-1)
    with pytest.raises(ValueError, match="Focal takes class indices"):
        Focal().to_target(torch.randn(4, 5), F.one_hot(torch.arange(4), 5).float())
    with pytest.raises(TypeError, match=r"A fused head needs .*got Focal\(\)"):
        RDropLoss(Focal(gamma=2.0))(torch.randn(2, 4, 3), torch.arange(4), 1.0, Head(torch.randn(5, 3)))
