"""Rows that count more than others, and a consistency over rows of its own."""

import json

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from test_distance import EVERY, target_of
from torch import distributions
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import (
    CTC,
    Average,
    Bernoulli,
    Categorical,
    Cosine,
    Distance,
    Focal,
    FromDistribution,
    Gaussian,
    Head,
    JensenShannon,
    MaskedConsistency,
    RDropLoss,
    RDropMixin,
    Together,
    Weighted,
    cross_entropy,
    symmetric_kl,
)
from lightning_rdrop._fused import compiled, sweep
from lightning_rdrop.callbacks import ExactAccumulation
from lightning_rdrop.description import describe, rebuild, spell
from lightning_rdrop.modules import Classifier

NAN = float("nan")
WHOLE = torch.tensor([2.0, 0.0, 1.0, 3.0])
"""With whole weights a row is there as often as its weight says."""
ALL = EVERY | {"Focal": (Focal(), (5,)), "Categorical, weighted": (Categorical(weight=torch.rand(5)), (5,))}


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("distance", "shape"), ALL.values(), ids=ALL)
def test_a_row_is_there_as_often_as_its_weight_says(distance, shape, views):
    predictions = torch.randn(views, 4, *shape, dtype=torch.float64, requires_grad=True)
    target, repeats = target_of(distance, predictions[0]), WHOLE.long()
    terms = RDropLoss(Weighted(distance))(predictions, (target, WHOLE), 3.0)
    wanted = RDropLoss(distance)(predictions.repeat_interleave(repeats, 1), target.repeat_interleave(repeats, 0), 3.0)
    for found, expected in ((terms.loss, wanted.loss), (terms.ce, wanted.ce), (terms.kl, wanted.kl)):
        torch.testing.assert_close(found, expected)
        if expected.requires_grad and (views > 1 or expected is not wanted.kl):
            ours, theirs = (torch.autograd.grad(term, predictions, retain_graph=True)[0] for term in (found, expected))
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(terms.rows, wanted.rows)
    if views > 1:
        torch.testing.assert_close(terms.kl_rows, wanted.rows if wanted.kl_rows is None else wanted.kl_rows)
        first, second = predictions[:2]
        directed = Weighted(distance).directed(first, second, (target, WHOLE)).mean
        again = distance.directed(*predictions[:2].repeat_interleave(repeats, 1)).mean
        torch.testing.assert_close(directed, again)
    alone = RDropLoss(Weighted(distance)).consistency(predictions, 3.0)  # unlabelled rows have no weight
    torch.testing.assert_close(alone.kl, RDropLoss(distance).consistency(predictions, 3.0).kl)


def test_the_weighted_mean_written_out():
    views, target = (
        torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 1, -100, 2, -100, 3]),
    )
    weight = torch.rand(6, dtype=torch.float64)
    terms = RDropLoss(Weighted(Categorical()))(views, (target, weight), 2.0)
    w = weight[target >= 0]
    ce = (w * -views.log_softmax(-1)[:, target >= 0, target[target >= 0]]).sum() / (2 * w.sum())
    kl = (w * symmetric_kl(*views)[target >= 0]).sum() / w.sum() / 2
    torch.testing.assert_close((terms.ce, terms.kl, terms.loss), (ce, kl, ce + 2.0 * kl))
    assert torch.autograd.gradcheck(lambda x: RDropLoss(Weighted(Categorical()))(x, (target, weight), 2.0).loss, views)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_weights_may_be_learned(views, head):
    """As a network learns to weigh its examples: the gradient of the weighted mean, whatever the way to the loss."""
    hidden, target = torch.randn(views, 6, 4, dtype=torch.float64), torch.tensor([0, 1, -100, 2, 4, 3])
    layer = torch.nn.Linear(4, 5).double()
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)

    def loss(weight):
        predictions, given = (hidden, Head(layer.weight, layer.bias)) if head else (layer(hidden), None)
        return RDropLoss(Weighted(Categorical()))(predictions, (target, weight), 2.0, given).loss

    assert torch.autograd.gradcheck(loss, weight)
    torch.testing.assert_close(loss(weight), loss(weight.detach()))
    (gradient,) = torch.autograd.grad(loss(weight), weight)
    assert (gradient.ne(0) == (target >= 0)).all()


