import csv
import math

import pytest
import pytorch_lightning as pl
import torch
from conftest import Net
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import (
    VAT,
    AlphaScheduler,
    Average,
    Bernoulli,
    Categorical,
    Cosine,
    FromDistribution,
    Gaussian,
    Head,
    JensenShannon,
    MaskedConsistency,
    RDropMixin,
    symmetric_kl,
)
from lightning_rdrop.callbacks import ExactAccumulation, UnlabeledWeightScheduler
from tests.networks import training_outputs


def batch_of(unlabeled=7, seed=0):
    """Five labelled examples, and others without labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 8, generator=generator)
    return {"labeled": (x, torch.arange(5) % 3), "unlabeled": torch.randn(unlabeled, 8, generator=generator)}


def kl(views):
    """The published consistency of two views, half the mean of the symmetric KL."""
    return symmetric_kl(*views.double()).mean() / 2


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize(("weight", "labeled_weight"), [(1.0, 1.0), (0.3, 1.0), (0.3, 2.0), (1.0, 0.0)])
def test_the_loss_is_the_formula_on_the_captured_views(small, passes, weight, labeled_weight):
    module = small(
        rdrop_alpha=2.0, rdrop_passes=passes, rdrop_unlabeled_weight=weight, rdrop_labeled_weight=labeled_weight
    ).double()
    batch = batch_of()
    x, y = batch["labeled"][0].double(), batch["labeled"][1]
    seen = training_outputs(module)
    terms = module.rdrop_step({"labeled": (x, y), "unlabeled": batch["unlabeled"].double()})
    rows = torch.cat(seen)
    views = 2 if labeled_weight else 1  # Su's recipe: labelled rows have plain cross-entropy, in one pass
    assert len(rows) == views * 5 + 2 * 7
    labeled, unlabeled = rows[: views * 5], rows[views * 5 :].unflatten(0, (2, 7))
    ce = F.cross_entropy(labeled, y.repeat(views))
    expected = weight * kl(unlabeled)
    if labeled_weight:
        torch.testing.assert_close(terms.extra["kl_labeled"], kl(labeled.unflatten(0, (2, 5))))
        expected = expected + labeled_weight * kl(labeled.unflatten(0, (2, 5)))
    torch.testing.assert_close((terms.ce, terms.kl), (ce, expected))
    torch.testing.assert_close(terms.extra["kl_unlabeled"], kl(unlabeled))
    assert not any(getattr(value, "requires_grad", False) for value in terms.extra.values())
    torch.testing.assert_close(terms.loss, ce + 2.0 * expected)
    torch.testing.assert_close(gradients(module, terms.loss), gradients(module, ce + 2.0 * expected))
    assert terms.examples == 5
    torch.testing.assert_close(terms.prediction, labeled[:5])


def test_with_weight_0_training_is_supervised_to_the_bit(small):
    module, batch = small(rdrop_unlabeled_weight=0.0, rdrop_regularizers=[VAT()]), batch_of()
    seen, results = training_outputs(module), []
    for given in (batch, batch["labeled"]):
        torch.manual_seed(3)
        terms = module.rdrop_step(given)
        results.append([terms.loss, terms.kl, terms.ce, terms.prediction, *gradients(module, terms.loss)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert [len(output) for output in seen] == [10, 5, 5, 5] * 2  # and no unlabelled pass
    assert "kl_unlabeled" not in terms.extra


def test_twice_the_unlabelled_examples_have_the_same_expected_kl(small):
    """A mean over their own rows; in one over the rows of both parts, theirs would weigh 7 / 12 and then 14 / 19."""
    module, one = small(p=0.5), batch_of(unlabeled=7)
    one["unlabeled"] *= 5  # their kl is far larger
    two = {"labeled": one["labeled"], "unlabeled": one["unlabeled"].repeat(2, 1)}
    kls = {
        name: torch.stack([module.rdrop_step(batch).kl for _ in range(400)]) for name, batch in (("1", one), ("2", two))
    }
    error = sum(values.var() / len(values) for values in kls.values()).sqrt()
    assert (kls["1"].mean() - kls["2"].mean()).abs() < 4 * error < 0.1 * kls["1"].mean()


@pytest.mark.parametrize("kind", ["dict", "CombinedLoader"])
def test_two_loaders_in_a_trainer(fit, small, rows, kind, tmp_path):
    """Thirty labelled examples by 4, and fifty without labels by 5: ten steps, in which the labelled begin anew."""
    sizes, predictions = [], []

    class Watched(small):
        def log(self, name, value, *args, batch_size=None, **kwargs):
            sizes.append(batch_size)
            super().log(name, value, *args, batch_size=batch_size, **kwargs)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            predictions.append(len(outputs["prediction"]))

    loaders = {"labeled": rows, "unlabeled": DataLoader(TensorDataset(torch.randn(50, 8)), batch_size=5)}
    logger = CSVLogger(tmp_path, name="")
    fit(
        Watched(rdrop_regularizers=[VAT(weight=0.5)]),
        loaders if kind == "dict" else CombinedLoader(loaders, "max_size_cycle"),
        [AlphaScheduler("linear", ramp=5, peak=3.0), UnlabeledWeightScheduler("linear", ramp=4, peak=0.5)],
        logger=logger,
        log_every_n_steps=1,
    )
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        table = [
            {key.removeprefix("train/"): float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
            if row["train/loss"]  # the last row has the means of the epoch
        ]
    assert [row["unlabeled_weight"] for row in table] == [0, 0.125, 0.25, 0.375] + [0.5] * 6
    assert ["kl_unlabeled" in row for row in table] == [False] + [True] * 9
    for row in table:
        assert row["loss"] == pytest.approx(row["ce"] + row["alpha"] * row["kl"] + 0.5 * row["vat"], rel=1e-5)
        for name in ("kl", "vat"):
            assert row.get(f"{name}_labeled", row[name]) > 0
            if row["unlabeled_weight"]:
                both = row[f"{name}_labeled"] + row["unlabeled_weight"] * row[f"{name}_unlabeled"]
                assert row[name] == pytest.approx(both, rel=1e-5)
    batches = [4] * 7 + [2] + [4] * 2
    assert predictions == batches
    assert sorted(sizes) == sorted(
        size for size, more in zip(batches, [0] + [3] * 9, strict=True) for _ in range(9 + more)
    )
    assert {"loss", "ce", "kl", "alpha"} <= set(table[0])


def test_a_schedule_of_what_no_batch_has_is_a_warning(fit, small, rows):
    scheduler = UnlabeledWeightScheduler()
    for _ in range(2):  # of each training
        with pytest.warns(UserWarning, match="no unlabeled part") as warned:
            fit(small(), rows, [scheduler])
        assert sum("UnlabeledWeightScheduler has no effect" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize("made_by", ["loader", "step"])
def test_a_schedule_of_unlabelled_examples_is_no_warning(fit, small, rows, made_by, recwarn):
    class Making(small):
        def training_step(self, batch, batch_idx):
            return super().training_step({"labeled": batch, "unlabeled": batch[0]}, batch_idx)

    both = {"labeled": rows, "unlabeled": DataLoader(torch.randn(30, 8), 4)}
    module, loader = (small(), both) if made_by == "loader" else (Making(), rows)
    fit(module, loader, [UnlabeledWeightScheduler(ramp=0.5)])
    assert not [warning for warning in recwarn if "unlabeled" in str(warning.message)]


def test_the_weight_is_put_back_and_resumed(fit, small, tmp_path):
    def train(module, callbacks, **trainer):
        loaders = {"labeled": DataLoader(TensorDataset(*batch_of()["labeled"]), 1)}
        loaders["unlabeled"] = DataLoader(batch_of(10)["unlabeled"], 2)
        fit(module, loaders, callbacks, max_epochs=2, **trainer)

    class Watch(pl.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights.append(pl_module.rdrop_unlabeled_weight)

    def both():
        return [AlphaScheduler(ramp=0.5), UnlabeledWeightScheduler("linear", ramp=0.8)]

    module, whole, rest = small(rdrop_unlabeled_weight=2.0), Watch(), Watch()
    save = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    train(module, [*both(), whole, save], enable_checkpointing=True)
    assert whole.weights == pytest.approx([2 * min(1, step / 8) for step in range(10)])
    assert module.rdrop_unlabeled_weight == 2.0
    train(small(rdrop_unlabeled_weight=2.0), [*both(), rest], resume=tmp_path / "step=5.ckpt")
    assert rest.weights == whole.weights[5:]


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "unlabeled",
    [X, (X,), [X], (X, torch.arange(6)), {"x": X}, {"x": X, "label": torch.full((6,), 99)}, {"x": X, "target": None}],
    ids=["tensor", "1-tuple", "1-list", "pair", "mapping", "labels out of range", "no label"],
)
def test_whatever_unlabelled_examples_come_in(small, unlabeled):
    module, labeled = small(), batch_of()["labeled"]
    seen = training_outputs(module)
    terms = module.rdrop_step({"labeled": labeled, "unlabeled": unlabeled})
    assert [len(output) for output in seen] == [10, 12]
    torch.testing.assert_close(terms.extra["kl_unlabeled"], kl(seen[1].unflatten(0, (2, 6))).float())


class Tagger(RDropMixin, pl.LightningModule):
    """Three tags for each token."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(nn.Embedding(20, 16), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, input_ids, attention_mask=None):
        return self.network(input_ids)


