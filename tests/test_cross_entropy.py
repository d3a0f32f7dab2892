import gc
import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from lightning_rdrop import (
    Categorical,
    JensenShannon,
    RDropLoss,
    linear_rdrop_cross_entropy,
    rdrop_cross_entropy,
)
from lightning_rdrop._fused import compiled, compiled_loss, sweep
from lightning_rdrop._fused.sweep import Sweep
from lightning_rdrop.composite import composite as written_out
from lightning_rdrop.labels import Labels
from tests import reference


def formula(logits, target, alpha, *, ignore_index=-100, label_smoothing=0.0, weight=None):
    """The published formula, in float64, by torch's own cross-entropy and Kullback-Leibler divergence."""
    logits = logits.double()
    weight = None if weight is None else weight.double()
    ce = F.cross_entropy(
        logits.flatten(0, 1),
        target.repeat(len(logits)),
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    log_p, log_q = logits[:, target != ignore_index].log_softmax(-1)
    one = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    other = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return ce + alpha * (one + other) / (4 * (target != ignore_index).sum())


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def error(found, exact):
    """The largest error, relative to the largest gradient of the row's views, or to a thousandth of what one can be.

    Below that float32 sees a probability of 1, and float16 has no digits left.
    """
    scale = exact.abs().amax((0, 2), keepdim=True).clamp(min=1e-3 / exact.shape[1])
    return float(((found.double() - exact).abs() / scale).max())


def composite(logits, target, alpha):
    return written_out(logits, target, alpha, Labels()).loss


@pytest.fixture(params=["in place", "pure"])
def arithmetic(request, monkeypatch):
    """By hand and in place, or by the pure functions; what a compiler makes of these has a file of its own.

    Its value is how many last places the gradient may be wrong by.
    """
    if request.param == "pure":
        monkeypatch.setattr(sweep, "_FEW", 0)
        monkeypatch.setattr(compiled, "_compiled", lambda: compiled._write)
    with compiled_loss(request.param == "pure"):
        yield 2 if request.param == "pure" else 1


BOTH = pytest.mark.usefixtures("arithmetic")


CASES = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 40),
        "classes": st.one_of(st.integers(2, 40), st.sampled_from([511, 512, 513, 700])),
        "chunk": st.integers(1, 5000),
        "seed": st.integers(0, 2**31),
        "scale": st.sampled_from([1e-3, 1.0, 10.0, 200.0, 1e4]),
        "apart": st.sampled_from([0.0, 1e-3, 1.0]),
        "offset": st.sampled_from([0.0, 10.0]),
        "masked": st.booleans(),
        "ignored": st.sampled_from([0.0, 0.3]),
        "alpha": st.sampled_from([0.0, 1.0, 4.0]),
    }
)


def draw(case, dtype=torch.float32):
    torch.manual_seed(case["seed"])
    rows, classes = case["rows"], case["classes"]
    logits = torch.randn(rows, classes) + case["apart"] * torch.randn(2, rows, classes)
    logits = case["scale"] * logits + case["offset"] * torch.tensor([0.0, 1.0]).view(2, 1, 1)
    target = torch.randint(classes, (rows,))
    if case["masked"]:
        mask = torch.rand(rows, classes) < 0.3
        mask[torch.arange(rows), target] = False
        logits[:, mask] = -torch.inf
    target[torch.rand(rows) < case["ignored"]] = -100
    target[0] = target[0].clamp(min=0)
    return logits.to(dtype).requires_grad_(), target


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES)
def test_gradient_is_as_exact_as_autograd_of_the_formula(arithmetic, case):
    logits, target = draw(case)
    exact_logits = logits.detach().double().requires_grad_()
    exact = gradient(composite(exact_logits, target, case["alpha"]), exact_logits)
    terms = rdrop_cross_entropy(logits, target, case["alpha"], chunk=case["chunk"])
    ours, theirs = (
        float((gradient(loss, logits) - exact).abs().max()) * case["rows"]
        for loss in (terms.loss, composite(logits, target, case["alpha"]))
    )
    # the formula is now and then lucky: log-probabilities are only known to the last place of a float32
    span = 2 * float(logits.detach()[logits.isfinite()].abs().max())
    assert ours <= arithmetic * max(2 * theirs, torch.finfo(torch.float32).eps * max(1, span))
    expected = composite(exact_logits, target, case["alpha"])
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=1e-6)


