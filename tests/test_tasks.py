"""Each task as a Trainer runs it: loss and gradient are the formula written out, in one process and in two."""

import os
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from reference import both_ways
from test_strategies import Noise
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.recipes.crf import CRF
from lightning_rdrop import CTC, Categorical, Focal, MaskedConsistency, RDropMixin, Together, Weighted

ALPHA, LR = 2.0, 0.5
LENGTHS = torch.tensor([6, 6, 5, 5, 3, 3, 4, 4])
"""Alike in pairs, so that the rows of two ranks, every other example, are equally many."""


def generator():
    return torch.Generator().manual_seed(3)


INSIDE = torch.arange(6) < LENGTHS[:, None]
X = torch.randn(8, 6, 8, generator=generator(), dtype=torch.float64)
TAGS = torch.randint(4, (8, 6), generator=generator()).where(INSIDE, -100)
INTENT = torch.randint(4, (8,), generator=generator())
LABELS = TAGS.where(torch.arange(6) % 3 == 1, -100)
WEIGHT = torch.tensor([1.0, 1.0, 0.25, 0.25, 3.0, 3.0, 0.0, 0.0], dtype=torch.float64)
TOKENS = torch.tensor([[1, 2], [2, 1], [3, -100], [1, -100], [2, 2], [1, 1], [3, 1], [1, 3]])


def kl_rows(views):
    """1/2 of 1/2 [KL + KL], a number a row."""
    return both_ways(*views).sum(-1) / 4


def nll_rows(views, target):
    picked = target.clamp(min=0).expand(2, *target.shape).unsqueeze(-1)
    return -views.log_softmax(-1).gather(-1, picked).squeeze(-1)


def intent_and_slots(slots, target, module):
    intent = slots.mean(2)
    ce = nll_rows(intent, INTENT).mean() + 0.5 * nll_rows(slots, TAGS)[:, INSIDE].mean()
    return ce, 3.0 * kl_rows(intent).mean() + 0.5 * kl_rows(slots)[INSIDE].mean()


def weighted(views, target, module):
    weight = WEIGHT[:, None] * INSIDE
    ce = (weight * nll_rows(views, TAGS)).sum() / (2 * weight.sum())
    return ce, (weight * kl_rows(views)).sum() / weight.sum()


def focal(views, target, module):
    nll = nll_rows(views, TAGS)[:, INSIDE]
    return ((1 - (-nll).exp()) ** 2 * nll).mean(), kl_rows(views)[INSIDE].mean()


def mlm(views, target, module):
    return nll_rows(views, LABELS)[:, LABELS >= 0].mean(), kl_rows(views)[INSIDE].mean()


def ctc(views, target, module):
    log_probs, lengths = views.log_softmax(-1).transpose(1, 2), (TOKENS > 0).sum(1)
    ce = [F.ctc_loss(view, TOKENS.clamp(min=0), LENGTHS, lengths) for view in log_probs]
    return torch.stack(ce).mean(), kl_rows(views)[INSIDE].mean()


def crf(views, target, module):
    """Over all 4 ** length taggings of each sentence, one by one."""
    ce, kl, transitions = [], [], module.rdrop_distance.transitions
    for example, length in enumerate(LENGTHS.tolist()):
        taggings = torch.cartesian_prod(*[torch.arange(4)] * length)
        emitted = views[:, example, torch.arange(length), taggings].sum(-1)
        scores = emitted + transitions[taggings[:, :-1], taggings[:, 1:]].sum(-1)
        right = (taggings == TAGS[example, :length]).all(1)
        ce.append(-scores.log_softmax(-1)[:, right].mean())
        kl.append(both_ways(*scores).sum() / 4)
    return torch.stack(ce).mean(), torch.stack(kl).mean()


def task(distance, target, formula, predict=lambda logits, lengths: logits):
    return SimpleNamespace(distance=distance, target=target, formula=formula, predict=predict)


TASKS = {
    "intent and slots": task(
        lambda: Together({"i": Categorical(), "s": Categorical()}, weights={"s": 0.5}, alphas={"i": 3.0}),
        {"i": INTENT, "s": TAGS},
        intent_and_slots,
        lambda logits, lengths: {"i": logits.mean(1), "s": logits},
    ),
    "sample weights": task(lambda: Weighted(Categorical()), (TAGS, WEIGHT), weighted),
    "focal": task(lambda: Focal(2.0), TAGS, focal),
    "mlm": task(lambda: MaskedConsistency(Categorical()), (LABELS, INSIDE), mlm),
    "ctc": task(CTC, TOKENS, ctc, lambda logits, lengths: (logits, lengths)),
    "crf": task(lambda: CRF(4), TAGS, crf),
}
EVERY_TASK = pytest.mark.parametrize("name", TASKS)


