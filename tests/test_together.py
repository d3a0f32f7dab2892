"""Several predictions for each example: each part is measured by its own distance, and all are one loss."""

import re

import pytest
import pytorch_lightning as pl
import torch
from conftest import Net, ragged
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from examples.recipes.distillation import Student
from lightning_rdrop import (
    FGM,
    VAT,
    Bernoulli,
    Categorical,
    Gaussian,
    GradientPenalty,
    Head,
    RDropMixin,
    Together,
    symmetric_kl,
)  # fmt: skip
from lightning_rdrop.callbacks import ExactAccumulation
from lightning_rdrop.description import describe, rebuild, spell
from lightning_rdrop.distance import Distance
from lightning_rdrop.modules.task import Task
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

    with pytest.raises(ValueError, match=r'rows of a duplicated batch.*rdrop_passes="separate"'):
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


def test_exact_accumulation_is_refused_where_there_are_several_denominators(fit):
    with pytest.raises(ValueError, match=r"with Together .* intent_ce is a mean over 4 rows, and slots_ce over 16"):
        fit(Assistant(), DataLoader([batch_of()], batch_size=None), [ExactAccumulation()])
    later = [batch_of(), batch_of(), batch_of()]
    for _, target in later:
        target["slots"] = target["slots"][:, 0]
    later[1][1]["slots"][0] = -100

    class First(Assistant):
        def forward(self, x):
            both = super().forward(x)
            return both | {"slots": both["slots"][:, 0]}

    with pytest.raises(ValueError, match="in a batch of this epoch the terms of the loss were means over different"):
        fit(First(), DataLoader(later, batch_size=None), [ExactAccumulation()])


class TwoTaggers(RDropMixin, pl.LightningModule):
    """Two tags for each token, under a noise that depends on the input and the view alone, not on the batch."""

    def __init__(self, **kwargs):
        distance = Together({"tag": Categorical(), "other": Categorical()}, weights={"other": 0.5}, alphas={"tag": 2.0})
        super().__init__(rdrop_passes="separate", rdrop_alpha=2.0, rdrop_distance=distance)
        torch.manual_seed(7)
        self.tag, self.other = nn.Linear(4, 5), nn.Linear(4, 5)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = x * (1 + 0.5 * torch.sin((10 + self.passes % 2) * x))
        return {"tag": self.tag(x), "other": self.other(x)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_exact_accumulation_where_the_parts_have_the_same_rows(fit):
    rows = [(x, {"tag": y, "other": torch.where(y < 0, y, 4 - y)}) for x, y in ragged(5, 4)]
    trained = {}
    for name, batch_size, callbacks in (("big", 8, []), ("exact", 2, [ExactAccumulation()]), ("plain", 2, [])):
        module = TwoTaggers()
        fit(module, DataLoader(rows, batch_size), callbacks, accumulate_grad_batches=8 // batch_size, max_epochs=2,
            precision="64-true")  # fmt: skip
        trained[name] = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    torch.testing.assert_close(trained["exact"], trained["big"])
    assert (trained["plain"] - trained["big"]).abs().max() > 1e-3


class Evaluated(Task):
    """Measures nothing but the loss."""

    def measure(self, metrics, batch, prediction, target):
        pass


def test_an_evaluation_is_the_mean_over_the_rows_of_each_part(fit):
    source = Assistant(p=0.3).double()
    distance = Together({"intent": Categorical(), "slots": Categorical()}, weights={"slots": 0.5})
    module = Evaluated(source, MetricCollection({}), rdrop_distance=distance)
    batches = [batch_of(4), batch_of(1, seed=1)]
    batches[0][1]["slots"][1:] = -100  # four intents and four slots, then one and four
    trainer = fit(module, DataLoader(batches, batch_size=None), precision="64-true")
    (tested,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    tokens = torch.cat([tokens for tokens, _ in batches])
    intent, slots = (torch.cat([target[name] for _, target in batches]) for name in ("intent", "slots"))
    prediction = source.eval()(tokens)
    intent_ce = F.cross_entropy(prediction["intent"], intent).item()
    slots_ce = F.cross_entropy(prediction["slots"].flatten(0, 1), slots.flatten()).item()
    expected = {"intent_ce": intent_ce, "slots_ce": slots_ce, "ce": intent_ce + 0.5 * slots_ce}
    assert tested == pytest.approx({f"test/{name}": value for name, value in expected.items()})


@pytest.mark.parametrize("regularizer", [GradientPenalty, FGM, VAT])
def test_a_regularizer_of_one_part_is_that_of_its_distance(regularizer):
    class Intents(Assistant):
        def forward(self, x):
            return super().forward(x)["intent"]

    (tokens, target), terms = batch_of(), []
    for kind, distance in ((Assistant, None), (Intents, Categorical())):
        torch.manual_seed(0)
        if distance is None:
            distance = Together({"intent": Categorical(), "slots": Categorical()}, weights={"slots": 0.0})
        module = kind(p=0.0, rdrop_distance=distance, rdrop_views=1, rdrop_regularizers=[regularizer(at="network.0")])
        labels = target if kind is Assistant else target["intent"]
        terms.append(next(iter(module.double().rdrop_step((tokens, labels)).extra.values())))
    torch.testing.assert_close(*terms)
    assert terms[0] > 1e-6


def test_padding_of_unlabelled_texts_counts_in_no_part():
    class Padded(Assistant):
        def forward(self, tokens, attention_mask):
            return super().forward(tokens)

    module = Padded(rdrop_alpha=2.0, rdrop_labeled_weight=0.0).double()
    tokens, target = batch_of()
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [4]])).long()
    labeled = {"tokens": tokens, "attention_mask": torch.ones_like(mask), "labels": target}
    seen = training_outputs(module)
    terms = module.rdrop_step({"labeled": labeled, "unlabeled": {"tokens": tokens, "attention_mask": mask}})
    hidden = seen[-1].unflatten(0, (2, 4))
    expected = symmetric_kl(*module.slots(hidden)[:, mask.bool()]).mean() / 2
    expected = expected + symmetric_kl(*module.intent(hidden.mean(2))).mean() / 2
    torch.testing.assert_close(terms.extra["kl_unlabeled"], expected)


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
    with pytest.raises(ValueError, match=f"There are distances for intent, slots, but {message}"):
        Other().rdrop_step((tokens, targets))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"distances": {}}, ValueError, "must map at least one name to a distance"),
        *(
            ({"distances": {name: Gaussian()}}, ValueError, re.escape(f"distances has the name {name!r}, which no"))
            for name in ("type", "training", "_modules", "a.b", "", 1)
        ),
        ({"distances": {"a": 1}}, TypeError, r"distances\['a'\] must be a Distance, got 1"),
        ({"weights": {"b": 1.0}}, ValueError, "weights has 'b', but there are distances for a"),
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