@BOTH
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CASES, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision(case, dtype):
    case["scale"] = min(case["scale"], 200.0)
    logits, target = draw(case, dtype)
    exact_logits = logits.detach().double().requires_grad_()
    exact = gradient(composite(exact_logits, target, case["alpha"]), exact_logits)
    terms = rdrop_cross_entropy(logits, target, case["alpha"], chunk=case["chunk"])
    assert terms.loss.dtype == torch.float32
    assert error(gradient(terms.loss, logits), exact) <= 1e-2
    expected = composite(exact_logits, target, case["alpha"])
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("classes", [7, 600])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 4000, None])
def test_the_published_formula_in_float64(classes, smoothing, weighted, chunk):
    logits = torch.randn(2, 9, classes, dtype=torch.double, requires_grad=True)
    target = torch.randint(classes, (9,))
    target[[2, 5]] = 3
    arguments = {"ignore_index": 3, "label_smoothing": smoothing, "weight": torch.rand(classes) if weighted else None}
    terms = rdrop_cross_entropy(logits, target, 3.0, chunk=chunk, **arguments)
    expected = formula(logits, target, 3.0, **arguments)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.loss, terms.ce + 3.0 * terms.kl)
    torch.testing.assert_close(gradient(terms.loss, logits), gradient(expected, logits))
    assert torch.equal(terms.prediction, logits[0])
    share = arguments["weight"][target[target != 3]].sum() if weighted else (target != 3).sum()
    torch.testing.assert_close(terms.rows.double(), share.double())


COMBINATIONS = {
    "ce": lambda loss, ce, kl: ce,
    "kl": lambda loss, ce, kl: kl,
    "loss and half of kl": lambda loss, ce, kl: loss + 0.5 * kl,
    "all three": lambda loss, ce, kl: 2 * loss - ce + kl.square(),
}


def separately(logits, target, alpha, **arguments):
    """loss, ce and kl by the published formula."""
    ce, both = (formula(logits, target, weight, **arguments) for weight in (0.0, 1.0))
    return ce + alpha * (both - ce), ce, both - ce


@BOTH
@pytest.mark.parametrize("classes", [7, 600])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_term_has_its_gradient(classes, smoothing, weighted, combine):
    logits = torch.randn(2, 9, classes, dtype=torch.double, requires_grad=True)
    target = torch.randint(classes, (9,))
    target[[2, 5]] = -100
    weight = torch.rand(classes, dtype=torch.double) if weighted else None
    arguments = {"label_smoothing": smoothing, "weight": weight}
    terms = rdrop_cross_entropy(logits, target, 3.0, chunk=4000, **arguments)
    found = combine(terms.loss, terms.ce, terms.kl)
    expected = combine(*separately(logits, target, 3.0, **arguments))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))


@BOTH
@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_term_of_the_head_has_its_gradient(combine, frozen):
    hidden = torch.randn(2, 9, 5, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.double, requires_grad=not frozen)
    bias = torch.randn(7, dtype=torch.double, requires_grad=True)
    alpha = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, -100, 4, 5, 6, 0])
    terms = linear_rdrop_cross_entropy(hidden, weight, target, alpha, bias=bias, chunk=30)
    found = combine(terms.loss, terms.ce, terms.kl)
    expected = combine(*separately(F.linear(hidden, weight, bias), target, alpha))
    inputs = [part for part in (hidden, weight, bias, alpha) if part.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (found, expected))
    # alpha has no part in ce and kl: None there, and 0 by the formula above
    ours = [torch.zeros_like(part) if grad is None else grad for grad, part in zip(ours, inputs, strict=True)]
    theirs = [torch.zeros_like(part) if grad is None else grad for grad, part in zip(theirs, inputs, strict=True)]
    torch.testing.assert_close(ours, theirs)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_term_has_its_gradient_in_half_precision(dtype):
    logits, target = torch.randn(2, 4096, 64).to(dtype).requires_grad_(), torch.randint(64, (4096,))
    exact = logits.detach().double().requires_grad_()
    for combine in COMBINATIONS.values():
        terms = rdrop_cross_entropy(logits, target, 4.0)
        found = gradient(65536 * combine(terms.loss, terms.ce, terms.kl), logits)
        expected = gradient(65536 * combine(*separately(exact, target, 4.0)), exact)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


@BOTH
def test_one_term_after_another():
    logits, target = torch.randn(2, 5, 7, dtype=torch.double, requires_grad=True), torch.randint(7, (5,))
    terms = rdrop_cross_entropy(logits, target, 4.0)
    found = [torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (terms.kl, terms.loss, terms.ce)]
    torch.testing.assert_close(found[1], found[2] + 4.0 * found[0])
    torch.testing.assert_close(gradient(terms.loss, logits), found[1])


@BOTH
def test_the_usual_backward_sweeps_once(monkeypatch):
    calls = []
    monkeypatch.setattr(Sweep, "over", lambda *a, real=Sweep.over: calls.append(1) or real(*a))
    logits, target = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (5,))
    terms = rdrop_cross_entropy(logits, target, 4.0)
    terms.loss.backward(retain_graph=True)
    assert calls == [1]
    terms.kl.backward()
    assert calls == [1, 1]