class Module(RDropMixin, pl.LightningModule):
    """Four numbers for each of six positions, under a noise that depends on a row and its view alone."""

    def __init__(self, name, passes="joint"):
        self.task = TASKS[name]
        super().__init__(rdrop_distance=self.task.distance(), rdrop_alpha=ALPHA, rdrop_passes=passes)
        torch.manual_seed(7)
        self.first, self.noise, self.head = nn.Linear(8, 8), Noise(passes == "joint"), nn.Linear(8, 4)
        if name == "crf":
            nn.init.normal_(self.rdrop_distance.transitions)

    def forward(self, x, lengths):
        return self.task.predict(self.head(self.noise(self.first(x)).tanh()), lengths)

    def by_hand(self):
        """The terms of all eight examples, with the two views one after the other."""
        hidden = self.first(X)
        views = [self.head((hidden * (1 + 0.5 * torch.sin((10 + view) * hidden))).tanh()) for view in (0, 1)]
        return self.task.formula(torch.stack(views), self.task.target, self)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def part(value, index):
    if isinstance(value, dict):
        return {name: part(inner, index) for name, inner in value.items()}
    return tuple(part(inner, index) for inner in value) if isinstance(value, tuple) else value[index]


def step(name, passes="joint", rank=None):
    """One step of a Trainer on all examples, or on those of a rank; the weights after it, and what was logged."""
    module = Module(name, passes)
    rows = [({"x": X[i], "lengths": LENGTHS[i]}, part(module.task.target, i)) for i in range(8)]
    rows = rows if rank is None else rows[rank::2]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1 if rank is None else 2, strategy="auto" if rank is None else "ddp",
        precision="64-true", max_steps=1, logger=False, use_distributed_sampler=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, len(rows)))
    weights = [parameter.detach().flatten().tolist() for parameter in module.parameters()]
    return weights, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("passes", ["joint", "separate"])
@EVERY_TASK
def test_loss_and_gradient_are_the_formula(name, passes):
    weights, metrics = step(name, passes)
    module = Module(name).double()
    ce, kl = module.by_hand()
    loss = ce + ALPHA * kl
    parameters = list(module.parameters())
    for parameter, gradient, found in zip(parameters, torch.autograd.grad(loss, parameters), weights, strict=True):
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(torch.tensor(found).double(), (parameter - LR * gradient).detach().flatten())
    names = module.rdrop_distance.term_names
    logged = [metrics[f"train/{term}"] for term in ("loss", *names)]
    assert logged == pytest.approx([float(loss), float(ce), float(kl)], rel=1e-6)
    assert [metrics[f"train/{term}_epoch"] for term in names] == pytest.approx(logged[1:], rel=1e-6)


def steps():
    return {name: step(name, rank=int(os.environ["LOCAL_RANK"])) for name in TASKS}


def test_two_ranks_are_the_one(pair):
    both = pair.run(steps)
    for name in TASKS:
        weights, metrics = step(name)
        for other, others in (both[0][name], both[1][name]):
            for found, expected in zip(other, weights, strict=True):
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), name
            for term in ("train/kl_epoch", "train/ce_epoch"):
                if term in metrics:
                    assert others[term] == pytest.approx(metrics[term], rel=1e-6)


class Tagger(RDropMixin, pl.LightningModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 4))

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_the_parameters_of_a_distance_are_trained_and_stand_once_in_a_checkpoint(fit, tmp_path):
    module = Tagger(rdrop_distance=CRF(4))
    trainer = fit(module, DataLoader(list(zip(X.float(), TAGS, strict=True)), 4), max_epochs=2)
    transitions = module.rdrop_distance.transitions
    assert transitions.abs().min() > 0
    assert sum(part is transitions for group in trainer.optimizers[0].param_groups for part in group["params"]) == 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert [key for key in saved["state_dict"] if "transitions" in key] == ["rdrop_distance.transitions"]
    assert "rdrop_distance" not in saved.get("hyper_parameters", {})
    assert saved["rdrop"]["rdrop_distance"] == {"class": "examples.recipes.crf.CRF", "init_args": {"tags": 4}}
    for given in ({}, {"rdrop_distance": CRF(4)}):  # it is made again, or loaded into the one that is given
        loaded = Tagger.load_from_checkpoint(tmp_path / "last.ckpt", **given)
        assert torch.equal(loaded.rdrop_distance.transitions, transitions)
    again = Tagger(rdrop_distance=CRF(4))
    fit(again, DataLoader(list(zip(X.float(), TAGS, strict=True)), 4), max_epochs=3, resume=tmp_path / "last.ckpt")
    assert not torch.equal(again.rdrop_distance.transitions, transitions)


def test_the_gradient_of_a_crf():
    distance = CRF(3).double()
    nn.init.normal_(distance.transitions)
    scores = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    tags = torch.tensor([[0, 2, 1], [1, -100, -100]])

    def loss(scores, transitions):  # gradcheck changes the parameter in its place
        return distance.terms(scores, tags, 2.0).loss

    assert torch.autograd.gradcheck(loss, (scores, distance.transitions))
    with torch.no_grad():  # where torch.autograd.grad would find no graph
        value = distance.terms(scores, tags, 2.0).loss
    torch.testing.assert_close(value, loss(scores, None).detach())
