"""Several predictions for each example: each part is measured by its own distance, and all are one loss."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import VAT, Bernoulli, Categorical, Gaussian, Head, RDropMixin, Together, symmetric_kl
from lightning_rdrop.callbacks import ExactAccumulation
from lightning_rdrop.description import describe, rebuild, spell
from lightning_rdrop.distance import Distance
from tests.networks import training_outputs


class Assistant(RDropMixin, pl.LightningModule):
    """An intent for each text, and a slot for each of its tokens."""

    def __init__(self, fused=False, p=0.3, **kwargs):
        super().__init__(**{"rdrop_distance": {"intent": Categorical(), "slots": Categorical()}} | kwargs)
        self.network = nn.Sequential(nn.Embedding(20, 16), nn.Dropout(p))
        self.intent, self.slots = nn.Linear(16, 3), nn.Linear(16, 5)
        self.fused = fused

    def forward(self, x):
        hidden = self.network(x)
        return {"intent": self.intent(hidden.mean(1)), "slots": self.slots(hidden)}

    def rdrop_head(self):
        return {"slots": Head(self.slots.weight, self.slots.bias)} if self.fused else None

    def rdrop_hidden(self, inputs):
        hidden = self.network(inputs)
        return {"intent": self.intent(hidden.mean(1)), "slots": hidden}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batch_of(examples=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (examples, 6), generator=generator)
    slots = torch.randint(5, (examples, 6), generator=generator)
    slots[:, 4:] = -100
    return tokens, {"intent": torch.randint(3, (examples,), generator=generator), "slots": slots}


def formula(module, hidden, target, alpha, weights=(1.0, 1.0), alphas=(1.0, 1.0)):
    """The loss written out, in float64, on the hidden states of two views (2, B, T, 16)."""
    intent, slots = module.intent(hidden.mean(2)), module.slots(hidden)
    counted = target["slots"] != -100
    ce = (
        F.cross_entropy(intent.flatten(0, 1), target["intent"].repeat(2)),
        F.cross_entropy(slots.flatten(0, 2), target["slots"].repeat(2, 1).flatten()),
    )
    kl = (symmetric_kl(*intent).mean() / 2, symmetric_kl(*slots[:, counted]).mean() / 2)
    task = sum(weight * one for weight, one in zip(weights, ce, strict=True))
    consistency = sum(w * a * one for w, a, one in zip(weights, alphas, kl, strict=True))
    return task + alpha * consistency, task, consistency, ce, kl


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("factors", [{}, {"weights": {"slots": 0.5}, "alphas": {"intent": 2.0, "slots": 0.0}}])
def test_loss_and_gradients_are_the_formula(passes, fused, factors):
    distance = Together({"intent": Categorical(), "slots": Categorical()}, **factors)
    module = Assistant(fused, rdrop_alpha=2.0, rdrop_passes=passes, rdrop_distance=distance).double()
    tokens, target = batch_of()
    seen = training_outputs(module)
    terms = module.rdrop_step((tokens, target))
    hidden = torch.cat(seen).unflatten(0, (2, 4))
    weights, alphas = ((1.0, 0.5), (2.0, 0.0)) if factors else ((1.0, 1.0), (1.0, 1.0))
    loss, ce, kl, ces, kls = formula(module, hidden, target, 2.0, weights, alphas)
    torch.testing.assert_close((terms.loss, terms.ce, terms.kl), (loss, ce, kl))
    for number, name in enumerate(("intent", "slots")):
        torch.testing.assert_close((terms.parts[name].ce, terms.parts[name].kl), (ces[number], kls[number]))
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, parameters, retain_graph=True), wanted)
    torch.testing.assert_close(torch.autograd.grad(terms.ce + 2.0 * terms.kl, parameters), wanted)


def test_every_part_is_logged_by_its_name(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="")
    module = Assistant(rdrop_alpha=3.0)
    batches = DataLoader([batch_of(seed=seed) for seed in range(4)], batch_size=None)
    metrics = fit(module, batches, logger=logger, log_every_n_steps=1).callback_metrics
    names = {
        f"{part}{term}{end}" for part in ("", "intent_", "slots_") for term in ("ce", "kl") for end in ("", "_epoch")
    }
    assert set(metrics) == {f"train/{name}" for name in names | {"loss", "alpha"}}
    value = {name.removeprefix("train/"): metric.double() for name, metric in metrics.items()}
    torch.testing.assert_close(value["loss"], value["ce"] + 3.0 * value["kl"], rtol=1e-6, atol=0)
    torch.testing.assert_close(value["ce"], value["intent_ce"] + value["slots_ce"], rtol=1e-6, atol=0)
    assert value["intent_kl"] > 0
    assert value["slots_kl"] > 0


def test_dead_dropout_and_nan_are_noticed():
    with pytest.raises(ValueError, match=r"p = 0: network\.1"):
        Assistant(p=0.0).rdrop_step(batch_of())
    module = Assistant()
    module.slots.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="view 0 is NaN since batch 0"):
        module.rdrop_step(batch_of())


def test_rows_that_meet_in_one_part_are_noticed():
    class Meets(Assistant):
        def forward(self, x):
            both = super().forward(x)
            return both | {"intent": both["intent"] - both["intent"].mean(0)}

    with pytest.raises(ValueError, match=r'rows of a doubled batch.*rdrop_passes="separate"'):
        Meets().rdrop_step(batch_of())


def test_unlabelled_examples_and_a_regularizer():
    module = Assistant(rdrop_alpha=2.0, rdrop_unlabeled_weight=0.5, rdrop_regularizers=[VAT(at="network.0")])
    terms = module.rdrop_step({"labeled": batch_of(), "unlabeled": batch_of(6, seed=1)[0]})
    extra = terms.extra
    torch.testing.assert_close(terms.kl, extra["kl_labeled"] + 0.5 * extra["kl_unlabeled"])
    torch.testing.assert_close(
        terms.loss, terms.ce + 2.0 * terms.kl + extra["vat_labeled"] + 0.5 * extra["vat_unlabeled"]
    )


def test_late_duplication():
    module, (tokens, target) = Assistant(rdrop_duplicate_at="network.1").double(), batch_of()
    seen = training_outputs(module)
    terms = module.rdrop_step((tokens, target))
    loss, *_ = formula(module, seen[-1].unflatten(0, (2, 4)), target, 4.0)
    torch.testing.assert_close(terms.loss, loss)


def test_exact_accumulation_is_refused(fit):
    with pytest.raises(ValueError, match=r"a loss that is a mean over rows.*several predictions"):
        fit(Assistant(), DataLoader([batch_of()], batch_size=None), [ExactAccumulation()])


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (
            ("intent",),
            None,
            "the prediction is a mapping with intent. Return a mapping with these names from rdrop_predict",
        ),
        (None, ("slots",), "the target is a mapping with slots. Return a mapping with these names from rdrop_unpack"),
        (None, (), "the target is a Tensor"),
    ],
)
def test_other_names_are_refused(prediction, target, message):
    class Other(Assistant):
        def forward(self, x):
            both = super().forward(x)
            return {name: both[name] for name in prediction or both}

    tokens, targets = batch_of()
    if target is not None:
        targets = {name: targets[name] for name in target} or targets["intent"]
    with pytest.raises(ValueError, match=f"There are distances for intent, slots, and {message}"):
        Other().rdrop_step((tokens, targets))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"distances": {}}, ValueError, "must map names to distances, one at least"),
        ({"distances": {"a": 1}}, TypeError, r"distances\['a'\] must be a Distance, got 1"),
        ({"weights": {"b": 1.0}}, ValueError, "weights has 'b'; there are distances for a"),
        ({"alphas": {"a": -1.0}}, ValueError, r"alphas\['a'\] must be a finite number >= 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Together(**{"distances": {"a": Gaussian()}} | arguments)


def test_a_checkpoint_describes_it():
    distance = Together({"kind": Bernoulli(), "size": Gaussian(log_variance=True)}, weights={"size": 0.5})
    written = "Together(distances={'kind': Bernoulli(), 'size': Gaussian(log_variance=True)}, weights={'size': 0.5})"
    assert spell(describe(distance)) == written
    assert rebuild(describe(distance), Distance).part("size").log_variance


def test_measures_of_a_mapping_are_the_weighted_sums():
    distance = Together({"a": Gaussian(), "b": Gaussian()}, weights={"a": 2.0}, alphas={"b": 3.0})
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}
    other = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([2.0])}
    assert distance.to_target(one, other).mean == 2.0 * 2.5 + 4.0
    assert distance.between(one, other).mean == distance.directed(one, other).mean == 2.0 * 2.5 + 3.0 * 4.0


def test_every_part_is_looked_at_by_its_own_distance():
    distance = Together({"first": Categorical(), "own": Silent(), "second": Bernoulli()})
    logits = {"first": torch.randn(2, 3), "own": torch.zeros(2), "second": torch.randn(2, 3)}
    target = {"first": torch.tensor([0, 2]), "own": torch.zeros(2), "second": torch.ones(2, 3)}
    distance.check(logits, target)
    assert not distance.invalid(logits, target)
    assert distance.suspicious(logits) is None
    for name, wrong in (("first", torch.tensor([0, 3])), ("second", torch.full((2, 3), 7.0))):
        assert distance.invalid(logits, target | {name: wrong})
        with pytest.raises(ValueError, match="holds"):
            distance.check(logits, target | {name: wrong})
    assert "softmax already" in distance.suspicious(logits | {"first": logits["first"].softmax(-1)})
    assert "sigmoid" in distance.suspicious(logits | {"second": logits["second"].requires_grad_().sigmoid()})
    assert Together({"own": Silent()}).invalid({"own": torch.zeros(2)}, {"own": torch.zeros(2)}) is None
    for ask in (distance.invalid, lambda logits, target: distance.terms(logits, target, 1.0)):
        with pytest.raises(ValueError, match="first"):
            ask({"other": torch.zeros(2)}, target)


class Silent(Distance):
    """Takes any value."""


def test_unlabelled_parts_have_alphas_of_their_own_and_rows_that_do_not_count():
    distance = Together({"intent": Categorical(), "slots": Categorical()}, alphas={"intent": 3.0, "slots": 0.5})
    views = {"intent": torch.randn(2, 4, 3), "slots": torch.randn(2, 4, 6, 5)}
    slots = batch_of()[1]["slots"]
    intent = symmetric_kl(*views["intent"]).mean() / 2
    tagged = symmetric_kl(*views["slots"])[slots != -100].mean() / 2
    terms = distance.consistency(views, 2.0, {"slots": slots})
    torch.testing.assert_close(terms.loss, 2.0 * (3.0 * intent + 0.5 * tagged))