def test_terms_are_freed_without_the_garbage_collector():
    logits, target = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (5,))
    gc.collect()
    gc.disable()
    try:
        views = logits * 1
        alive = weakref.ref(views)
        terms = rdrop_cross_entropy(views, target, 4.0)
        terms.loss.backward(retain_graph=True)
        del views, terms
        assert alive() is None
    finally:
        gc.enable()


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 3000, None])
def test_the_head_in_float64(bias, smoothing, chunk):
    classes = 600
    hidden = torch.randn(2, 9, 5, dtype=torch.double, requires_grad=True)
    weight = torch.randn(classes, 5, dtype=torch.double, requires_grad=True)
    bias = torch.randn(classes, dtype=torch.double, requires_grad=True) if bias else None
    target = torch.randint(classes, (9,))
    target[4] = -100
    inputs = [part for part in (hidden, weight, bias) if part is not None]
    class_weight = torch.rand(classes, dtype=torch.double)
    terms = linear_rdrop_cross_entropy(
        hidden, weight, target, 3.0, bias=bias, label_smoothing=smoothing, class_weight=class_weight, chunk=chunk
    )
    expected = formula(F.linear(hidden, weight, bias), target, 3.0, label_smoothing=smoothing, weight=class_weight)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, inputs), torch.autograd.grad(expected, inputs))
    assert terms.prediction is None


@BOTH
def test_worked_out_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4), y = 0: ce = (ln 2 + ln 4/3) / 2; J = (1/4)(ln 3/4 - ln 1/4) = ln 3 / 4; kl = J / 4
    logits = torch.tensor([[[0.5, 0.5]], [[0.75, 0.25]]], dtype=torch.double).log().requires_grad_()
    terms = rdrop_cross_entropy(logits, torch.tensor([0]), 8.0)
    assert math.isclose(terms.ce, (math.log(2) + math.log(4 / 3)) / 2)
    assert math.isclose(terms.kl, math.log(3) / 16)
    # d = (ln 2/3, ln 2), a = ln(4/3)/2, b = ln(2/3) 3/4 + ln(2)/4; alpha / 4 = 2
    d, a = torch.tensor([math.log(2 / 3), math.log(2)]), math.log(4 / 3) / 2
    b = 0.75 * math.log(2 / 3) + 0.25 * math.log(2)
    p, q, y = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]), torch.tensor([1.0, 0.0])
    first = p * (0.5 + 2 * (1 + d - a)) - 2 * q - 0.5 * y
    second = q * (0.5 + 2 * (1 - d + b)) - 2 * p - 0.5 * y
    torch.testing.assert_close(gradient(terms.loss, logits).float(), torch.stack([first, second]).unsqueeze(1))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [15, 1000])
def test_identical_views_have_no_kl(dtype, classes):
    logits = torch.randn(1, 6, classes).to(dtype).expand(2, -1, -1).clone().requires_grad_()
    target = torch.randint(classes, (6,))
    terms = rdrop_cross_entropy(logits, target, 4.0)
    assert terms.kl == 0
    expected = gradient(F.cross_entropy(logits.double().flatten(0, 1), target.repeat(2)), logits)
    torch.testing.assert_close(gradient(terms.loss, logits), expected)


@BOTH
@pytest.mark.parametrize("classes", [7, 1000])
def test_kl_keeps_its_digits(classes):
    for j in (1e-2, 1e-4, 1e-6):
        logits = torch.randn(4, classes, dtype=torch.double)
        # J is about the variance under p of the difference of the logits
        logits = torch.stack([logits, logits + math.sqrt(j) * torch.randn_like(logits)]).float()
        terms = rdrop_cross_entropy(logits, torch.zeros(4, dtype=torch.long), 4.0)
        exact = rdrop_cross_entropy(logits.double(), torch.zeros(4, dtype=torch.long), 4.0)
        torch.testing.assert_close(terms.kl.double(), exact.kl, rtol=1e-3, atol=0)
        shifted = logits + torch.tensor([0.0, 10.0]).view(2, 1, 1)
        exact = rdrop_cross_entropy(shifted.double(), torch.zeros(4, dtype=torch.long), 4.0)
        terms = rdrop_cross_entropy(shifted, torch.zeros(4, dtype=torch.long), 4.0)
        torch.testing.assert_close(terms.kl.double(), exact.kl, rtol=1e-3, atol=0)


@BOTH
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 110.0), (torch.bfloat16, 100.0), (torch.float16, 20.0)])
def test_right_where_the_official_snippet_is_not_finite(dtype, gap):
    logits = torch.zeros(2, 3, 5, dtype=dtype)
    logits[0, :, 0], logits[1, :, 1] = gap, gap
    target = torch.tensor([0, 1, 2])
    logits.requires_grad_()
    official = reference.official_kl(logits[0], logits[1])
    assert not gradient(official, logits).isfinite().all()
    exact = logits.detach().double().requires_grad_()
    ours = gradient(rdrop_cross_entropy(logits, target, 4.0).loss, logits)
    torch.testing.assert_close(ours.double(), gradient(formula(exact, target, 4.0), exact), rtol=1e-2, atol=1e-6)


