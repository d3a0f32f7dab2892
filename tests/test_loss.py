import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_rdrop import Categorical, Head, RDropLoss, symmetric_kl
from lightning_rdrop.views import split
from tests import reference


def two_views(rows=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * 2
    return predictions.requires_grad_(), torch.arange(rows) % classes


def gradient(loss, of):
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 4.0])
def test_it_is_half_of_the_papers_formula(alpha):
    predictions, target = two_views()
    terms = RDropLoss()(predictions, target, alpha)
    paper = reference.paper_loss(predictions[0], predictions[1], target, alpha)
    torch.testing.assert_close(terms.loss, paper / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient(terms.loss, predictions), gradient(paper / 2, predictions), rtol=1e-10, atol=1e-14
    )


def test_it_is_sus_keras_loss():
    predictions, target = two_views()
    su = reference.su_loss(predictions.movedim(0, 1).flatten(0, 1), target, 4.0)
    terms = RDropLoss()(split(predictions.flatten(0, 1), 2, len(target)), target, 4.0)
    torch.testing.assert_close(terms.loss, su, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(terms.loss, predictions), gradient(su, predictions))


def test_by_hand():
    """p = (1/2, 1/5, 3/10) and q = (1/2, 3/10, 1/5): J = 2 (0.1 ln 1.5), kl = J / 4, ce = ln 2."""
    predictions = torch.tensor([[[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]]], dtype=torch.float64).log()
    terms = RDropLoss()(predictions, torch.tensor([0]), 4.0)
    assert terms.ce.item() == pytest.approx(math.log(2), rel=1e-14)
    assert terms.kl.item() == pytest.approx(0.05 * math.log(1.5), rel=1e-13)
    assert terms.loss.item() == pytest.approx(math.log(2) + 0.2 * math.log(1.5), rel=1e-14)


def test_gradcheck():
    predictions, target = two_views(rows=3)
    assert torch.autograd.gradcheck(lambda p: RDropLoss()(p, target, 4.0).loss, predictions)
    assert torch.autograd.gradgradcheck(lambda p: RDropLoss()(p, target, 4.0).loss, predictions)


def test_the_gradient_flows_through_both_views_of_the_divergence():
    predictions, target = two_views()
    loss = RDropLoss()
    consistency = loss(predictions, target, 1.0).loss - loss(predictions, target, 0.0).loss
    expected = gradient(reference.both_ways(*predictions).sum(-1).mean() / 4, predictions)
    torch.testing.assert_close(gradient(consistency, predictions), expected, rtol=1e-9, atol=1e-14)
    assert expected.abs().amin(dim=(1, 2)).gt(0).all()


def test_a_loss_of_ones_own_trains_on_the_terms():
    """What is added to it adds its gradient; so does what is made of the prediction, which is the first view's."""
    predictions, target = two_views()
    terms = RDropLoss()(predictions, target, 4.0)
    own = terms.prediction.square().mean() + 0.3 * terms.kl
    kl = reference.both_ways(*predictions).sum(-1).mean() / 4
    expected = predictions[0].square().mean() + 0.3 * kl
    torch.testing.assert_close(gradient(own, predictions), gradient(expected, predictions))


def test_one_view_is_the_task_loss():
    predictions, target = two_views()
    terms = RDropLoss()(predictions[:1], target, 4.0)
    torch.testing.assert_close(terms.loss, F.cross_entropy(predictions[0], target))
    assert terms.kl == 0


def test_more_views_are_the_mean_over_pairs():
    predictions = torch.randn(3, 5, 4, dtype=torch.float64)
    terms = RDropLoss()(predictions, torch.arange(5) % 4, 1.0)
    pairs = [reference.both_ways(predictions[j], predictions[k]).sum(-1).mean() for j, k in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(terms.kl, sum(pairs) / 3 / 4)


def test_cross_entropy_is_torchs_on_the_rows_of_all_views_together():
    predictions, target = two_views()
    target[2] = 9
    arguments = {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64), "label_smoothing": 0.1}
    terms = RDropLoss(Categorical(ignore_index=9, **arguments))(predictions, target, 4.0)
    ce = F.cross_entropy(predictions.flatten(0, 1), target.repeat(2), ignore_index=9, **arguments)
    torch.testing.assert_close(terms.ce, ce)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**16))
def test_padding_and_order_do_not_matter(rows, padding, seed):
    predictions, target = two_views(rows, seed=seed)
    order = torch.randperm(rows + padding)
    junk = 100 * torch.randn(2, padding, 4, dtype=torch.float64)
    padded = torch.cat([predictions, junk], 1)[:, order]
    labels = torch.cat([target, torch.full((padding,), -100)])[order]
    plain, shuffled = RDropLoss()(predictions, target, 4.0), RDropLoss()(padded, labels, 4.0)
    for name in ("loss", "ce", "kl"):
        torch.testing.assert_close(getattr(shuffled, name), getattr(plain, name))


def test_nothing_to_learn_from_is_zero_and_not_nan():
    predictions, target = two_views()
    terms = RDropLoss()(predictions, torch.full_like(target, -100), 4.0)
    assert terms.loss == terms.ce == terms.kl == 0
    assert (gradient(terms.loss, predictions) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    predictions, target = two_views()
    half = predictions.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        terms = RDropLoss()(half, target, 4.0)
    exact = RDropLoss()(half.detach().double(), target, 4.0)
    assert terms.loss.dtype == torch.float32
    for name in ("loss", "ce", "kl"):
        torch.testing.assert_close(getattr(terms, name).double(), getattr(exact, name), rtol=1e-5, atol=0)


def test_a_head_makes_the_predictions_of_hidden_states():
    hidden, head = torch.randn(2, 3, 5, 4, requires_grad=True), Head(torch.randn(7, 4), torch.randn(7))
    target = torch.arange(15).view(3, 5) % 7
    found, expected = RDropLoss()(hidden, target, 4.0, head), RDropLoss()(F.linear(hidden, *head), target, 4.0)
    torch.testing.assert_close((found.loss, found.ce, found.kl), (expected.loss, expected.ce, expected.kl))
    torch.testing.assert_close(gradient(found.loss, hidden), gradient(expected.loss, hidden))


@pytest.mark.parametrize("class_dim", [1, 2, -1, -2])
def test_class_probabilities_wherever_the_classes_lie(class_dim):
    """By torch's own cross-entropy and divergence, with the classes last."""
    logits = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    target = torch.rand(3, 5, 6, dtype=torch.float64).softmax(-1)
    dim = class_dim if class_dim < 0 else class_dim + 1
    terms = RDropLoss(Categorical(class_dim=class_dim))(logits.movedim(-1, dim), target.movedim(-1, class_dim), 4.0)
    ce = F.cross_entropy(logits.flatten(0, -2), target.repeat(2, 1, 1).flatten(0, -2))
    torch.testing.assert_close(terms.ce, ce)
    torch.testing.assert_close(terms.kl, symmetric_kl(logits[0], logits[1]).mean() / 2)