class Saved(Assistant):
    def __init__(self, width=16, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


def test_a_dict_of_distances_is_no_hyperparameter(fit, tmp_path):
    distances = {"intent": Categorical(), "slots": Categorical()}
    trainer = fit(Saved(rdrop_distance=distances), DataLoader([batch_of()], batch_size=None))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = Saved.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True, rdrop_distance=distances)
    assert dict(loaded.hparams) == {"width": 16}


def test_distillation_has_the_gradient_of_the_published_loss():
    """Hinton et al. 2015: (1 - a) CE + a T^2 KL(teacher || student), both at temperature T; and kl of the logits."""
    temperature, share, alpha = 3.0, 0.25, 2.0
    student = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3))
    teacher = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5))
    module = Student(student, teacher, temperature, share, rdrop_alpha=alpha).double()
    x, labels = torch.randn(6, 8).double(), torch.arange(6) % 3
    seen = training_outputs(module)
    terms = module.rdrop_step((x, labels))
    logits = seen[-1]
    soft = (teacher[0](x) / temperature).softmax(-1).repeat(2, 1).detach()
    loss = (1 - share) * F.cross_entropy(logits, labels.repeat(2))
    student_soft = (logits / temperature).log_softmax(-1)
    loss = loss + share * temperature**2 * F.kl_div(student_soft, soft, reduction="batchmean")
    kl = symmetric_kl(*logits.unflatten(0, (2, 6))).mean() / 2
    torch.testing.assert_close(terms.kl, kl)
    entropy = -(soft * soft.log()).sum(-1).mean()
    torch.testing.assert_close(terms.loss, loss + alpha * kl + share * temperature**2 * entropy)
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(loss + alpha * kl, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, parameters), wanted)


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
    assert not distance.has_invalid(logits, target)
    assert distance.prediction_warning(logits) is None
    for name, wrong in (("first", torch.tensor([0, 3])), ("second", torch.full((2, 3), 7.0))):
        assert distance.has_invalid(logits, target | {name: wrong})
        with pytest.raises(ValueError, match="contains"):
            distance.check(logits, target | {name: wrong})
    assert "already a softmax" in distance.prediction_warning(logits | {"first": logits["first"].softmax(-1)})
    assert "sigmoid" in distance.prediction_warning(logits | {"second": logits["second"].requires_grad_().sigmoid()})
    assert Together({"own": Silent()}).has_invalid({"own": torch.zeros(2)}, {"own": torch.zeros(2)}) is None
    for ask in (distance.has_invalid, lambda logits, target: distance.terms(logits, target, 1.0)):
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


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_parts_may_have_different_rows(passes):
    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.node, self.graph = nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x):
            x = nn.functional.dropout(x, 0.5, self.training)
            return {"node": self.node(x).flatten(0, 1), "graph": self.graph(x.mean(1))}

    module = Net(Graphs(), rdrop_passes=passes, rdrop_distance={"node": Categorical(), "graph": Categorical()})
    target = {"node": torch.zeros(20, dtype=torch.long), "graph": torch.zeros(4, dtype=torch.long)}
    terms = module.rdrop_step((torch.randn(4, 5, 8), target))
    assert terms.examples == 4
    assert [terms.parts[name].rows for name in target] == [20, 4]