@BOTH
def test_nothing_counts():
    for classes in (7, 600):
        logits = torch.randn(2, 3, classes, requires_grad=True)
        terms = rdrop_cross_entropy(
            logits, torch.full((3,), -100), 4.0, label_smoothing=0.1, weight=torch.rand(classes)
        )
        assert terms.loss == terms.ce == terms.kl == terms.rows == 0
        assert not gradient(terms.loss, logits).any()


@BOTH
def test_a_row_that_does_not_count_may_hold_anything():
    logits, target = torch.randn(2, 3, 4), torch.tensor([1, -100, 2])
    logits[0, 1, 0] = -torch.inf  # label 0 stands in for the row, and only one view masks it
    terms = rdrop_cross_entropy(logits, target, 4.0)
    counted = rdrop_cross_entropy(logits[:, [0, 2]], target[[0, 2]], 4.0)
    torch.testing.assert_close((terms.loss, terms.ce, terms.kl), (counted.loss, counted.ce, counted.kl))


def loss_of_views(logits, target):
    return rdrop_cross_entropy(logits, target, 4.0).loss


@pytest.mark.parametrize("junk", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("way", [loss_of_views, torch.func.functionalize(loss_of_views)], ids=["eager", "transformed"])
def test_no_gradient_comes_from_a_row_that_does_not_count(junk, views, soft, way):
    logits = torch.randn(views, 4, 5, dtype=torch.double)
    logits[0, 1, 0] = junk
    logits.requires_grad_()
    target = torch.tensor([0, -100, 3, 4])
    if soft:
        target = F.one_hot(target.clamp(min=0), 5).double()
        target[1] = 0
    (found,) = torch.autograd.grad(way(logits, target), logits)
    rows = logits.detach()[:, [0, 2, 3]].requires_grad_()
    expected = gradient(rdrop_cross_entropy(rows, torch.tensor([0, 3, 4]), 4.0).loss, rows)
    torch.testing.assert_close(found[:, [0, 2, 3]], expected)
    assert not found[:, 1].any()


def test_no_gradient_comes_from_a_row_that_does_not_count_when_compiled():
    torch._dynamo.reset()
    logits, target = torch.randn(2, 4, 5), torch.tensor([0, -100, 3, 4])
    logits[0, 1, 0] = -math.inf
    logits.requires_grad_()
    found = gradient(torch.compile(loss_of_views, backend="aot_eager", fullgraph=True)(logits, target), logits)
    torch.testing.assert_close(found, gradient(loss_of_views(logits, target), logits))
    assert found.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("padding", [0.0, -100.0])
def test_rows_of_probabilities_that_do_not_count(smoothing, padding):
    logits, target = torch.randn(2, 5, 7, dtype=torch.double), torch.rand(5, 7, dtype=torch.double).softmax(-1)
    target[[1, 3]] = padding
    weight = torch.rand(7, dtype=torch.double)
    arguments = {"label_smoothing": smoothing, "weight": weight}
    terms = rdrop_cross_entropy(logits, target, 4.0, **arguments)
    expected = rdrop_cross_entropy(logits[:, [0, 2, 4]], target[[0, 2, 4]], 4.0, **arguments)
    torch.testing.assert_close((terms.loss, terms.ce, terms.kl), (expected.loss, expected.ce, expected.kl))
    ce = F.cross_entropy(logits[:, [0, 2, 4]].flatten(0, 1), target[[0, 2, 4]].repeat(2, 1), **arguments)
    torch.testing.assert_close(terms.ce, ce)
    assert terms.rows == 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_in_several_chunks_where_every_row_counts(smoothing):
    logits = torch.randn(2, 50, 7, dtype=torch.double, requires_grad=True)
    target, weight = torch.randint(7, (50,)), torch.rand(7, dtype=torch.double)
    terms = rdrop_cross_entropy(logits, target, 4.0, weight=weight, label_smoothing=smoothing, chunk=100)
    expected = formula(logits, target, 4.0, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(gradient(terms.loss, logits), gradient(expected, logits))
    hidden = torch.randn(2, 50, 3, dtype=torch.double, requires_grad=True)
    head = torch.randn(7, 3, dtype=torch.double, requires_grad=True)
    arguments = {"class_weight": weight, "label_smoothing": smoothing, "chunk": 100}
    terms = linear_rdrop_cross_entropy(hidden, head, target, 4.0, **arguments)
    expected = formula(hidden @ head.T, target, 4.0, weight=weight, label_smoothing=smoothing)
    ours, theirs = (torch.autograd.grad(loss, (hidden, head)) for loss in (terms.loss, expected))
    torch.testing.assert_close(ours, theirs)
    images, labels = logits.detach()[..., None].expand(2, 50, 7, 3000), target[:, None].expand(50, 3000)
    segmented = RDropLoss(Categorical(class_dim=1, weight=weight))(images, labels, 4.0)
    torch.testing.assert_close(segmented.loss, formula(logits, target, 4.0, weight=weight))


def test_the_chunks_of_a_chunk_of_the_head_have_their_own_labels(monkeypatch):
    monkeypatch.setattr(sweep, "_CACHED", 2 * 7 * 3)  # three rows at a time, of the ten that the head holds
    hidden = torch.randn(2, 25, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    target = torch.randint(7, (25,))
    target[11] = -100
    terms = linear_rdrop_cross_entropy(hidden, weight, target, 4.0, chunk=2 * 7 * 10)
    expected = formula(hidden @ weight.T, target, 4.0)
    torch.testing.assert_close(terms.loss, expected)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (terms.loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_of_every_integer_type(views, dtype):
    logits, target = torch.randn(views, 4, 200), torch.tensor([0, 3, 100, 127])
    expected = rdrop_cross_entropy(logits, target, 4.0).loss
    assert rdrop_cross_entropy(logits, target.to(dtype), 4.0).loss == expected
    assert RDropLoss()(logits, target.to(dtype), 4.0).loss == expected
    assert Categorical().to_target(logits[0], target.to(dtype)).mean == F.cross_entropy(logits[0], target)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_class_156_of_uint8_is_not_the_padding(views):
    logits, target = torch.randn(views, 2, 200), torch.tensor([156, 156], dtype=torch.uint8)
    assert (target == -100).all()  # which is what torch makes of the comparison
    for terms in (rdrop_cross_entropy(logits, target, 4.0), RDropLoss()(logits, target, 4.0)):
        assert terms.rows == 2
        torch.testing.assert_close(terms.ce, F.cross_entropy(logits.flatten(0, 1), target.long().repeat(views)))
    assert Categorical().counted(logits[0], target).all()
    assert Categorical().between(logits[0], logits[0], target).weight == 2


@BOTH
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("classes", [3, 600])
def test_views_are_infinitely_far_where_one_masks_a_class(views, classes):
    """Also where the probability of the class underflows in the other: 0 * inf is no NaN."""
    logits = torch.zeros(views, 1, classes)
    logits[0, 0, 1], logits[1:, 0, 1] = -math.inf, -200.0
    terms = rdrop_cross_entropy(logits, torch.tensor([0]), 4.0)
    assert terms.kl == terms.loss == math.inf
    assert terms.ce.isfinite()
    logits[0, 0, 2] = math.nan
    assert rdrop_cross_entropy(logits, torch.tensor([0]), 4.0).kl.isnan()


@BOTH
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("alpha", [0, 0.0])
def test_alpha_0_switches_kl_off_however_far_the_views_are(views, alpha):
    logits, target = torch.randn(views, 4, 5, dtype=torch.double), torch.tensor([0, 1, 2, 3])
    logits[0, 2, 4] = -math.inf
    logits.requires_grad_()
    terms = rdrop_cross_entropy(logits, target, alpha)
    assert terms.kl == math.inf
    ce = F.cross_entropy(logits.flatten(0, 1), target.repeat(views))
    torch.testing.assert_close((terms.loss, terms.ce), (ce, ce))
    for found, times in ((terms.loss, 1.0), (terms.ce, 1.0), (terms.loss + 0.5 * terms.ce, 1.5)):
        ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, times * ce))
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        terms.loss += 1
    torch.testing.assert_close(terms.ce, ce)


@BOTH
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_again(leaf, scale):
    def run(loss_of):
        start = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logits = start if leaf else start.view(2, 5, 7)
        loss = scale * loss_of(logits)
        found = []
        for kept in (True, True, False):
            loss.backward(retain_graph=kept)
            found.append(start.grad.clone())
        return found

    target = torch.randint(7, (5,))
    ours = run(lambda logits: rdrop_cross_entropy(logits, target, 4.0).loss)
    torch.testing.assert_close(ours, run(lambda logits: composite(logits, target, 4.0)))
    torch.testing.assert_close(ours[2], 3 * ours[0])


def test_two_losses_of_the_same_logits():
    logits, target = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (5,))
    loss = rdrop_cross_entropy(logits, target, 4.0).loss + rdrop_cross_entropy(logits, target, 1.0).loss
    loss.backward()
    expected = composite(logits, target, 4.0) + composite(logits, target, 1.0)
    torch.testing.assert_close(logits.grad, gradient(expected, logits))


@BOTH
def test_second_derivatives():
    target = torch.randint(4, (3,))
    logits = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    alpha = torch.tensor(3.0, dtype=torch.double, requires_grad=True)

    def loss(z, a):
        terms = rdrop_cross_entropy(z, target, a, label_smoothing=0.1, chunk=8)
        return terms.loss, terms.ce, terms.kl

    assert torch.autograd.gradcheck(loss, (logits, alpha))
    assert torch.autograd.gradgradcheck(loss, (logits, alpha))
    hidden = torch.randn(2, 3, 2, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 2, dtype=torch.double, requires_grad=True)
    bias = torch.randn(4, dtype=torch.double, requires_grad=True)

    def head(h, w, b, a):
        terms = linear_rdrop_cross_entropy(h, w, target, a, bias=b, chunk=8)
        return terms.loss, terms.ce, terms.kl

    assert torch.autograd.gradcheck(head, (hidden, weight, bias, alpha))
    assert torch.autograd.gradgradcheck(head, (hidden, weight, bias, alpha))


def test_function_transforms():
    logits, target = torch.randn(2, 3, 4, dtype=torch.double), torch.randint(4, (3,))

    def loss(z):
        return rdrop_cross_entropy(z, target, 4.0).loss

    expected = gradient(composite(start := logits.clone().requires_grad_(), target, 4.0), start)
    torch.testing.assert_close(torch.func.grad(loss)(logits), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(logits.expand(5, 2, 3, 4))[3], expected)
    torch.testing.assert_close(torch.func.hessian(loss)(logits), torch.autograd.functional.hessian(loss, logits))


def test_batched_gradients():
    start, target = torch.randn(2, 3, 4, requires_grad=True), torch.randint(4, (3,))
    loss = rdrop_cross_entropy(start, target, 4.0).loss
    (found,) = torch.autograd.grad(loss, start, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(found[1], 2 * found[0])
    torch.testing.assert_close(found[0], gradient(composite(start, target, 4.0), start))
    terms = rdrop_cross_entropy(start, target, 4.0)
    weights = (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    (found,) = torch.autograd.grad((terms.ce, terms.kl), start, weights, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(term, start, retain_graph=True)[0] for term in (terms.ce, terms.kl)]
    torch.testing.assert_close(found, torch.stack(each))


def test_compile_takes_one_graph_for_all_alphas():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(logits, target, alpha):
        return rdrop_cross_entropy(logits, target, alpha).loss

    logits, target = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (5,))
    for alpha in (1.0, 2.0, 3.0, 4.0):
        found = loss(logits, target, alpha)
        torch.testing.assert_close(found, composite(logits, target, alpha))
        torch.testing.assert_close(gradient(found, logits), gradient(composite(logits, target, alpha), logits))
    assert counter.frame_count <= 2


def test_no_grad_and_inference():
    logits, target = torch.randn(2, 5, 7), torch.randint(7, (5,))
    expected = composite(logits, target, 4.0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(rdrop_cross_entropy(logits, target, 4.0).loss, expected)
    assert not rdrop_cross_entropy(logits, target, 4.0).loss.requires_grad


@BOTH
def test_autocast():
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    target = torch.randint(300, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        terms = rdrop_cross_entropy(logits, target, 4.0)
        fused = linear_rdrop_cross_entropy(hidden, weight, target, 4.0)
    expected = formula(logits, target, 4.0)
    torch.testing.assert_close((terms.loss.double(), fused.loss.double()), (expected, expected), rtol=1e-5, atol=0)
    exact = torch.autograd.grad(formula(F.linear(hidden, weight), target, 4.0), (hidden, weight))
    for loss in (terms.loss, fused.loss):
        found = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert found[1].dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * float(exact[1].abs().max()))


@BOTH
def test_float16_gradients_do_not_vanish():
    """A mean over many rows has gradients of 1e-8 and less, which a GradScaler lifts only on the way back."""
    logits = torch.randn(2, 4096, 64).half().requires_grad_()
    target = torch.randint(64, (4096,))
    (65536 * rdrop_cross_entropy(logits, target, 4.0).loss).backward()
    exact = logits.detach().double().requires_grad_()
    (65536 * formula(exact, target, 4.0)).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2e-3, atol=1e-5)


@BOTH
def test_frozen_and_tied_weights():
    embedding = nn.Embedding(50, 8)
    tokens, target = torch.randint(50, (2, 5)), torch.randint(50, (5,))
    linear_rdrop_cross_entropy(embedding(tokens), embedding.weight, target, 4.0).loss.backward()
    found, embedding.weight.grad = embedding.weight.grad, None
    composite(embedding(tokens) @ embedding.weight.T, target, 4.0).backward()
    torch.testing.assert_close(found, embedding.weight.grad)
    hidden, frozen = torch.randn(2, 5, 8, requires_grad=True), torch.randn(50, 8)
    linear_rdrop_cross_entropy(hidden, frozen, target, 4.0).loss.backward()
    torch.testing.assert_close(hidden.grad, gradient(composite(hidden @ frozen.T, target, 4.0), hidden))
    assert frozen.grad is None


@pytest.mark.parametrize("views", [1, 3])
def test_other_numbers_of_views(views):
    logits, target = torch.randn(views, 5, 7, dtype=torch.double, requires_grad=True), torch.randint(7, (5,))
    terms = rdrop_cross_entropy(logits, target, 4.0)
    pairs = [(j, k) for j in range(views) for k in range(j)]
    each = [formula(logits[[j, k]], target, 4.0) for j, k in pairs] or [formula(logits[[0, 0]], target, 4.0)]
    torch.testing.assert_close(terms.loss, torch.stack(each).mean())
    hidden, weight = torch.randn(views, 5, 3, dtype=torch.double), torch.randn(7, 3, dtype=torch.double)
    expected = rdrop_cross_entropy(hidden @ weight.T, target, 4.0).loss
    torch.testing.assert_close(linear_rdrop_cross_entropy(hidden, weight, target, 4.0).loss, expected)


def test_class_probabilities():
    logits, target = torch.randn(2, 5, 7, dtype=torch.double), torch.rand(5, 7, dtype=torch.double).softmax(-1)
    terms = rdrop_cross_entropy(logits, target, 4.0)
    torch.testing.assert_close(terms.ce, -(target * logits.log_softmax(-1)).sum(-1).mean())
    torch.testing.assert_close(terms.kl, rdrop_cross_entropy(logits, torch.zeros(5, dtype=torch.long), 4.0).kl)


@BOTH
def test_memory_that_is_not_in_a_row():
    logits = torch.randn(7, 5, 2, requires_grad=True)
    target = torch.randint(7, (10,))[::2]
    terms = rdrop_cross_entropy(logits.permute(2, 1, 0), target, 4.0, chunk=28)
    expected = composite(logits.permute(2, 1, 0).contiguous(), target, 4.0)
    torch.testing.assert_close(gradient(terms.loss, logits), gradient(expected, logits))


class Counting(Categorical):
    def between(self, first, second, target=None):
        raise RuntimeError("asked")


def test_loss_takes_the_fast_path_where_it_applies(monkeypatch):
    calls = []
    monkeypatch.setattr(Sweep, "over", lambda *a, real=Sweep.over: calls.append(1) or real(*a))
    images, labels = torch.randn(2, 3, 7, 4, 5), torch.randint(7, (3, 4, 5))
    images[:, 0] = 0
    terms = RDropLoss(Categorical(class_dim=1))(images, labels, 4.0)
    assert calls == [1]
    assert terms.prediction.shape == (3, 7, 4, 5)
    flat = images.movedim(2, -1).reshape(2, -1, 7)
    torch.testing.assert_close(terms.loss, composite(flat, labels.flatten(), 4.0))
    RDropLoss(JensenShannon(class_dim=1))(images, labels, 4.0)
    assert calls == [1]
    with pytest.raises(RuntimeError, match="asked"):
        RDropLoss(Counting(class_dim=1))(images, labels, 4.0)


HIDDEN, WEIGHT, LOGITS, TARGET = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(2, 3, 5), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rdrop_cross_entropy(LOGITS[0], TARGET, 4.0), ValueError, r"logits must be floats .*got \(3, 5\)"),
        (lambda: rdrop_cross_entropy(LOGITS[..., :1], TARGET, 4.0), ValueError, "at least 2 classes"),
        (lambda: rdrop_cross_entropy(LOGITS, TARGET[:2], 4.0), ValueError, r"target must be .*got \(2,\)"),
        (lambda: rdrop_cross_entropy(LOGITS, TARGET.float(), 4.0), ValueError, "target must be class indices"),
        (lambda: rdrop_cross_entropy(LOGITS, TARGET, 4.0, label_smoothing=1.0), ValueError, "label_smoothing must"),
        (lambda: rdrop_cross_entropy(LOGITS, TARGET, 4.0, weight=torch.ones(4)), ValueError, r"class weight .*\(5,\)"),
        (lambda: rdrop_cross_entropy(LOGITS, [0, 1, 2], 4.0), TypeError, "target must be a tensor, got a list"),
        (
            lambda: linear_rdrop_cross_entropy(HIDDEN, WEIGHT, [0], 4.0),
            TypeError,
            "target must be a tensor, got a list",
        ),
        (
            lambda: rdrop_cross_entropy(LOGITS, TARGET, 4.0, weight=torch.ones(5, requires_grad=True)),
            ValueError,
            r"class weight requires a gradient.*detach\(\)",
        ),
        (lambda: rdrop_cross_entropy(LOGITS[[0, 0, 0]], TARGET, 4.0, chunk=0), ValueError, "chunk must be an int >= 1"),
        (lambda: rdrop_cross_entropy(LOGITS, TARGET, 4.0, chunk=0), ValueError, "chunk must be an int >= 1.*got 0"),
        (lambda: linear_rdrop_cross_entropy(HIDDEN, WEIGHT.T, TARGET, 4.0), ValueError, "hidden must have the shape"),
        (lambda: linear_rdrop_cross_entropy(HIDDEN, WEIGHT, TARGET, 4.0, bias=TARGET), ValueError, "bias must have"),
        (lambda: linear_rdrop_cross_entropy(HIDDEN, WEIGHT, LOGITS[0], 4.0), ValueError, "target must be class ind"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture
def nobody_waits():
    """A context in which waiting for the device is an error."""

    @contextmanager
    def context():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 0}, {"weight": torch.rand(1000)}], ids=lambda o: [*o]
)
@pytest.mark.parametrize("views", [2, 3])
def test_on_a_gpu(options, compile, views, nobody_waits):
    logits, target = torch.randn(views, 300, 1000, requires_grad=True), torch.randint(1000, (300,))
    there, labels = logits.detach().cuda().requires_grad_(), target.cuda()
    moved = {name: option.cuda() if isinstance(option, torch.Tensor) else option for name, option in options.items()}
    moved |= {"chunk": 10**5, "compile": compile}
    rdrop_cross_entropy(there, labels, 4.0, **moved)  # a compiler may wait
    with nobody_waits():
        rdrop_cross_entropy(there, labels, 4.0, **moved).loss.backward()
    expected = rdrop_cross_entropy(logits, target, 4.0, **options).loss
    torch.testing.assert_close(there.grad.cpu(), gradient(expected, logits), rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_on_a_gpu(dtype, compile, nobody_waits):
    inputs = [
        torch.randn(2, 300, 64, dtype=dtype),
        torch.randn(1000, 64, dtype=dtype) / 8,
        torch.randn(1000, dtype=dtype),
    ]
    target = torch.randint(1000, (300,))
    there, labels = [part.cuda().requires_grad_() for part in inputs], target.cuda()

    def loss():
        hidden, weight, bias = there
        options = {"bias": bias, "chunk": 10**5, "compile": compile}
        return linear_rdrop_cross_entropy(hidden, weight, labels, 4.0, **options).loss

    loss()
    with nobody_waits():
        found = torch.autograd.grad(loss(), there)
    wide = [part.double().requires_grad_() for part in inputs]
    expected = torch.autograd.grad(composite(F.linear(*wide), target, 4.0), wide)
    for one, other in zip(found, expected, strict=True):
        error = (one.cpu() - other).norm() / other.norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.02)