@pytest.mark.parametrize("distance", [Categorical(), JensenShannon()])
def test_the_rows_of_learned_weights_are_a_number_for_the_log(distance):
    """With a gradient, the mean of an epoch would keep the graphs of all of its steps."""
    weight = torch.rand(4, requires_grad=True)
    terms = RDropLoss(Weighted(distance))(torch.randn(2, 4, 3), (torch.tensor([0, 1, 2, 0]), weight), 2.0)
    for rows in (terms.rows, terms.kl_rows):
        torch.testing.assert_close(rows, weight.sum())
        assert not rows.requires_grad


@pytest.mark.parametrize("distance", [Categorical(), Categorical(class_dim=1), Bernoulli(), Gaussian()])
def test_a_weight_for_each_token_or_label(distance):
    prediction = torch.randn(4, 3, 3, dtype=torch.float64)
    target = torch.randint(3, (4, 3)) if isinstance(distance, Categorical) else torch.rand(4, 3, 3)
    weight = torch.rand(target.shape, dtype=torch.float64)
    if isinstance(distance, Categorical):
        logits = prediction if distance.class_dim == -1 else prediction.mT
        rows = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(4, 3)
    elif isinstance(distance, Bernoulli):
        rows = F.binary_cross_entropy_with_logits(prediction, target.double(), reduction="none")
    else:
        rows = (prediction - target).square()
    first = weight[(slice(None), *[0] * (rows.dim() - 1))]
    for given in (weight, first):  # for each row, and for all rows of an example
        wide = given.view(4, *[1] * (rows.dim() - 1)).expand_as(rows) if given.dim() == 1 else given
        found = Weighted(distance).to_target(prediction, (target, given))
        torch.testing.assert_close(found.mean, (wide * rows).sum() / wide.sum())


def poisson(x):
    return distributions.Poisson(x.exp())


@pytest.mark.parametrize(
    ("distance", "plain"),
    [
        (Gaussian(ignore_value=NAN), Gaussian()),
        (FromDistribution(poisson, ignore_value=NAN), FromDistribution(poisson)),
    ],
)
def test_what_is_not_known_has_no_weight(distance, plain):
    first, second = torch.randn(2, 4, dtype=torch.float64)
    target, weight = torch.tensor([1.0, NAN, 2.0, 3.0]), torch.tensor([1.0, 5.0, 2.0, 0.5])
    known = [0, 2, 3]
    fewer = (target[known], weight[known])
    found = Weighted(distance).to_target(first, (target, weight))
    torch.testing.assert_close(found.mean, Weighted(plain).to_target(first[known], fewer).mean)
    assert found.weight == 3.5
    found = Weighted(distance).between(first, second, (target, weight))
    torch.testing.assert_close(found.mean, Weighted(plain).between(first[known], second[known], fewer).mean)


