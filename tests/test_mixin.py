import csv
import dataclasses
import math
import warnings
from collections import UserDict
from typing import NamedTuple

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import Small
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import FGM, VAT, AlphaScheduler, Categorical, Distance, GradientPenalty, RDropMixin, mc_predict
from lightning_rdrop.callbacks import ExactAccumulation
from lightning_rdrop.terms import Average
from tests.networks import training_outputs
from tests.reference import paper_loss


def batch_of(examples=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 8, generator=generator), torch.arange(examples) % 3


LOGGED = {"train/loss", "train/ce", "train/kl", "train/alpha", "train/ce_epoch", "train/kl_epoch"}


class Capture:
    """The views that a module made, through a forward hook on its head."""

    def __init__(self, module):
        self.rows = training_outputs(module)


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 4.0])
def test_loss_and_gradients_are_the_formula_on_the_captured_views(small, passes, alpha):
    module, (x, y) = small(rdrop_alpha=alpha, rdrop_passes=passes).double(), batch_of()
    captured = Capture(module)
    terms = module.rdrop_step((x.double(), y))
    views = torch.cat(captured.rows).unflatten(0, (2, 5))
    expected = paper_loss(views[0], views[1], y, alpha) / 2
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    given = torch.autograd.grad(terms.loss, parameters, retain_graph=True)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(terms.prediction, views[0])
    by_hand = torch.autograd.grad(terms.ce + alpha * terms.kl, parameters, retain_graph=True)
    torch.testing.assert_close(by_hand, wanted)
    assert terms.prediction.requires_grad


def test_the_number_of_forward_passes(small):
    x, y = batch_of()
    rows = {}
    for passes, views in (("joint", 1), ("joint", 2), ("joint", 3), ("separate", 3)):
        module = small(rdrop_passes=passes, rdrop_views=views)
        captured = Capture(module)
        module.rdrop_step((x, y))
        rows[passes, views] = [len(output) for output in captured.rows]
    assert rows == {("joint", 1): [5], ("joint", 2): [10], ("joint", 3): [15], ("separate", 3): [5, 5, 5]}


def test_one_view_is_ordinary_training(small):
    x, y = batch_of()
    torch.manual_seed(3)
    terms = small(rdrop_views=1).rdrop_step((x, y))
    torch.manual_seed(3)
    plain = F.cross_entropy(small()(x), y)
    assert terms.loss == terms.ce == plain
    assert terms.kl == 0


class InPlace(Small):
    """Scales its inputs, in place or not."""

    def __init__(self, in_place=True, **kwargs):
        super().__init__(**kwargs)
        self.in_place = in_place

    def forward(self, x):
        return self.network(x.mul_(10) if self.in_place else x * 10)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rdrop_passes": "separate"},
        {"rdrop_duplicate_at": "network.2"},
        {"rdrop_views": 1, "rdrop_regularizers": [VAT(at="network.0"), FGM(at="network.0")]},
    ],
)
def test_a_forward_that_changes_its_inputs_in_place(arguments):
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        module, (x, y) = InPlace(in_place, **arguments), batch_of()
        terms = module.rdrop_step((x, y))
        terms.loss.backward()
        assert torch.equal(x, batch_of()[0])
        found.append((terms.ce, terms.kl, terms.extra, module.network[0].weight.grad))
    torch.testing.assert_close(*found)


def test_three_views_by_hand(small):
    module, (x, y) = small(rdrop_views=3, rdrop_alpha=2.0).double(), batch_of()
    captured = Capture(module)
    terms = module.rdrop_step((x.double(), y))
    log_p = captured.rows[0].log_softmax(-1).unflatten(0, (3, 5))
    ce = sum(F.nll_loss(log_p[r], y) for r in range(3)) / 3
    kl = 0
    for r in range(3):  # row r takes half the mean over the other views j of KL(p_j || p_r)
        for j in {0, 1, 2} - {r}:
            kl += 0.5 * (log_p[j].exp() * (log_p[j] - log_p[r])).sum(-1).mean() / 2 / 3
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(terms.loss, ce + 2.0 * kl)