def test_the_gradient_of_alpha_alone():
    """alpha may be learned where the network is not."""
    z, target, alpha = torch.randn(2, 6, 5), torch.arange(6) % 5, torch.tensor(4.0, requires_grad=True)
    terms = rdrop_cross_entropy(z, target, alpha)
    (slope,) = torch.autograd.grad(terms.loss, alpha, retain_graph=True)
    torch.testing.assert_close(slope, terms.kl)
    z.requires_grad_()
    terms = rdrop_cross_entropy(z, target, alpha)
    assert torch.autograd.grad(terms.ce, alpha, create_graph=True, allow_unused=True)[0] is None


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.0])
def test_a_loss_that_is_scaled(factor):
    z, target = torch.randn(2, 6, 5, requires_grad=True), torch.arange(6) % 5
    expected = factor * gradient(composite(z, target, 4.0), z)
    (factor * rdrop_cross_entropy(z, target, 4.0).loss).backward()  # the graph is not kept
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2)])
def test_a_part_of_the_head_is_trained_alone(trained):
    inputs = [torch.randn(2, 6, 4), torch.randn(5, 4), torch.randn(5)]
    for number in trained:
        inputs[number].requires_grad_()
    hidden, weight, bias = inputs
    target = torch.arange(6) % 5
    expected = composite(F.linear(hidden, weight, bias), target, 4.0)
    found = linear_rdrop_cross_entropy(hidden, weight, target, 4.0, bias=bias).loss
    sources = [inputs[number] for number in trained]
    torch.testing.assert_close(torch.autograd.grad(found, sources), torch.autograd.grad(expected, sources))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_where_no_row_counts_the_gradient_is_zero(dtype):
    z = torch.randn(2, 4, 5, dtype=dtype, requires_grad=True)
    terms = rdrop_cross_entropy(z, torch.full((4,), -100), 4.0)
    terms.loss.backward()
    assert terms.loss == 0
    assert not z.grad.any()