class Tokens(RDropMixin, pl.LightningModule):
    """Five classes for each token, under a noise that depends on the input and the view alone, not on the batch."""

    def __init__(self, **kwargs):
        super().__init__(**{"rdrop_passes": "separate", "rdrop_alpha": 2.0} | kwargs)
        torch.manual_seed(7)
        self.network = torch.nn.Linear(4, 5)
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        return self.network(x * (1 + 0.5 * torch.sin((10 + self.passes % 2) * x)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def rows_of(second):
    """Eight examples of three tokens; what is second in their targets."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 4, generator=generator), torch.randint(5, (8, 3), generator=generator)
    return [(x[i], (y[i], second[i])) for i in range(8)]


def test_exact_accumulation_of_weighted_rows(fit):
    data = rows_of(torch.tensor([0.1, 2.0, 3.0, 0.0, 1.0, 1.0, 0.5, 4.0]))
    weights = []
    for batch_size, callbacks in ((8, []), (2, [ExactAccumulation()]), (2, [])):
        module = Tokens(rdrop_distance=Weighted(Categorical()))
        fit(module, DataLoader(data, batch_size), callbacks, accumulate_grad_batches=8 // batch_size)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(weights[1], weights[0])
    assert (weights[2] - weights[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("distance", "shape"),
    [
        (Bernoulli(), (4, 5)), (Categorical(), (4,)), (Cosine(), (4,)), (Focal(), (4,)), (Gaussian(), (4,)),
        (Gaussian(), (4, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_a_prediction_without_weight_may_be_nan(distance, shape):
    predictions, gradients = torch.randn(2, 4, 5), []
    target, weight = target_of(distance, predictions[0]), torch.ones(shape)
    weight[1] = 0
    for ignored in (0.0, NAN):
        predictions[:, 1] = ignored
        views = predictions.clone().requires_grad_()
        gradients += torch.autograd.grad(RDropLoss(Weighted(distance))(views, (target, weight), 3.0).loss, views)
    torch.testing.assert_close(*gradients)


def test_rows_without_weight_change_nothing(fit):
    module = Tokens(rdrop_distance=Weighted(Categorical()))
    before = module.network.weight.detach().clone()
    fit(module, DataLoader(rows_of(torch.zeros(8)), 4), [ExactAccumulation()])
    assert torch.equal(module.network.weight, before)


@pytest.mark.parametrize("inner", [Categorical(weight=torch.ones(5)), Focal(weight=torch.ones(5))])
def test_class_weights_within_are_refused_by_exact_accumulation(fit, inner):
    with pytest.raises(ValueError, match="with class weights ce is a weighted mean"):
        fit(Tokens(rdrop_distance=Weighted(inner)), DataLoader(rows_of(torch.ones(8)), 4), [ExactAccumulation()])


def test_epoch_means_are_over_the_rows_of_each_term(fit):
    """ce and kl have denominators of their own: 3 labels and 24 tokens here."""
    mask = torch.ones(8, 3, dtype=torch.long)
    mask[:, 2] = torch.tensor([0, 1, 1, 0, 0, 0, 1, 1])
    data = rows_of(mask)
    for i, (_, (labels, _)) in enumerate(data):
        labels[torch.arange(3) != i % 3] = -100
    data[0][1][0][:] = -100
    seen = []

    class Steps(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            rows = module.rdrop_denominators
            seen.append((outputs["ce"], rows["ce"], outputs["kl"], rows["kl"]))

    module = Tokens(rdrop_distance=MaskedConsistency(Categorical()))
    trainer = fit(module, DataLoader(data, 3), [Steps()])
    ce, ce_rows, kl, kl_rows = torch.tensor(seen).T
    assert ce_rows.tolist() == [2, 3, 2]
    assert kl_rows.tolist() == [8, 6, 6]
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["train/ce_epoch"], (ce * ce_rows).sum() / ce_rows.sum())
    torch.testing.assert_close(metrics["train/kl_epoch"], (kl * kl_rows).sum() / kl_rows.sum())
    with pytest.raises(ValueError, match=r"MaskedConsistency.*ce is a mean over 2 rows, and kl over 8"):
        fit(Tokens(rdrop_distance=MaskedConsistency(Categorical())), DataLoader(data, 3), [ExactAccumulation()])


@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_masked_consistency_written_out(class_dim, dtype):
    logits = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    labels, mask = torch.randint(5, (4, 6)), torch.rand(4, 6) < 0.7
    labels[torch.rand(4, 6) < 0.6] = -100
    views = (logits if class_dim == -1 else logits.mT).requires_grad_()
    distance = MaskedConsistency(Categorical(class_dim=class_dim))
    terms = RDropLoss(distance)(views, (labels, mask.to(dtype)), 3.0)
    logits = views if class_dim == -1 else views.mT
    ce = F.cross_entropy(logits.flatten(0, 2), labels.repeat(2, 1).flatten())
    kl = symmetric_kl(*logits)[mask].mean() / 2
    torch.testing.assert_close((terms.ce, terms.kl, terms.loss), (ce, kl, ce + 3.0 * kl))
    assert (terms.rows, terms.kl_rows) == ((labels >= 0).sum(), mask.sum())
    torch.testing.assert_close(
        *(torch.autograd.grad(x, views, retain_graph=True)[0] for x in (terms.loss, ce + 3 * kl))
    )
    first, second = views
    directed = distance.directed(first, second, (labels, mask)).mean
    torch.testing.assert_close(
        directed, distance.distance.directed(first, second, labels.where(~mask, 0).where(mask, -100)).mean
    )


def test_both_in_one():
    views, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([1, -100, 2])
    mask, weight = torch.tensor([True, True, False]), torch.tensor([2.0, 3.0, 1.0])
    terms = RDropLoss(Weighted(MaskedConsistency(Categorical())))(views, ((labels, mask), weight), 1.0)
    rows = symmetric_kl(*views)
    torch.testing.assert_close(terms.kl, ((2 * rows[0] + 3 * rows[1]) / 5 / 2).float().double(), rtol=1e-6, atol=0)
    nll = -views.log_softmax(-1)
    torch.testing.assert_close(terms.ce, ((2 * nll[:, 0, 1] + nll[:, 2, 2]) / 3).mean())


@pytest.mark.parametrize("value", [-0.5, NAN, float("inf")])
def test_impossible_weights(value):
    weight = torch.tensor([1.0, 0.0, value])
    prediction, target = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match=f"The weight contains {value}; a weight is a finite number >= 0"):
        Weighted(Categorical()).check(prediction, (target, weight))
    assert Weighted(Categorical()).has_invalid(prediction, (target, weight))
    assert not Weighted(Categorical()).has_invalid(prediction, (target, weight.clamp(0, 1).nan_to_num()))
    assert Weighted(Categorical()).has_invalid(prediction, (target + 1, torch.ones(3)))
    with pytest.raises(ValueError, match="The target contains the class 2"):
        Weighted(Categorical()).check(prediction, (target + 1, torch.ones(3)))


def test_a_later_negative_weight_is_found(fit):
    data = rows_of(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"target of batch 1 contains a value that is invalid.*a negative weight"):
        fit(Tokens(rdrop_distance=Weighted(Categorical())), DataLoader(data, 4), log_every_n_steps=1, max_epochs=2)
    with pytest.raises(ValueError, match=r"The weight contains -1.0; a weight is"):
        fit(Tokens(rdrop_distance=Weighted(Categorical())), DataLoader(data[::-1], 4))


def test_an_impossible_mask():
    with pytest.raises(ValueError, match=r"The mask contains 0.5; a mask is bool, or 0 and 1.*Weighted"):
        MaskedConsistency(Gaussian()).check(torch.zeros(2), (torch.zeros(2), torch.tensor([1, 0.5])))
    assert MaskedConsistency(Gaussian()).has_invalid(torch.zeros(2), (torch.zeros(2), torch.tensor([1, 0.5])))


@pytest.mark.parametrize("shape", [(), (1,), (4, 5), (5,), (4, 6, 1), (6, 4)])
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"does not fit rows of shape \(4, 6\): pass one for each example, \(4,\)"):
        Weighted(Categorical()).to_target(
            torch.zeros(4, 6, 3), (torch.zeros(4, 6, dtype=torch.long), torch.ones(shape))
        )


@pytest.mark.parametrize("target", [torch.zeros(3), (torch.zeros(3),), (torch.zeros(3), [1, 1, 1])])
def test_what_is_no_pair_is_refused(target):
    with pytest.raises(TypeError, match=r"Weighted takes a target \(target, weight\) whose second part is a tensor"):
        Weighted(Gaussian()).to_target(torch.zeros(3), target)
    with pytest.raises(TypeError, match="distance must be a Distance"):
        Weighted(Categorical)


def test_one_of_several_predictions_is_weighted():
    distance = Together({"a": Weighted(Gaussian()), "b": Gaussian()})
    one = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[0.0, 0.0]])}
    target = {"a": (torch.zeros(2), torch.tensor([3.0, 1.0])), "b": torch.tensor([1.0, 1.0])}
    terms = distance.terms(one, target, 1.0)
    assert terms.ce == (3 * 1 + 4) / 4 + 1
    assert terms.parts["a"].rows == 4
    assert not distance.has_invalid({name: part[0] for name, part in one.items()}, target)
    with pytest.raises(TypeError, match=r"its rows cannot be weighted.*with Together, weight each part"):
        Weighted(Together({"b": Gaussian()})).to_target({"b": torch.zeros(2)}, ({"b": torch.zeros(2)}, torch.ones(2)))


def test_a_distance_of_ones_own():
    class Absolute(Distance):
        def to_target(self, prediction, target):
            return Average.of((prediction - target).abs())

        def between(self, first, second, target=None):
            return Average.of((first - second).abs())

    views, weight = torch.tensor([[1.0, 2.0], [1.0, 4.0]]), torch.tensor([1.0, 3.0])
    terms = RDropLoss(Weighted(Absolute()))(views, (torch.zeros(2), weight), 1.0)
    assert (terms.ce, terms.kl) == ((2 * 1 + 3 * 2 + 3 * 4) / 8, 3 * 2 / 4 / 2)


def test_unlabelled_examples_have_no_weight():
    """Of their padding, the attention mask tells."""

    class Masked(Tokens):
        def rdrop_predict(self, inputs):
            return self(inputs["x"])

        def rdrop_unpack(self, batch):
            return {"x": batch["x"]}, (batch["y"], batch["w"])

    x, mask = torch.randn(4, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    y, w = torch.randint(5, (4, 3)), torch.rand(4)
    module = Masked(rdrop_distance=Weighted(Categorical()))
    terms = module.rdrop_step({"labeled": {"x": x, "y": y, "w": w}, "unlabeled": {"x": x, "attention_mask": mask}})
    predictions = module.rdrop_draw({"x": x})
    rows = symmetric_kl(*predictions)
    torch.testing.assert_close(terms.extra["kl_unlabeled"], rows[mask > 0].mean() / 2)
    torch.testing.assert_close(terms.extra["kl_labeled"], (w[:, None] * rows).sum() / w.sum() / 3 / 2)


@pytest.mark.parametrize("kind", ["Weighted", "MaskedConsistency"])
def test_from_the_command_line(kind):
    within = {"class_path": "lightning_rdrop.Focal", "init_args": {"gamma": 1.5}}
    config = {"class_path": f"lightning_rdrop.{kind}", "init_args": {"distance": within}}
    parser = ArgumentParser()
    parser.add_argument("--distance", type=Distance)
    made = parser.instantiate_classes(parser.parse_args([f"--distance={json.dumps(config)}"])).distance
    assert (type(made).__name__, made.distance.gamma) == (kind, 1.5)


def test_names_and_a_description():
    distance = Weighted(Focal(gamma=1.5))
    assert distance.term_names == ("focal", "kl")
    assert distance.ignore_index == -100
    assert getattr(Weighted(Gaussian()), "ignore_index", None) is None
    assert spell(describe(distance)) == "Weighted(distance=Focal(gamma=1.5))"
    assert rebuild(describe(distance), Distance).distance.gamma == 1.5
    assert "already a softmax" in distance.prediction_warning(torch.full((2, 2), 0.5))


def test_ctc_is_weighted_by_example():
    logits, lengths = torch.randn(2, 3, 6, 4, dtype=torch.float64), torch.tensor([[6, 5, 4]] * 2)
    tokens, weight = torch.tensor([[1, 2], [3, 3], [2, -100]]), torch.tensor([1.0, 0.0, 2.0])
    terms = RDropLoss(Weighted(CTC()))((logits, lengths), (tokens, weight), 1.0)
    twice = [0, 2, 2]
    wanted = RDropLoss(CTC())((logits[:, twice], lengths[:, twice]), tokens[twice], 1.0)
    torch.testing.assert_close((terms.ce, terms.kl), (wanted.ce, wanted.kl))


def test_ready_modules_validate_on_weighted_targets(fit, rows):
    x, y = rows.dataset.tensors
    weight = torch.arange(30.0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3))
    module = Classifier(network, num_classes=3, rdrop_distance=Weighted(MaskedConsistency(Categorical())))
    loader = DataLoader([(x, ((y, y > 0), weight))], batch_size=None)
    module.val_dataloader = lambda: loader
    metrics = fit(module, loader).callback_metrics
    with torch.no_grad():
        logits = module.eval()(x)
    expected = (weight * F.cross_entropy(logits, y, reduction="none")).sum() / weight.sum()
    torch.testing.assert_close(metrics["val/ce"], expected)
    torch.testing.assert_close(metrics["val/accuracy"], (logits.argmax(-1) == y).float().mean())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("way", ["in place", "pure", "traced", "formula"])
def test_weighted_rows_by_every_way_and_with_a_head(monkeypatch, nested, way):
    """The mean over rows that are there as often as their weight says, of a head that makes no logits too."""
    hidden, head = torch.randn(2, 4, 3, 6, dtype=torch.double), Head(torch.randn(5, 6, dtype=torch.double))
    labels, mask = torch.randint(5, (4, 3)), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1]])
    labels[0, 0] = labels[1, 1] = -100
    weight = torch.tensor([2.0, 1.0, 0.0, 0.5])
    distance = Weighted(MaskedConsistency(Categorical(label_smoothing=0.1)))
    target = ((labels, mask), weight)
    if not nested:
        distance, target, mask = Weighted(Categorical(label_smoothing=0.1)), (labels, weight), labels != -100
    w = weight[:, None].double()
    logits = (hidden @ head.weight.T).requires_grad_()
    rows = F.cross_entropy(
        logits.flatten(0, 2), labels.repeat(2, 1, 1).flatten(), reduction="none", label_smoothing=0.1
    ).view(2, 4, 3)
    ce = (w * rows).sum() / (2 * (w * (labels != -100)).sum())
    kl = (w * mask * symmetric_kl(*logits)).sum() / (w * mask).sum() / 2
    (expected,) = torch.autograd.grad(ce + 3 * kl, logits)

    if way == "pure":
        monkeypatch.setattr(sweep, "_FEW", 0)
        monkeypatch.setattr(compiled, "_compiled", lambda: compiled._write)
    elif way == "formula":
        monkeypatch.setattr(cross_entropy, "_is_plain", lambda tensor: False)
    loss = RDropLoss(distance, compile=way == "pure")
    step = torch.compile(loss, backend="aot_eager") if way == "traced" else loss
    terms = step(logits, target, 3.0)
    torch.testing.assert_close((terms.ce, terms.kl, terms.loss), (ce, kl, ce + 3 * kl))
    torch.testing.assert_close(torch.autograd.grad(terms.loss, logits)[0], expected)
    assert (terms.rows, terms.kl_rows) == ((w * (labels != -100)).sum(), (w * mask).sum())
    if way in ("in place", "pure"):
        with torch.no_grad():
            torch.testing.assert_close(loss(hidden, target, 3.0, head).loss, ce + 3 * kl)


@pytest.mark.parametrize("way", ["in place", "pure", "formula"])
def test_a_row_adds_to_the_term_in_which_it_counts_alone(monkeypatch, way):
    """However far its views are, and however improbable its label."""
    if way == "pure":
        monkeypatch.setattr(sweep, "_FEW", 0)
        monkeypatch.setattr(compiled, "_compiled", lambda: compiled._write)
    elif way == "formula":
        monkeypatch.setattr(cross_entropy, "_is_plain", lambda tensor: False)
    logits = torch.randn(2, 3, 5, dtype=torch.double)
    logits[0, 0, 4] = -torch.inf  # views that are infinitely far, where kl has weight 0
    logits[:, 1, 0] = -torch.inf  # class 0, which stands in for the label that there is not
    logits.requires_grad_()
    labels, mask = torch.tensor([1, -100, 2]), torch.tensor([0, 1, 1])
    terms = RDropLoss(MaskedConsistency(Categorical()), compile=way == "pure")(logits, (labels, mask), 3.0)
    ce = F.cross_entropy(logits[:, [0, 2]].flatten(0, 1), labels[[0, 2]].repeat(2))
    kl = symmetric_kl(*logits[:, 1:]).mean() / 2
    torch.testing.assert_close((terms.ce, terms.kl), (ce, kl))
    ours = torch.autograd.grad(terms.loss, logits)[0]
    (from_kl,) = torch.autograd.grad(3 * kl, logits, allow_unused=True)
    (from_ce,) = torch.autograd.grad(ce, logits)
    torch.testing.assert_close(ours, from_ce + from_kl.nan_to_num(0.0))