@pytest.mark.parametrize("marked", ["by the mask", "by labels"])
def test_tokens_that_do_not_count_do_not(marked):
    module, ids = Tagger(), torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    labeled = {"input_ids": ids, "labels": ids % 3}
    # labels go before the mask: of the second sentence only the first token counts
    labels = (ids % 3).masked_fill(torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]).bool(), -100)
    unlabeled = {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if marked == "by labels" else {})
    seen = training_outputs(module)
    terms = module.rdrop_step({"labeled": labeled, "unlabeled": unlabeled})
    counted = mask == 1 if marked == "by the mask" else labels != -100
    views = seen[1].unflatten(0, (2, 3))
    torch.testing.assert_close(terms.extra["kl_unlabeled"], kl(views[:, counted]).float())
    assert abs(terms.extra["kl_unlabeled"] / kl(views) - 1) > 0.01  # so that padding would be noticed

    module.rdrop_regularizers.append(VAT(at="network.0"))
    seen.clear()
    terms = module.rdrop_step({"labeled": labeled, "unlabeled": unlabeled})
    clean, _, moved = seen[5:]
    rows = (clean.softmax(-1) * (clean.log_softmax(-1) - moved.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(terms.extra["vat_unlabeled"], rows[counted].mean().detach())


class Sums(Gaussian):
    """It keeps no rows that a mask could choose from."""

    def between(self, first, second, target=None):
        average = super().between(first, second, target)
        return Average(average.total, average.weight)


class Texts(Gaussian):
    """A row is a text."""

    def between(self, first, second, target=None):
        return Average.of((first - second).square().mean((1, 2)))


BY_TOKEN = [
    Bernoulli(),
    Bernoulli(ignore_value=-1),
    Gaussian(ignore_value=math.nan),
    Cosine(),
    FromDistribution(lambda x: torch.distributions.Categorical(logits=x)),
    MaskedConsistency(Bernoulli()),
]


@pytest.mark.parametrize(
    ("distance", "by_token"), [*((distance, True) for distance in BY_TOKEN), (Sums(), False), (Texts(), False)]
)
@pytest.mark.parametrize("named", [False, True])
def test_padding_does_not_count_without_an_ignore_index(distance, by_token, named):
    class Named(Tagger):
        def rdrop_predict(self, inputs):
            prediction = super().rdrop_predict(inputs)
            return {"tags": prediction} if named else prediction

        def rdrop_unpack(self, batch):
            inputs, target = super().rdrop_unpack(batch)
            return inputs, ({"tags": target} if named else target)

    module = Named(rdrop_distance={"tags": distance} if named else distance, rdrop_regularizers=[VAT(at="network.0")])
    ids, mask = torch.arange(12).view(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    target = ids % 3 if isinstance(distance, FromDistribution) else torch.rand(3, 4, 3)
    target = (target, mask) if isinstance(distance, MaskedConsistency) else target
    seen = training_outputs(module)
    terms = module.rdrop_step(
        {
            "labeled": {"input_ids": ids, "labels": target},
            "unlabeled": {"input_ids": ids, "attention_mask": mask},
        }
    )
    outputs = [*seen[-4].unflatten(0, (2, 3)), seen[-3], seen[-1]]  # two views, VAT's clean and last prediction
    rows = [output[mask == 1] if by_token else output for output in outputs]
    kl = terms.extra[f"{module.rdrop_distance.term_names[1]}_unlabeled"]
    torch.testing.assert_close(kl, distance.between(*rows[:2]).mean.detach() / 2)
    torch.testing.assert_close(terms.extra["vat_unlabeled"], distance.directed(*rows[2:]).mean.detach())


def test_regularizers_that_need_targets_pass_the_labelled_examples_alone(small):
    from lightning_rdrop import FGM

    module = small(rdrop_views=1, rdrop_regularizers=[FGM(), VAT()], rdrop_unlabeled_weight=0.5)
    seen = training_outputs(module)
    terms = module.rdrop_step(batch_of())
    assert [len(output) for output in seen] == [5, *[5, 5], *[5, 5, 5], *[7, 7, 7]]  # ce, FGM, VAT, and VAT
    assert terms.kl == 0
    assert set(terms.extra) == {
        "fgm", "vat", "vat_labeled", "vat_unlabeled", "kl_labeled", "kl_unlabeled", "unlabeled_weight",
    }  # fmt: skip
    torch.testing.assert_close(terms.loss.detach(), terms.ce + terms.extra["fgm"] + terms.extra["vat"])
    torch.testing.assert_close(terms.extra["vat"], terms.extra["vat_labeled"] + 0.5 * terms.extra["vat_unlabeled"])


def test_one_view_is_plain_training_whatever_else_is_in_the_batch(small):
    module = small(rdrop_views=1)
    seen = training_outputs(module)
    terms = module.rdrop_step(batch_of())
    assert [len(output) for output in seen] == [5]
    assert terms.loss == terms.ce


@pytest.mark.parametrize(("distance", "name"), [(JensenShannon(), "js"), (Bernoulli(), "kl")])
def test_the_parts_are_named_by_the_distance(small, distance, name):
    batch = batch_of()
    if name == "kl":
        batch["labeled"] = batch["labeled"][0], F.one_hot(batch["labeled"][1], 3)
    terms = small(rdrop_distance=distance).rdrop_step(batch)
    assert terms.extra[f"{name}_labeled"] > 0
    torch.testing.assert_close(terms.kl, terms.extra[f"{name}_labeled"] + terms.extra[f"{name}_unlabeled"])


def test_dead_dropout_is_noticed_where_only_unlabelled_examples_have_views(small):
    with pytest.raises(ValueError, match=r"network\.2"):
        small(p=0.0, rdrop_labeled_weight=0.0).rdrop_step(batch_of())


def test_nan_of_unlabelled_examples_is_noticed(small):
    batch = batch_of()
    batch["unlabeled"][2] = math.nan
    with pytest.raises(ValueError, match="view 0 of the unlabeled part is NaN since batch 0"):
        small().rdrop_step(batch)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("unlabeled", None, r"batch\['unlabeled'\] is None.*max_size_cycle"),
        ("labeled", None, r"batch\['labeled'\] is None.*max_size_cycle"),
        ("unlabeled", (X, torch.full((6,), -100)), "No row of the unlabeled part counts.*Remove the labels"),
        ("unlabeled", (X, X, X), "a tuple of 3 elements.*override"),
    ],
)
def test_parts_that_are_none(small, part, value, message):
    with pytest.raises(ValueError, match=message):
        small().rdrop_step(batch_of() | {part: value})


@pytest.mark.parametrize("name", ["rdrop_unlabeled_weight", "rdrop_labeled_weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "1", True])
def test_bad_weights(small, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
        small(**{name: value})
    module = small()
    setattr(module, name, value)
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
        module.rdrop_step(batch_of())


def test_a_fused_head_is_refused(small):
    class Fused(small):
        def rdrop_head(self):
            return Head(self.network[3].weight, self.network[3].bias)

        def rdrop_hidden(self, inputs):
            return self.network[:3](inputs)

    with pytest.raises(ValueError, match=r"fused head .* no target.*fused_head=False"):
        Fused().rdrop_step(batch_of())


def test_exact_accumulation_is_refused(fit, small, rows):
    with pytest.raises(ValueError, match="one denominator, but labeled and unlabeled examples are two means"):
        fit(small(), {"labeled": rows, "unlabeled": rows}, [ExactAccumulation()])


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_an_empty_part_adds_nothing(small, passes):
    module, batch = small(rdrop_passes=passes, rdrop_regularizers=[VAT()]), batch_of()
    results = []
    for unlabeled in (torch.zeros(0, 8), None):
        torch.manual_seed(3)
        terms = module.rdrop_step(batch | {"unlabeled": unlabeled} if unlabeled is not None else batch["labeled"])
        results.append([terms.loss, terms.ce, terms.kl, *gradients(module, terms.loss)])
    torch.testing.assert_close(*results)
    terms = module.rdrop_step(batch | {"unlabeled": torch.zeros(0, 8)})
    assert terms.extra["kl_unlabeled"] == terms.extra["vat_unlabeled"] == 0


def test_a_graph_without_edges_is_not_an_empty_part():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x, edges):
            x = nn.functional.dropout(x, 0.5, self.training)
            return self.layer(x.index_add(0, edges[:, 1], x[edges[:, 0]]))

    def graph(edges):
        return {"x": torch.randn(16, 8), "edges": torch.zeros(edges, 2, dtype=torch.long)}

    module = Net(Graph(), rdrop_passes="separate")
    labeled = graph(4) | {"label": torch.zeros(16, dtype=torch.long)}
    terms = module.rdrop_step({"labeled": labeled, "unlabeled": graph(0)})
    assert terms.extra["kl_unlabeled"] > 0


@pytest.mark.parametrize("distance", [Categorical(), Gaussian()])
def test_a_pair_of_inputs_is_no_input_and_target(small, distance):
    labels = torch.zeros(5).long() if isinstance(distance, Categorical) else torch.zeros(5, 3)
    x, first, second = torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match=r"pair of tensors of the same shape, \(5, 8\).*Views\(first, second\)"):
        small(rdrop_distance=distance).rdrop_step({"labeled": (x, labels), "unlabeled": (first, second)})


def test_a_pair_of_an_image_and_its_target_is_none_of_two_inputs(small):
    module, pair = small(rdrop_distance=Gaussian()), (torch.randn(5, 8), torch.randn(5, 8))
    module.network[3] = nn.Linear(16, 8)
    unlabeled = pair[0], torch.full_like(pair[1], torch.nan)
    assert module.rdrop_step({"labeled": pair, "unlabeled": unlabeled}).extra["kl_unlabeled"] > 0
    assert module.rdrop_step({"labeled": pair, "unlabeled": pair}).extra["kl_unlabeled"] > 0