def test_no_rows_at_all():
    z = torch.zeros(2, 0, 5, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long)
    hidden, weight = torch.zeros(2, 0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    for terms, source in (
        (rdrop_cross_entropy(z, target, 4.0), z),
        (linear_rdrop_cross_entropy(hidden, weight, target, 4.0), weight),
    ):
        assert terms.loss == 0
        assert not gradient(terms.loss, source).any()


def test_two_classes_are_enough_and_one_is_not():
    hidden, weight, target = torch.randn(2, 6, 4), torch.randn(2, 4), torch.arange(6) % 2
    expected = composite(hidden @ weight.T, target, 4.0)
    torch.testing.assert_close(linear_rdrop_cross_entropy(hidden, weight, target, 4.0).loss, expected)
    torch.testing.assert_close(RDropLoss()(hidden @ weight.T, target, 4.0).loss, expected)
    with pytest.raises(ValueError, match="at least 2 classes C"):
        linear_rdrop_cross_entropy(hidden, weight[:1], target * 0, 4.0)


@pytest.mark.parametrize("smoothing", [-0.5, 1.0])
def test_a_label_smoothing_out_of_its_range(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        rdrop_cross_entropy(torch.randn(2, 3, 5), torch.arange(3), 4.0, label_smoothing=smoothing)
