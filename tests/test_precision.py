"""kl in every precision that Lightning trains in, against the formula in float64 on the same logits."""

import pytest
import pytorch_lightning as pl
import torch
from conftest import Small
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import AlphaScheduler, Bernoulli, Gaussian
from tests.networks import training_outputs

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
    "16-mixed": torch.float16,
}


def categorical(first, second):
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 4


def bernoulli(first, second):
    p, q = (torch.stack([F.logsigmoid(view), F.logsigmoid(-view)], -1) for view in (first, second))
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 4


def gaussian(first, second):
    return (first - second).square().mean() / 2


CASES = {
    "two views": ({}, categorical),
    "three views": ({"rdrop_views": 3}, categorical),
    "separate passes": ({"rdrop_passes": "separate"}, categorical),
    "Bernoulli": ({"rdrop_distance": Bernoulli()}, bernoulli),
    "Gaussian": ({"rdrop_distance": Gaussian()}, gaussian),
}


class Watch(pl.Callback):
    """The predictions of each step as the network made them, and the kl that the step made of them."""

    def __init__(self):
        self.predictions, self.steps = [], []

    def on_fit_start(self, trainer, pl_module):
        self.predictions = training_outputs(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rows = torch.cat(self.predictions).detach()
        self.steps.append((rows.dtype, rows.double().unflatten(0, (-1, len(batch[1]))), outputs["kl"], outputs["loss"]))
        self.predictions.clear()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=pytest.mark.gpu if name == "16-mixed" else ()) for name in DTYPES]
)
def test_kl_is_that_of_the_logits(fit, rows, precision, case):
    arguments, formula = CASES[case]
    if "rdrop_distance" in arguments:
        rows = DataLoader([(x, F.one_hot(y, 3).float()) for x, y in rows], batch_size=None)
    watch, device = Watch(), "gpu" if precision == "16-mixed" else "cpu"
    module = Small(**arguments)
    before = module.network[0].weight.detach().clone()
    fit(module, rows, [watch, AlphaScheduler(ramp=4)], precision=precision, accelerator=device)
    assert (module.network[0].weight != before.to(module.network[0].weight)).any()
    assert len(watch.steps) == 8
    for dtype, views, kl, loss in watch.steps:
        pairs = [(j, k) for k in range(len(views)) for j in range(k)]
        expected = sum(formula(views[j], views[k]) for j, k in pairs) / len(pairs)
        assert dtype == DTYPES[precision]
        assert kl.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.isfinite()
        torch.testing.assert_close(kl.double(), expected, rtol=0.01 if dtype.itemsize < 4 else 1e-3, atol=0)


def test_a_step_under_an_autocast_of_ones_own_has_gradients():
    """The passes with which the guard looks at the first batch leave no weight behind that was cast without them."""
    module = Small()
    with torch.autocast("cpu", torch.bfloat16):
        terms = module.rdrop_step((torch.randn(6, 8), torch.arange(6) % 3))
    terms.loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
