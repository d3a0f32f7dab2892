"""The loss by what a compiler makes of its arithmetic, on request and inside a step that is compiled as a whole.

The pure functions themselves are tested beside the eager ones, in test_cross_entropy.py. A graph takes seconds to
compile, so there are few kinds of chunks here, and many cases of each.
"""

import shutil
import warnings

import pytest
import torch
from jsonargparse import ArgumentParser
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_rdrop import (
    Categorical,
    MaskedConsistency,
    RDropLoss,
    Together,
    Weighted,
    cross_entropy,
    linear_rdrop_cross_entropy,
    rdrop_cross_entropy,
)
from lightning_rdrop._fused import compiled, function, sweep
from lightning_rdrop.composite import composite
from lightning_rdrop.labels import Labels
from lightning_rdrop.modules import Classifier

NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
CLASSES = 33


@pytest.fixture(autouse=True)
def _nothing_is_too_few(monkeypatch):
    monkeypatch.setattr(sweep, "_FEW", 0)
    monkeypatch.setattr(compiled, "_COMPILED", {})


@pytest.fixture
def graphs():
    """How many graphs have been compiled; a fallback is an error."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The loss could not be compiled")
        start = counters["stats"]["unique_graphs"]
        yield lambda: counters["stats"]["unique_graphs"] - start


def example(rows, dtype=torch.float32, seed=0, ignored=(1,)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, CLASSES, generator=generator)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    target[[*ignored]] = -100
    return logits.to(dtype).requires_grad_(), target


def exact(logits, target, alpha, **arguments):
    return composite(logits.double(), target, alpha, Labels(**arguments))


def gradient(loss, of, **arguments):
    return torch.autograd.grad(loss, of, **arguments)[0]


@NEEDS_COMPILER
def test_one_graph_for_any_number_of_rows_any_alpha_any_chunk_and_a_head(graphs):
    for seed, (rows, chunk) in enumerate(
        [(40, None), (7, None), (7, 2 * CLASSES * 3), (8, 2 * CLASSES * 4), (2, None)]
    ):
        logits, target = example(rows, seed=seed)
        with torch.no_grad():
            logits[:, :, 5] = -torch.inf  # a class that is masked
            logits[0, 1] = torch.nan  # in a row that does not count
            logits[1, 0] *= 100
        target[target == 5] = 6
        alpha = torch.tensor(2.0) if seed == 1 else float(seed)  # also 0
        found, expected = (
            rdrop_cross_entropy(logits, target, alpha, chunk=chunk, compile=True),
            exact(logits, target, alpha),
        )
        torch.testing.assert_close(
            (found.loss.double(), found.kl.double()), (expected.loss, expected.kl), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(gradient(found.loss, logits), gradient(expected.loss, logits), rtol=1e-4, atol=1e-6)
    assert graphs() == 1
    hidden, weight = torch.randn(2, 9, 4, requires_grad=True), torch.randn(CLASSES, 4, requires_grad=True)
    target = example(9)[1]
    found = linear_rdrop_cross_entropy(hidden, weight, target, 4.0, chunk=2 * CLASSES * 4, compile=True)
    expected = exact(F.linear(hidden, weight), target, 4.0)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (found.loss, expected.loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert graphs() == 1


@NEEDS_COMPILER
def test_every_term_with_smoothing_and_class_weights(graphs):
    arguments = {"label_smoothing": 0.1, "weight": torch.rand(CLASSES, dtype=torch.double)}
    logits, target = example(9, torch.double)
    alpha = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    found = rdrop_cross_entropy(logits, target, alpha, chunk=2 * CLASSES * 4, compile=True, **arguments)
    expected = exact(logits, target, alpha, **arguments)
    for name in ("loss", "ce", "kl", "loss"):  # again and again
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            gradient(ours, logits, retain_graph=True), gradient(theirs, logits, retain_graph=True)
        )
    torch.testing.assert_close(gradient(found.loss, alpha, retain_graph=True), found.kl)
    slope, wanted = (gradient(terms.loss, logits, create_graph=True) for terms in (found, expected))
    torch.testing.assert_close(gradient(slope.square().sum(), logits), gradient(wanted.square().sum(), logits))
    assert graphs() == 1


@NEEDS_COMPILER
def test_half_precision(graphs):
    logits, target = example(4096, torch.float16, ignored=())
    loss = rdrop_cross_entropy(logits, target, 4.0, compile=True).loss
    wide = logits.detach().double().requires_grad_()
    found, expected = gradient(65536 * loss, logits), gradient(65536 * exact(wide, target, 4.0).loss, wide)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-5)
    assert graphs() == 1


def test_without_a_compiler_it_falls_back_with_one_warning(monkeypatch):
    def broken():
        raise RuntimeError("no g++")

    monkeypatch.setattr(compiled, "_compiled", broken)
    logits, target = example(9)
    with pytest.warns(UserWarning, match="could not be compiled and is computed in eager mode: no g\\+\\+"):
        terms = rdrop_cross_entropy(logits, target, 4.0, compile=True)
    assert torch.equal(gradient(terms.loss, logits), gradient(rdrop_cross_entropy(logits, target, 4.0).loss, logits))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rdrop_cross_entropy(logits, target, 4.0, compile=True)


@pytest.fixture
def asked(monkeypatch):
    """The shapes of the chunks that are to be computed by compiled arithmetic."""
    shapes = []
    monkeypatch.setattr(sweep, "compiled", lambda logits, *_: shapes.append(tuple(logits.shape)))  # None: not compiled
    return shapes


def test_few_logits_are_not_worth_a_call(asked, monkeypatch):
    monkeypatch.setattr(sweep, "_FEW", 2 * 10 * CLASSES)
    for rows in (9, 10):
        rdrop_cross_entropy(*example(rows), 4.0, compile=True)
    assert asked == [(2, 10, CLASSES)]
    logits, target = example(20)  # no gradient to write
    rdrop_cross_entropy(logits.detach(), target, 4.0, compile=True)
    assert len(asked) == 1


def test_it_is_asked_for_by_the_loss_and_the_module(asked, small):
    (logits, target), weight = example(9), torch.rand(9)
    both = Together({"a": Categorical(), "b": Categorical()})
    RDropLoss(both, compile=True)({"a": logits, "b": logits}, {"a": target, "b": target}, 4.0)
    RDropLoss(Weighted(MaskedConsistency(Categorical())), compile=True)(logits, ((target, weight > 0), weight), 4.0)
    assert asked == [(2, 9, CLASSES)] * 3
    RDropLoss()(logits, target, 4.0)
    small().rdrop_step((torch.randn(4, 8), torch.arange(4) % 3))
    assert len(asked) == 3
    module = small(rdrop_compile_loss=True)
    terms = module.rdrop_step((torch.randn(4, 8), torch.arange(4) % 3))
    assert asked[3:] == [(2, 4, 3)]
    terms.kl.backward()  # another sweep, after the context of the first
    assert asked[4:] == [(2, 4, 3)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_inside_a_compiled_step_there_is_no_graph_of_the_formula(monkeypatch, smoothing):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    arguments = {"label_smoothing": smoothing, "weight": torch.rand(CLASSES).double() if smoothing else None}

    @torch.compile(backend=counter, fullgraph=True)
    def step(logits, target, alpha):
        terms = rdrop_cross_entropy(logits, target, alpha, **arguments)
        return terms.loss, terms.loss + 0.5 * terms.kl - 2 * terms.ce

    monkeypatch.delattr(cross_entropy, "composite")
    for alpha in (torch.tensor(3.0), torch.tensor(5.0)):
        logits, target = example(9, torch.double)
        with torch.no_grad():
            logits[0, 1] = torch.nan  # in a row that does not count
        loss, mixed = step(logits, target, alpha)
        terms = exact(logits, target, alpha, **arguments)
        expected = terms.loss + 0.5 * terms.kl - 2 * terms.ce
        torch.testing.assert_close((loss, mixed), (terms.loss, expected))
        torch.testing.assert_close(gradient(loss + mixed, logits), gradient(terms.loss + expected, logits))
    assert counter.frame_count == 1


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_is_one_graph_of_a_compiled_step(compile):
    torch._dynamo.reset()
    logits, target = example(9)
    loss = RDropLoss(compile=compile)
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, target, 4.0).loss
    torch.testing.assert_close(found, loss.distance.terms(logits, target, 4.0).loss)


def test_the_command_line_can_ask_for_it():
    parser = ArgumentParser()
    parser.add_class_arguments(Classifier, "model")
    assert parser.get_defaults().model.rdrop_compile_loss is False


def test_what_a_compiled_step_keeps_for_its_backward_pass():
    """The logits, and a few numbers a row: no other floats that are as many."""
    kept = []
    logits, target = example(50)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        step = torch.compile(
            lambda z: rdrop_cross_entropy(z, target, 4.0).loss, backend="aot_eager_decomp_partition", fullgraph=True
        )
        step(logits)
    assert [tensor.shape for tensor in kept if tensor.is_floating_point() and tensor.numel() > 50] == [logits.shape]


def test_the_number_of_rows_may_be_one_in_the_last_chunk(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled._write)
    logits, target = example(7)
    terms = rdrop_cross_entropy(logits, target, 4.0, chunk=2 * CLASSES * 3, compile=True)
    torch.testing.assert_close(terms.loss.double(), exact(logits, target, 4.0).loss, rtol=1e-5, atol=0)


def test_weighted_rows_go_through_the_sweep(monkeypatch):
    calls = []
    monkeypatch.setattr(function.Sweep, "over", lambda *a, real=function.Sweep.over: calls.append(1) or real(*a))
    logits, target = example(9, torch.double)
    weight = torch.rand(9)
    RDropLoss(Weighted(Categorical()))(logits, (target, weight), 4.0)
    RDropLoss(MaskedConsistency(Categorical()))(logits, (target, weight > 0.5), 4.0)
    assert len(calls) == 2