class Named(RDropMixin, pl.LightningModule):
    """A forward with names, as that of a Hugging Face model, which counts what it was given."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = nn.Embedding(50, 16)
        self.network = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, input_ids, attention_mask=None, options=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.network((self.embedding(input_ids) * mask.unsqueeze(-1)).mean(1))
        return type("Output", (), {"logits": logits})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def named_inputs():
    return {"input_ids": torch.arange(20).view(4, 5), "attention_mask": torch.ones(4, 5)}


@dataclasses.dataclass
class Example:
    inputs: dict
    target: torch.Tensor


def of_kind(kind):
    inputs, y = named_inputs(), torch.tensor([0, 1, 2, 0])
    if kind == "nested":
        return (inputs | {"options": {"names": ["a", "b", "c", "d"], "scale": 2.0}}, y)
    if kind == "BatchEncoding":
        transformers = pytest.importorskip("transformers")
        return transformers.BatchEncoding(inputs | {"labels": y})
    return {
        "tuple": (inputs["input_ids"], y),
        "list": [inputs["input_ids"], y],
        "labels": inputs | {"labels": y},
        "label": inputs | {"label": y},
        "UserDict": UserDict(inputs | {"target": y}),
        "pair of mapping": (inputs, y),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["tuple", "list", "labels", "label", "UserDict", "pair of mapping", "nested", "BatchEncoding"]
)
def test_batches_of_every_kind_in_a_trainer(fit, kind, tmp_path):
    batch = of_kind(kind)
    module = Named()
    before = module.embedding.weight.detach().clone()
    logger = CSVLogger(tmp_path, name="")
    fit(module, DataLoader([batch] * 3, batch_size=None), logger=logger, log_every_n_steps=1)
    assert (module.embedding.weight != before).any()
    assert all(float(row["train/kl"]) > 0 for row in logged(logger))


def test_a_batch_of_an_own_kind_needs_one_hook(fit):
    class Own(Named):
        def rdrop_unpack(self, batch):
            return batch.inputs, batch.target

    batch = Example(named_inputs(), torch.tensor([0, 1, 2, 0]))
    trainer = fit(Own(), DataLoader([batch], batch_size=None))
    assert trainer.callback_metrics["train/kl"] > 0
    with pytest.raises(ValueError, match=r"The batch is a Example, .* override rdrop_unpack"):
        Named().rdrop_step(batch)


def test_the_target_of_a_named_tuple_is_read_by_name(small):
    class Swapped(NamedTuple):
        target: torch.Tensor
        image: torch.Tensor

    class Plain(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    x, y = batch_of()
    for batch in (Swapped(y, x), Plain(x, y)):
        assert [each.data_ptr() for each in small().rdrop_unpack(batch)] == [x.data_ptr(), y.data_ptr()]


def test_a_list_of_images_is_named(small):
    class Detector(small):
        def forward(self, images):
            return torch.stack([self.network(image.mean((1, 2)).repeat(2)[:8]) for image in images])

    images, y = [torch.randn(4, 5, 5) for _ in range(3)], torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=r"a list, cannot be duplicated: .* such as an image \(4, 5, 5\).*separate"):
        Detector().rdrop_step((images, y))
    separate = Detector(rdrop_passes="separate")
    assert separate.rdrop_step((images, y)).examples == 3
    with pytest.raises(ValueError, match="so it is unclear which rows belong together"):
        separate.rdrop_step((images, [torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(1, 4)]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(2, 8),), "a tuple of 1 elements"),
        ([torch.ones(2, 8)] * 3, "a list of 3 elements"),
        ({"input_ids": torch.ones(2, 8)}, r"a mapping with the keys \['input_ids'\]"),
        ({"x": torch.ones(2, 8), "label": 1, "labels": 1}, "a mapping with the keys"),
        (torch.ones(2, 8), "a Tensor"),
    ],
)
def test_a_batch_without_a_target_is_refused(small, batch, message):
    with pytest.raises(ValueError, match=message + ".*labels, label, target.*override rdrop_unpack"):
        small().rdrop_step(batch)


def logged(logger):
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def test_logged_loss_is_ce_plus_alpha_kl_in_every_row(fit, small, rows, tmp_path):
    from lightning_rdrop import AlphaScheduler

    logger = CSVLogger(tmp_path, name="")
    fit(small(), rows, [AlphaScheduler(ramp=8)], logger=logger, log_every_n_steps=1, max_epochs=2)
    table = logged(logger)
    assert len(table) == 16
    for row in table:
        loss, ce, kl, alpha = (float(row[f"train/{name}"]) for name in ("loss", "ce", "kl", "alpha"))
        assert loss == pytest.approx(ce + alpha * kl, rel=1e-6)
        assert kl > 0


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_the_logged_batch_size_counts_examples_not_views(fit, small, rows, passes):
    sizes = []

    class Watched(small):
        def log(self, name, value, *args, batch_size=None, **kwargs):
            sizes.append((name, batch_size))
            super().log(name, value, *args, batch_size=batch_size, **kwargs)

    fit(Watched(rdrop_views=3, rdrop_passes=passes), rows)
    for name in ("train/loss", "train/ce", "train/kl", "train/alpha"):
        assert [size for logged, size in sizes if logged == name] == [4] * 7 + [2]


def test_the_step_returns_its_terms_and_a_prediction_for_metrics(fit, small, rows):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs)
            assert outputs["prediction"].shape == (len(batch[0]), 3)
            assert not any(value.requires_grad for value in outputs.values())

    fit(small(), rows, [Watch()])
    assert len(seen) == 8
    assert set(seen[0]) == {"loss", "ce", "kl", "prediction"}


def test_a_distance_of_ones_own_names_its_terms(fit, small):
    class Squared(Distance):
        term_names = ("mse", "gap")

        def to_target(self, prediction, target):
            return Average((prediction - target).square().sum(), torch.tensor(float(target.numel())))

        def between(self, first, second, target=None):
            return self.to_target(first, second)

    loader = DataLoader(TensorDataset(torch.randn(8, 8), torch.randn(8, 3)), batch_size=4)
    module = small(rdrop_distance=Squared(), rdrop_alpha=0.5)
    metrics = fit(module, loader).callback_metrics
    assert set(metrics) == {f"train/{name}" for name in ("loss", "mse", "gap", "alpha", "mse_epoch", "gap_epoch")}
    torch.testing.assert_close(metrics["train/loss"], metrics["train/mse"] + 0.5 * metrics["train/gap"])


@pytest.mark.parametrize("guard", ["error", "warn", "off"])
@pytest.mark.parametrize("case", ["eval", "p = 0"])
def test_dead_dropout_is_never_silent(fit, small, rows, case, guard):
    module = small(rdrop_guard=guard, p=0.0 if case == "p = 0" else 0.3)
    if case == "eval":
        module.network.eval()  # as from_pretrained hands it out; fit keeps it since Lightning 2.2
    culprit = {"eval": r"eval mode .*network\.2.*\.train\(\)", "p = 0": r"p = 0: network\.2.*set_probability"}[case]
    if guard == "error":
        with pytest.raises(ValueError, match=culprit):
            fit(module, rows)
    elif guard == "warn":
        with pytest.warns(UserWarning, match=culprit):
            fit(module, rows)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", f"(?s).*{culprit}")
            fit(module, rows)


def test_the_guard_looks_again_when_the_mode_changes(fit, small, rows):
    class Switch(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.network.eval()

    with pytest.raises(ValueError, match=r"network\.2"):
        fit(small(), rows, [Switch()], max_epochs=2)


def test_the_guard_leaves_alpha_0_and_one_view_in_peace(fit, small, rows):
    fit(small(p=0.0, rdrop_alpha=0.0), rows)
    fit(small(p=0.0, rdrop_views=1), rows)
    module = small(p=0.0)
    module.rdrop_alpha = 0.0  # set later, it is on purpose as well
    fit(module, rows)


def test_the_guard_draws_nothing_where_the_views_differ(small):
    module = small()
    captured = Capture(module)
    for seed in range(3):
        module.rdrop_step(batch_of(seed=seed))
    assert len(captured.rows) == 3


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf, "4", True, None])
def test_a_bad_alpha_is_refused_at_once_and_in_the_step(small, alpha):
    with pytest.raises(ValueError, match=r"rdrop_alpha must be a finite number >= 0.*" + repr(alpha)):
        small(rdrop_alpha=alpha)
    module = small()
    module.rdrop_alpha = alpha
    with pytest.raises(ValueError, match="rdrop_alpha must be"):
        module.rdrop_step(batch_of())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rdrop_views": 0}, ValueError, "rdrop_views must be an int >= 1.*got 0"),
        ({"rdrop_views": 2.0}, ValueError, r"rdrop_views must be an int >= 1.*got 2\.0"),
        ({"rdrop_views": True}, ValueError, "rdrop_views must be an int >= 1.*got True"),
        ({"rdrop_views": np.float64(2)}, ValueError, r"rdrop_views must be an int >= 1.*got np\.float64\(2\.0\)"),
        ({"rdrop_passes": "both"}, ValueError, "rdrop_passes must be one of 'joint', 'separate', got 'both'"),
        ({"rdrop_guard": "none"}, ValueError, "rdrop_guard must be one of 'error', 'warn', 'off', got 'none'"),
        ({"rdrop_distance": "kl"}, TypeError, "rdrop_distance must be a Distance, a dict of such, or None, got 'kl'"),
        (
            {"rdrop_distance": nn.CrossEntropyLoss()},
            TypeError,
            r"got CrossEntropyLoss\(\)\. For a weighted cross-entropy use Categorical\(weight=\.\.\.\); for another",
        ),
        ({"rdrop_alhpa": 4.0}, TypeError, "RDropMixin has no argument rdrop_alhpa. Did you mean rdrop_alpha?"),
        ({"alpha": 4.0}, TypeError, "^Small: unexpected argument alpha. Did you mean rdrop_alpha?"),
        ({"r_drop_view": 3}, TypeError, "unexpected argument r_drop_view. Did you mean rdrop_views?"),
        ({"width": 3}, TypeError, "unexpected keyword argument 'width'"),
        (
            {"rdrop_0123456789": 4.0},
            TypeError,
            "RDropMixin has no argument rdrop_0123456789. The arguments are rdrop_alpha, rdrop_views",
        ),
    ],
)
def test_bad_arguments(small, arguments, error, message):
    with pytest.raises(error, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rdrop_views", 0, "rdrop_views must be an int >= 1, got 0"),
        ("rdrop_passes", "seperate", "rdrop_passes must be one of 'joint', 'separate', got 'seperate'"),
        ("rdrop_guard", "none", "rdrop_guard must be one of 'error', 'warn', 'off', got 'none'"),
        ("rdrop_labeled_weight", -1, "rdrop_labeled_weight must be a finite number >= 0, got -1"),
    ],
)
def test_bad_attributes_are_reported_when_training_starts(fit, small, rows, name, value, message):
    module = small()
    setattr(module, name, value)
    with pytest.raises(ValueError, match=message):
        fit(module, rows)


def test_separate_passes_that_are_set_after_a_split_are_reported(fit, small, rows):
    module = small(rdrop_duplicate_at="auto")
    module.rdrop_passes = "separate"
    with pytest.raises(ValueError, match="rdrop_duplicate_at='auto' needs one pass for all views"):
        fit(module, rows)


def test_an_int_of_numpy_is_an_int(small):
    module = small(rdrop_views=np.int64(3))
    assert type(module.rdrop_views) is int
    assert module.rdrop_draw(torch.randn(4, 8)).shape == (3, 4, 3)


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match=r"class Wrong\(RDropMixin, LightningModule\)"):

        class Wrong(pl.LightningModule, RDropMixin):
            pass


def test_it_works_under_lightning_pytorch(rows, fit):
    from lightning_rdrop import AlphaScheduler

    class Module(RDropMixin, lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3))

        def forward(self, x):
            return self.network(x)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = fit(Module(), rows, [AlphaScheduler("linear", ramp=4)], lightning=lightning.pytorch)
    assert trainer.callback_metrics["train/alpha"] == 4.0
    assert trainer.callback_metrics["train/kl"] > 0


def test_a_checkpoint_is_safe_to_load_and_has_the_keys_of_the_plain_class(fit, small, rows, tmp_path):
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    module = small(rdrop_alpha=2.5, rdrop_distance=Categorical(weight=torch.tensor([1.0, 2.0, 3.0])))
    trainer = fit(module, rows)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    Plain().load_state_dict(saved["state_dict"])
    assert saved["hyper_parameters"] == {"p": 0.3, "rdrop_alpha": 2.5}
    again = small.load_from_checkpoint(tmp_path / "last.ckpt", rdrop_distance=Categorical())
    assert again.rdrop_alpha == 2.5


def test_manual_optimization_with_the_step_and_its_log(fit, small, rows):
    class Manual(small):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            terms = self.rdrop_step(batch)
            self.rdrop_log(terms)
            self.optimizers().zero_grad()
            self.manual_backward(terms.loss)
            self.optimizers().step()

    module = Manual()
    before = module.network[0].weight.detach().clone()
    trainer = fit(module, rows)
    assert (module.network[0].weight != before).any()
    assert set(trainer.callback_metrics) == LOGGED


def test_validation_runs_once(fit, small, rows):
    seen = []

    class Evaluated(small):
        def validation_step(self, batch, batch_idx):
            seen.append(len(self(batch[0])))

        def val_dataloader(self):
            return rows

    fit(Evaluated(), rows, num_sanity_val_steps=0)
    assert seen == [4] * 7 + [2]


class Trained(pl.LightningModule):
    """A module of somebody else's, with a step of its own."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_step_that_the_mixin_replaces_is_named_once():
    with pytest.warns(UserWarning, match=r"replaces Trained\.training_step.*rdrop_step"):
        both = type("Both", (RDropMixin, Trained), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type("Child", (both,), {})
        type("Kept", (RDropMixin, Trained), {"training_step": lambda self, batch, _: self.rdrop_step(batch).loss})


class Plain(Named):
    """Hands the logits out in a dict, or in a tuple."""

    kind = dict

    def forward(self, input_ids, attention_mask):
        logits = super().forward(input_ids, attention_mask).logits
        return {"logits": logits} if self.kind is dict else (logits, input_ids)


def test_logits_in_a_plain_dict():
    terms = Plain().rdrop_step(named_inputs() | {"labels": torch.tensor([0, 1, 2, 0])})
    assert terms.prediction.shape == (4, 3)


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_a_tuple_is_refused_in_either_kind_of_passes(passes):
    module = Plain(rdrop_passes=passes)
    module.kind = tuple
    with pytest.raises(TypeError, match=r"The prediction is a tuple.*override rdrop_predict"):
        module.rdrop_step(named_inputs() | {"labels": torch.tensor([0, 1, 2, 0])})


def forward_of(source):
    """A module whose forward has this signature."""
    names = {}
    exec(f"def forward(self, {source}):\n    raise AssertionError('called')", names)
    return type("Other", (Named,), names)()


@pytest.mark.parametrize(
    ("signature", "mismatch"),
    [
        ("batch", "missing a required argument: 'batch'"),
        ("input_ids, attention_mask, labels", "missing a required argument: 'labels'"),
        ("tokens, attention_mask", "missing a required argument: 'tokens'"),
        ("input_ids", "got an unexpected keyword argument 'attention_mask'"),
    ],
)
def test_a_forward_that_takes_other_arguments_is_told_the_hook(signature, mismatch):
    with pytest.raises(
        TypeError, match=rf"(?s)Other\.forward\({signature}\).*{mismatch}.*def rdrop_predict\(self, inputs"
    ):
        forward_of(signature).rdrop_step(named_inputs() | {"labels": torch.tensor([0, 1, 2, 0])})


def test_a_type_error_of_ones_own_is_left_as_it_is(small):
    class Broken(small):
        def forward(self, x):
            return x + "1"

    with pytest.raises(TypeError, match="unsupported operand"):
        Broken().rdrop_step(batch_of())


def test_a_step_that_is_put_together_has_guard_and_regularizers(fit, small, rows):
    """Two heads by hand: the pieces are those of the mixin's own step."""

    class Heads(small):
        def training_step(self, batch, batch_idx):
            x, y = batch
            predictions = self.rdrop_draw(x, y)
            terms = self.rdrop_loss(predictions, y, x)
            self.rdrop_log(terms)
            return terms.loss + 0.1 * predictions.square().mean()

    trainer = fit(Heads(rdrop_regularizers=[VAT()]), rows, [ExactAccumulation()], accumulate_grad_batches=2)
    assert LOGGED | {"train/vat"} == set(trainer.callback_metrics)
    with pytest.raises(ValueError, match=r"p = 0: network\.2"):
        fit(Heads(p=0.0), rows)


def test_the_pieces_make_the_terms_of_the_step(small):
    module, (x, y) = small(rdrop_regularizers=[VAT()]), batch_of()
    made = []
    for whole in (True, False):
        torch.manual_seed(3)
        made.append(module.rdrop_step((x, y)) if whole else module.rdrop_loss(module.rdrop_draw(x, y), y, x))
    one, other = made
    assert (one.loss, one.ce, one.kl, one.rows, one.examples) == (other.loss, other.ce, other.kl, other.rows, 5)
    assert module.rdrop_loss(module.rdrop_draw(x, y), y).extra == {}


@pytest.mark.parametrize(
    "batch", [((torch.ones(4, 8), torch.ones(4)), torch.zeros(4).long()), [[torch.ones(4, 8), torch.ones(4)]] * 2]
)
@pytest.mark.parametrize("method", ["", "float"])  # a TypeError of torch, or an AttributeError of forward
def test_several_inputs_as_one_argument_are_told_the_hook(batch, method):
    class Lengths(Small):
        def forward(self, x, lengths=None):
            return self.network(x.float() if method else x)

    with pytest.raises((TypeError, AttributeError)) as error:
        Lengths().rdrop_step(batch)
    assert "return self(*inputs)" in error.value.__notes__[0]
    assert "{'labeled': ..., 'unlabeled': ...}" in error.value.__notes__[0]


def test_an_init_that_skips_the_mixins_is_told_so(fit, rows):
    class Skips(Small):
        def __init__(self):
            pl.LightningModule.__init__(self)
            self.network = nn.Linear(8, 3)

    for callbacks in ([], [AlphaScheduler()]):
        with pytest.raises(TypeError, match=r"Skips\.__init__ did not call.*super\(\)\.__init__\(\*\*kwargs\)"):
            fit(Skips(), rows, callbacks)


def test_a_plain_module_as_fabric_takes_it():
    class Plain(RDropMixin, nn.Module):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3))

        def forward(self, x):
            return self.network(x)

    batch = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    assert Plain().rdrop_step(batch).kl > 0
    with pytest.raises(ValueError, match="views are identical"):
        Plain().eval().rdrop_step(batch)
    terms = Plain(rdrop_regularizers=[VAT(), FGM(), GradientPenalty()]).rdrop_step(batch)
    assert all(term > 0 for term in terms.extra.values())
    assert mc_predict(Plain(), batch[0]).std.min() > 0
