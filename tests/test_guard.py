"""Wrong set-ups are caught with the name of the culprit and the fix; right ones are left in peace."""

import re
import warnings
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader

from lightning_rdrop import (
    VAT,
    AlphaScheduler,
    Bernoulli,
    Categorical,
    Focal,
    Gaussian,
    GradientPenalty,
    RDropMixin,
    Views,
    WithLosses,
)
from lightning_rdrop.guard import NanWatch
from lightning_rdrop.guard.first_batch import missing_decoder_inputs, unshifted_labels
from lightning_rdrop.guard.unused_criterion import unused_criterion


class Module(RDropMixin, pl.LightningModule):
    """Any network."""

    def __init__(self, *layers, **kwargs):
        super().__init__(**kwargs)
        self.network = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)


class LayerDrop(nn.Module):
    """Skips its layer for the whole batch at once."""

    def __init__(self, layer, layerdrop=0.5):
        super().__init__()
        self.layer = layer
        self.layerdrop = layerdrop

    def forward(self, x):
        return x if self.training and torch.rand(()) < self.layerdrop else x + self.layer(x)


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x * (torch.rand(len(x), 1) > self.drop_prob) if self.training else x


def rows(examples=6, classes=3):
    return torch.randn(examples, 8), torch.arange(examples) % classes


def mlp(p=0.3, **kwargs):
    return Module(nn.Linear(8, 16), nn.Dropout(p), nn.Linear(16, 3), **kwargs)


def after(module, change):
    change(module)
    return module


class Shared(nn.Module):
    """Returns B rows, whatever it is given."""

    def forward(self, x):
        return nn.functional.dropout(x[: len(x) // 2, :3], 0.3)


class Dictionary(nn.Linear):
    def forward(self, x):
        return {"scores": super().forward(x)}


def hugging_face(kind, **config):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "GPT2":
        settings = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **sizes, **config)
        return Module(transformers.GPT2LMHeadModel(settings).train())
    settings = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, decoder_start_token_id=2, **sizes, **config,
    )  # fmt: skip
    return Module(getattr(transformers, f"Bart{kind}")(settings).train())


def tokens():
    return torch.randint(3, 20, (4, 6))


def sentences(labels):
    ids = tokens()
    return {"input_ids": ids, "labels": ids if labels == "same" else tokens() if labels == "other" else labels}


def padded():
    batch = sentences("same")
    batch["labels"] = batch["labels"].masked_fill(torch.arange(6) > 3, -100)
    return batch


WRONG = {
    "the whole module in eval mode": (lambda: mlp().eval(), rows, r"eval mode.*network\.1.*model\.train\(\)"),
    "one dropout in eval mode": (
        lambda: after(mlp(), lambda m: m.network[1].eval()),
        rows,
        r"eval mode.*network\.1.*self\.network\[1\]\.train\(\)",
    ),
    "p = 0": (lambda: mlp(0.0), rows, r"p = 0: network\.1.*set_probability"),
    "no dropout at all": (lambda: Module(nn.Linear(8, 3)), rows, r"no stochastic layer.*nn\.Dropout\(0\.3\)"),
    "three views, p = 0": (lambda: mlp(0.0, rdrop_views=3), rows, r"p = 0: network\.1"),
    "separate passes, eval mode": (lambda: mlp(rdrop_passes="separate").eval(), rows, r"network\.1"),
    "dropout in a frozen part only": (
        lambda: Module(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)).eval().requires_grad_(False), nn.Linear(8, 3)),
        rows,
        r"frozen part.*network\.0\.1.*to a trained part",
    ),
    "LayerDrop is shared by the batch": (
        lambda: Module(LayerDrop(nn.Linear(8, 8)), nn.Linear(8, 3)),
        rows,
        r'network\.0\.layerdrop.*rdrop_passes="separate"',
    ),
    "LSTM with one layer has no dropout": (
        lambda: _lstm(),
        rows,
        "no stochastic layer",
    ),
    "attention without dropout": (lambda: Module(_Attention(0.0)), rows, r"p = 0: network\.attention\.dropout"),
    "dropout that never reaches the prediction": (
        lambda: Module(_Idle()),
        rows,
        r"without effect on the prediction: network\.dropout",
    ),
    "causal language model, labels not shifted": (
        lambda: hugging_face("GPT2"),
        lambda: sentences("same"),
        "labels of a causal language model were not shifted.*rdrop_unpack",
    ),
    "the same with padding": (lambda: hugging_face("GPT2"), padded, "were not shifted"),
    "BART without decoder inputs": (
        lambda: hugging_face("ForConditionalGeneration"),
        lambda: sentences("other"),
        "network, a BartForConditionalGeneration, got no decoder inputs.*decoder_input_ids",
    ),
    "the same with targets of another length": (
        lambda: hugging_face("ForConditionalGeneration"),
        lambda: sentences(tokens()[:, :5]),
        "got no decoder inputs.*decoder_input_ids",
    ),
    "the same in separate passes": (
        lambda: after(hugging_face("ForConditionalGeneration"), lambda m: setattr(m, "rdrop_passes", "separate")),
        lambda: sentences(tokens()[:, :5]),
        "got no decoder inputs.*decoder_input_ids",
    ),
    "one class": (lambda: Module(nn.Dropout(0.3), nn.Linear(8, 1)), lambda: rows(classes=1), "at least 2 classes"),
    "a column of numbers against a row": (
        lambda: Module(nn.Dropout(0.3), nn.Linear(8, 1), rdrop_distance=Gaussian()),
        lambda: (torch.randn(6, 8), torch.randn(6)),
        r"\(6, 1\).*\(6,\); nothing broadcasts.*squeeze",
    ),
    "a class out of range": (mlp, lambda: rows(classes=4), "contains the class 3, but the prediction has 3 classes"),
    "a negative class": (
        mlp,
        lambda: (torch.randn(2, 8), torch.tensor([0, -1])),
        "contains the class -1.*ignore_index",
    ),
    "a label that is no label": (
        lambda: mlp(rdrop_distance=Bernoulli()),
        lambda: (torch.randn(2, 8), torch.tensor([[0.0, 1.0, 2.0]] * 2)),
        r"contains 2\.0; a label of Bernoulli",
    ),
    "targets of another length": (
        mlp,
        lambda: (torch.randn(6, 8), torch.zeros(5, dtype=torch.long)),
        r"target of shape \(5,\)",
    ),
    "a batch without targets": (mlp, lambda: {"x": torch.randn(6, 8)}, r"unclear what its target is.*rdrop_unpack"),
    "a prediction that is no tensor": (
        lambda: Module(nn.Dropout(0.3), Dictionary(8, 3)),
        rows,
        r"The prediction is a dict.*\.logits.*rdrop_predict",
    ),
    "B rows instead of 2B": (lambda: Module(Shared()), rows, "returned 6 rows .* 2 views of 6 .* must return 12"),
    "NaN in the weights": (
        lambda: after(mlp(), lambda m: m.network[0].weight.data.fill_(torch.nan)),
        rows,
        "view 0 is NaN since batch 0.*learning rate",
    ),
    "NaN in the data": (mlp, lambda: (torch.full((6, 8), torch.nan), rows()[1]), "view 0 is NaN since batch 0"),
    "a negative alpha": (lambda: after(mlp(), lambda m: setattr(m, "rdrop_alpha", -1.0)), rows, "alpha must be"),
    "a batch with tensors of two lengths": (
        mlp,
        lambda: ({"input": torch.randn(6, 8), "weight": torch.ones(3)}, rows()[1]),
        r"batch\['input'\] has 6 rows and batch\['weight'\] has 3.*separate",
    ),
}


def _lstm():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x.unsqueeze(1))[0][:, -1]

    return Module(Last())


class _Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=p, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.unsqueeze(1).expand(-1, 4, -1) * torch.arange(1.0, 5.0).unsqueeze(-1)
        return self.head(self.attention(x, x, x)[0][:, 0])


class _Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        self.dropout(x)
        return self.head(x)


MEET = r'rows of a duplicated batch depend on each other.*rdrop_passes="separate"'


class Function(nn.Module):
    """Dropout, a layer, and whatever is done with its result."""

    def __init__(self, function, features=3, p=0.3):
        super().__init__()
        self.network = nn.Sequential(nn.Dropout(p), nn.Linear(8, features))
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self.network, *args, **kwargs)


def across(x):
    """Attention between the examples of a batch."""
    return (x @ x.T).softmax(-1) @ x


class Recurrent(nn.Module):
    """A sequence (T, B, 8) unless the batch comes first, and three classes for each step."""

    def __init__(self, kind, **options):
        super().__init__()
        self.recurrent, self.head = kind(8, 8, 2, dropout=0.3, **options), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


class Encoder(nn.Module):
    """nn.TransformerEncoder, with a class for each position."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, **options)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def steps(steps=5, examples=4):
    return torch.randn(steps, examples, 8), torch.randint(3, (steps, examples))


def pairs(examples=6):
    """Each example's own place in the batch is its target."""
    return torch.randn(examples, 8), torch.arange(examples)


def pointers():
    return ({"x": torch.randn(6, 8), "index": torch.tensor([1, 0, 3, 2, 5, 4])}, rows()[1])


def graph():
    """As many edges as nodes."""
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0]])
    return ({"x": torch.randn(6, 8), "edges": edges}, rows()[1])


def propagate(network, x, edges):
    hidden = network(x)
    return hidden.index_add(0, edges[:, 1], hidden[edges[:, 0]])


def zero_head(function):
    module = Module(Function(function, 8), nn.Linear(8, 3))
    nn.init.zeros_(module.network[1].weight)
    return module


ROWS_MEET = {
    "logits against the candidates of the batch": (
        lambda **k: Module(Function(lambda f, x: f(x) @ f(x).T), **k),
        pairs,
    ),
    "LSTM, sequence first": (lambda **k: Module(Recurrent(nn.LSTM), **k), steps),
    "GRU, sequence first": (lambda **k: Module(Recurrent(nn.GRU), **k), steps),
    "RNN, sequence first": (lambda **k: Module(Recurrent(nn.RNN), **k), steps),
    "LSTM in both directions": (lambda **k: Module(_Both(), **k), steps),
    "TransformerEncoder, sequence first": (lambda **k: Module(Encoder(), **k), steps),
    "attention between the examples": (lambda **k: Module(Function(lambda f, x: across(f(x))), **k), rows),
    "attention between two examples": (lambda **k: Module(Function(lambda f, x: across(f(x))), **k), lambda: rows(2)),
    "attention between the examples, bfloat16": (
        lambda **k: Module(Function(lambda f, x: across(f(x))), **k).bfloat16(),
        lambda: (rows()[0].bfloat16(), rows()[1]),
    ),
    "an index into the batch": (lambda **k: Module(Function(lambda f, x, index: f(x)[index]), **k), pointers),
    "a graph with as many edges as nodes": (lambda **k: Module(Function(propagate), **k), graph),
    "statistics of the batch by hand": (lambda **k: Module(Function(lambda f, x: f(x) - f(x).mean(0)), **k), rows),
    "the neighbour in the batch": (lambda **k: Module(Function(lambda f, x: f(x) + f(x).roll(1, 0)), **k), rows),
    "a sum over the batch": (lambda **k: Module(Function(lambda f, x: f(x).cumsum(0)), **k), rows),
}


class _Both(Recurrent):
    def __init__(self):
        super().__init__(nn.LSTM, bidirectional=True)
        self.head = nn.Linear(16, 3)


@pytest.mark.parametrize("kind", ROWS_MEET)
def test_rows_that_meet(kind):
    make, batch = ROWS_MEET[kind]
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"(?s){MEET}"):
        make().rdrop_step(batch())
    terms = make(rdrop_passes="separate").rdrop_step(batch())  # the remedy
    assert terms.loss.isfinite()


def test_rows_that_meet_behind_a_head_that_starts_at_zero():
    with pytest.raises(ValueError, match=MEET):
        zero_head(lambda f, x: across(f(x))).rdrop_step(rows())


def test_rows_that_meet_in_the_unlabelled_part_only():
    module = Module(Function(lambda f, x: f(x) if len(x) % 5 else across(f(x))))
    with pytest.raises(ValueError, match=MEET):
        module.rdrop_step({"labeled": rows(6), "unlabeled": torch.randn(10, 8)})


def test_rows_that_meet_are_seen_in_the_first_batch_of_several(fit):
    module = Module(Function(lambda f, x: across(f(x))))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    seen = []
    module.network.register_forward_hook(lambda network, inputs, output: seen.append(network.training))
    fit(module, DataLoader([rows(1)] * 3, batch_size=None))
    assert all(seen)  # nothing is tried with a batch of one
    with pytest.raises(ValueError, match=MEET):
        fit(module, DataLoader([rows(1)] * 3 + [rows(4)], batch_size=None))


BATCH_NORM = r"one example.*single value per channel: network\.1\..*drop_last=True"


def normalized(**kwargs):
    module = Module(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3), **kwargs)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    return module


def test_statistics_of_copies_are_refused_in_whatever_batch_they_come(fit):
    with pytest.raises(ValueError, match=BATCH_NORM):
        fit(normalized(), DataLoader([*[rows(4)] * 3, rows(1)], batch_size=None))
    module = normalized(rdrop_guard="warn")
    with pytest.warns(UserWarning, match=BATCH_NORM):
        fit(module, DataLoader([rows(4), rows(1)], batch_size=None))
    assert module.network[1].num_batches_tracked == 2  # the guard's pass is not among them


def test_statistics_of_copies_are_refused_after_a_layer_is_unfrozen():
    module = normalized()
    module.network[1].eval()
    module.rdrop_step(rows(1))
    module.train()
    with pytest.raises(ValueError, match=BATCH_NORM):
        module.rdrop_step(rows(1))


class FrozenNorm(nn.BatchNorm1d):
    """Has running statistics in training mode too."""

    def forward(self, x):
        return (x - self.running_mean) / self.running_var.sqrt()


@pytest.mark.parametrize(
    "layers",
    [(nn.Linear(8, 8), FrozenNorm(8)), (nn.LazyLinear(8), nn.LazyBatchNorm1d())],
    ids=["own statistics", "lazy"],
)
def test_one_example_of_which_no_statistics_are_taken_is_no_error(layers):
    module = Module(*layers, nn.Dropout(0.3), nn.Linear(8, 3))
    assert module.rdrop_step(rows(1)).loss.isfinite()


def test_rows_are_looked_at_once(fit):
    module = mlp()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    seen = []
    module.network.register_forward_hook(lambda network, inputs, output: seen.append(network.training))
    fit(module, DataLoader([rows(1), *[rows(4)] * 3], batch_size=None))
    assert seen == [True, False, False, True, True, True]


@pytest.mark.parametrize("arguments", [{}, {"rdrop_duplicate_at": "auto"}, {"rdrop_regularizers": [VAT()]}], ids=str)
def test_what_forward_logs_is_logged_for_the_passes_of_training_alone(fit, small, rows, arguments):
    def forward(self, x):
        self.log("rows", float(len(x)), on_step=False, on_epoch=True, batch_size=1)
        self.log_dict({"ones": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum")
        return self.network(x)

    module = type("Logs", (small,), {"forward": forward})(**arguments)
    nn.init.zeros_(module.network[3].weight)  # views are equal at first, and drawn again
    metrics = fit(module, rows, limit_train_batches=3).callback_metrics
    assert (metrics["rows"], metrics["ones"]) == (8.0 if "rdrop_duplicate_at" not in arguments else 4.0, 3)
    assert not {"log", "log_dict"} & vars(module).keys()


def test_rows_that_meet_are_a_warning_where_that_is_asked_for():
    module = Module(Function(lambda f, x: across(f(x))), rdrop_guard="warn")
    with pytest.warns(UserWarning, match=MEET):
        module.rdrop_step(rows())


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_views_are_not_drawn_in_evaluation(fit, small, rows, stage):
    wrong = type("Wrong", (small,), {f"{stage}_step": lambda self, batch, batch_idx: self.rdrop_step(batch).loss})
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    run = {"validation": trainer.validate, "test": trainer.test, "predict": trainer.predict}[stage]
    with pytest.raises(
        ValueError, match=r"views of a batch are drawn while the Trainer is .*self\.rdrop_predict\(inputs\)"
    ):
        run(wrong(), rows)


def test_evaluation_is_spoken_of_once(small, rows):
    wrong = type("Wrong", (small,), {"validation_step": lambda self, batch, batch_idx: self.rdrop_step(batch).loss})
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.warns(UserWarning, match="views") as caught:
        trainer.validate(wrong(rdrop_guard="warn"), rows)
    assert len([one for one in caught if "views" in str(one.message).lower()]) == 1
    assert not [one for one in caught if "inside a trained part" in str(one.message)]


class Change(pl.Callback):
    """Does something to the module in the middle of a fit."""

    def __init__(self, action, batch=20):
        self.action, self.batch = action, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.batch:
            self.action(pl_module)


@pytest.mark.parametrize("every", [4, 50], ids=["log", "end of an epoch"])
@pytest.mark.parametrize("change", ["p = 0", "another network"])
def test_views_that_become_equal_in_the_middle_of_a_fit(fit, small, rows, change, every):
    action, message = SECOND_FITS[change]
    with pytest.raises(ValueError, match=f"(?s)The views are identical, so R-Drop has no effect\\. .*{message}"):
        fit(small(), rows, [Change(action)], max_epochs=5, log_every_n_steps=every)


class Fading(nn.Linear):
    """Has a dropout that cannot be seen from outside."""

    rate = 0.3

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, self.rate, self.training))


def steps_of_ones_own():
    def step(self, batch, batch_idx):
        terms = self.rdrop_step(batch)
        self.log("own", terms.kl.detach())
        return terms.loss

    def pieces(self, batch, batch_idx):
        return self.rdrop_loss(self.rdrop_draw(*batch), batch[1], batch[0]).loss

    return {"rdrop_step": step, "rdrop_draw and rdrop_loss": pieces}


@pytest.mark.parametrize("kind", steps_of_ones_own())
def test_views_that_become_equal_in_a_step_of_ones_own_that_logs_itself(fit, small, rows, kind):
    module = type("Own", (small,), {"training_step": steps_of_ones_own()[kind]})()
    module.network = Fading(8, 3)
    with pytest.raises(ValueError, match="The views are identical, so R-Drop has no effect"):
        fit(module, rows, [Change(lambda module: setattr(module.network, "rate", 0.0))], max_epochs=6)


@pytest.mark.parametrize(("make", "batch", "message"), WRONG.values(), ids=WRONG)
def test_wrong(make, batch, message):
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        make().rdrop_step(batch())


def test_there_are_at_least_45_wrong_and_25_right_set_ups():
    evaluations, later = 3, 2
    assert len(WRONG) + len(ROWS_MEET) + len(SECOND_FITS) + evaluations + later >= 45
    assert len(RIGHT) + len(ROWS_MEET) >= 25  # those that meet are right in separate passes


RIGHT = {
    "plain dropout": (mlp, rows),
    "frozen lower layers in eval mode": (
        lambda: Module(
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)).eval().requires_grad_(False),
            nn.Dropout(0.3),
            nn.Linear(8, 3),
        ),
        rows,
    ),
    "dropout only in the head": (lambda: Module(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 3)), rows),
    "dropout 0.1 on 8 units, batches of 1": (lambda: Module(nn.Dropout(0.1), nn.Linear(8, 3)), lambda: rows(1)),
    "four DropPath of 0.05, batches of 4": (
        lambda: Module(*[DropPath(0.05) for _ in range(4)], nn.Linear(8, 3)),
        lambda: rows(4),
    ),
    "LayerDrop under separate passes": (
        lambda: Module(LayerDrop(nn.Linear(8, 8)), nn.Linear(8, 3), rdrop_passes="separate"),
        rows,
    ),
    "three views": (lambda: mlp(rdrop_views=3), rows),
    "alpha 0 on purpose, without dropout": (lambda: mlp(0.0, rdrop_alpha=0.0), rows),
    "one view, without dropout": (lambda: mlp(0.0, rdrop_views=1), rows),
    "a head that starts at zero": (lambda: after(mlp(), lambda m: nn.init.zeros_(m.network[2].weight)), rows),
    "classes masked with -inf": (
        lambda: Module(_Masked()),
        rows,
    ),
    "attention dropout alone": (lambda: Module(_Attention(0.3)), rows),
    "BatchNorm in eval mode": (
        lambda: after(
            Module(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)), lambda m: m.network[1].eval()
        ),
        rows,
    ),
    "BatchNorm in eval mode, batches of 1": (
        lambda: after(normalized(), lambda m: m.network[1].eval()),
        lambda: rows(1),
    ),
    "BatchNorm2d, batches of 1 image": (
        lambda: Module(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 3)),
        lambda: (torch.randn(1, 1, 6, 6), rows(1)[1]),
    ),
    "BatchNorm and two crops, batches of 1": (
        normalized,
        lambda: (Views(torch.randn(1, 8), torch.randn(1, 8)), rows(1)[1]),
    ),
    "BatchNorm in training mode": (
        lambda: Module(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)),
        rows,
    ),
    "BatchNorm without running statistics": (
        lambda: Module(nn.BatchNorm1d(8, track_running_stats=False), nn.Dropout(0.3), nn.Linear(8, 3)),
        rows,
    ),
    "images, BatchNorm2d and Dropout2d": (
        lambda: Module(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout2d(0.3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        lambda: (torch.randn(6, 1, 6, 6), rows()[1]),
    ),
    "GroupNorm and LayerNorm": (
        lambda: Module(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 3)),
        rows,
    ),
    "LSTM, batch first": (
        lambda: Module(Recurrent(nn.LSTM, batch_first=True)),
        lambda: (torch.randn(4, 5, 8), torch.randint(3, (4, 5))),
    ),
    "a padded TransformerEncoder": (lambda: Module(Encoder(batch_first=True)), lambda: padded_rows()),
    "a batch that is cut to its longest row": (lambda: Module(_Cut()), lambda: padded_rows()),
    "experts with a capacity": (lambda: Module(_Experts()), rows),
    "tokens as rows": (
        lambda: Module(Function(lambda f, x: f(x).flatten(0, 1))),
        lambda: (torch.randn(4, 5, 8), torch.randint(3, (20,))),
    ),
    "dropout that is never off": (lambda: Module(_Always()), rows),
    "LayerScale of 1e-6, from scratch": (lambda: Module(_Scaled(), nn.Linear(8, 3)), rows),
    "LoRA whose B is zero": (lambda: Module(_LoRA()), rows),
    "bfloat16": (lambda: mlp().bfloat16(), lambda: (rows()[0].bfloat16(), rows()[1])),
    "an eval mode that is not made for it": (lambda: Module(_TrainsOnly()), rows),
    "nested inputs, names and constants": (
        lambda: Module(Function(lambda f, x, names, scale: f(x) * scale)),
        lambda: ({"x": torch.randn(6, 8), "names": list("abcdef"), "scale": torch.tensor(2.0)}, rows()[1]),
    ),
}


def padded_rows():
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2], [4]])
    target = torch.randint(3, (4, 5)).masked_fill(padding, -100)
    return {"x": torch.randn(4, 5, 8), "padding": padding}, target


class _Cut(Encoder):
    """Leaves out the positions behind the longest row."""

    def __init__(self):
        super().__init__(batch_first=True)

    def forward(self, x, padding):
        length = int((~padding).sum(1).max())
        logits = super().forward(x[:, :length], padding[:, :length])
        return nn.functional.pad(logits, (0, 0, 0, 5 - length))


class _Experts(nn.Module):
    """Two experts, of which each takes so many rows and leaves out those that come later."""

    def __init__(self):
        super().__init__()
        self.capacity_factor = 1.0
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        chosen = self.gate(x).argmax(-1)
        capacity = int(self.capacity_factor * len(x) / 2)
        out = x
        for number, expert in enumerate(self.experts):
            taken = (chosen == number).nonzero().flatten()[:capacity]
            out = out.index_add(0, taken, expert(x[taken]))
        return self.head(out)


class _Always(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(x, 0.3))


class _Scaled(nn.Module):
    """A block as that of ConvNeXt, whose branch is nothing in the beginning."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))
        self.scale = nn.Parameter(1e-6 * torch.ones(8))

    def forward(self, x):
        return x + self.scale * self.branch(x)


class _LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(8, 3).requires_grad_(False)
        self.lora = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 2), nn.Linear(2, 3))
        nn.init.zeros_(self.lora[2].weight)

    def forward(self, x):
        return self.frozen(x) + self.lora(x)


class _TrainsOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        if not self.training:
            raise RuntimeError("boxes are made another way in evaluation")
        return self.network(x)


class _Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 4))

    def forward(self, x):
        return self.network(x).masked_fill(torch.arange(4) == 3, -torch.inf)


@pytest.mark.parametrize(("make", "batch"), RIGHT.values(), ids=RIGHT)
def test_right_over_100_seeds(make, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(100):
            torch.manual_seed(seed)
            terms = make().rdrop_step(batch())
            assert terms.loss.isfinite()


def test_a_classifier_on_an_encoder_decoder_model_is_left_in_peace():
    batch = {"input_ids": torch.cat([tokens(), torch.full((4, 1), 2)], 1), "labels": torch.tensor([0, 1, 2, 0])}
    assert hugging_face("ForSequenceClassification", num_labels=3).rdrop_step(batch).kl > 0


def test_shifted_and_decoded_models_are_left_in_peace():
    ids = tokens()
    causal = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous()}
    assert hugging_face("GPT2").rdrop_step(causal).kl > 0
    decoded = {"input_ids": tokens(), "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous()}
    assert hugging_face("ForConditionalGeneration").rdrop_step(decoded).kl > 0


def test_a_dead_backbone_under_a_live_head_is_a_warning_by_name():
    module = Module(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)).eval(), nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))
    )
    with pytest.warns(UserWarning, match=r"eval mode .*network\.0\.1.*self\.network\[0\]\.train\(\)"):
        module.rdrop_step(rows())


@pytest.mark.parametrize("guard", ["error", "warn", "off"])
def test_a_dead_backbone_that_is_unfrozen_later_is_a_warning_by_name(fit, rows, guard):
    class Transfer(Module):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3)), rdrop_guard=guard)
            self.backbone = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)).eval()

        def forward(self, x):
            return self.network(self.backbone(x))

        def configure_optimizers(self):
            return torch.optim.SGD([part for part in self.parameters() if part.requires_grad], 0.1)

    def warned(**trainer):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Transfer(), rows, [BackboneFinetuning(1, verbose=False)], **trainer)
        return [one for one in caught if "In eval mode inside a trained part: backbone.1" in str(one.message)]

    assert not warned()
    assert len(warned(max_epochs=3)) == (guard != "off")


def test_a_part_that_is_frozen_in_every_other_step_is_searched_once(monkeypatch):
    module, batch, searched = mlp(), rows(), []
    monkeypatch.setattr("lightning_rdrop.guard.guard.explain_dead", lambda network: searched.append(network))
    for step in range(6):
        module.network[0].requires_grad_(step % 2 == 0)
        module.rdrop_step(batch)
    assert len(searched) == 2


def test_modes_that_alternate_are_each_looked_at_once(fit, small, rows, monkeypatch):
    class Alternating(small):
        def on_train_batch_start(self, batch, batch_idx):
            self.network[0].train(batch_idx % 2 == 0)

        def rdrop_check(self, *batch):
            checked.append(self.network[0].training)

    checked, compared = [], []
    monkeypatch.setattr("lightning_rdrop.guard.guard.diagnose", lambda *arguments: compared.append(arguments))
    fit(Alternating(), rows)
    assert checked == [True, False]
    assert len(compared) == 2


def test_single_examples_are_looked_at_once_in_each_mode(monkeypatch):
    module, looked = normalized(), []
    monkeypatch.setattr("lightning_rdrop.guard.guard.single_values", lambda *arguments: looked.append(arguments))
    module.network[1].eval()
    for step in range(4):
        module.network[0].train(step % 2 == 0)
        module.rdrop_step(rows(1))
    assert len(looked) == 2


def test_a_dropout_that_is_switched_off_is_seen_in_the_same_step():
    module, batch = mlp(), rows()
    for p in (0.3, 0.5):
        module.network[1].p = p
        module.rdrop_step(batch)
    module.network[1].p = 0.0
    with pytest.raises(ValueError, match=r"The views are identical.*p = 0: network\.1"):
        module.rdrop_step(batch)


def poison(module):
    module.network[0].weight.data.fill_(torch.nan)


@pytest.mark.parametrize("every", [4, 50], ids=["log", "end of an epoch"])
def test_nan_in_the_middle_of_a_training_is_found_at_the_next(fit, small, rows, every):
    with pytest.raises(ValueError, match="view 0 is NaN since batch 5"):
        fit(small(), rows, [Change(poison, 5)], log_every_n_steps=every)


class NanTokens(nn.Module):
    """Classes (N, C, T) or (N, T, C) of tokens; those of the last one are NaN."""

    def __init__(self, class_dim):
        super().__init__()
        self.linear, self.dropout, self.class_dim = nn.Linear(8, 5), nn.Dropout(0.3), class_dim

    def forward(self, x):
        logits = self.linear(self.dropout(x))
        logits = torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], torch.nan)], 1)
        return logits.movedim(-1, self.class_dim)


@pytest.mark.parametrize("ignored", [4, 3])
@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("together", [False, True])
def test_nan_in_rows_that_do_not_count(ignored, class_dim, together):
    distance = Categorical(class_dim=class_dim)
    module = Module(NanTokens(class_dim), rdrop_distance={"tokens": distance} if together else distance)
    x, target = torch.randn(6, 5, 8), torch.randint(5, (6, 5))  # as many tokens as classes
    target[:, ignored] = -100
    if together:
        module.rdrop_predict = lambda x: {"tokens": module(x)}
        target = {"tokens": target}
    with pytest.raises(ValueError, match="view 0 is NaN since batch 0") if ignored == 3 else nullcontext():
        assert module.rdrop_step((x, target)).loss.isfinite()


def test_nan_in_values_that_do_not_count():
    watch, predictions = NanWatch(), torch.ones(2, 3, 4)
    predictions[:, 1, 2] = torch.nan
    watch.look(predictions, ~predictions[0].isnan())
    assert watch.reason() is None
    watch.look(predictions, torch.ones(3, 4, dtype=torch.bool))
    assert watch.reason().startswith("The prediction of view 0 is NaN since batch 1")


def test_nan_is_said_once_at_the_end_of_an_epoch_before_a_hook_of_ones_own(fit, small, rows):
    ended = []
    module = type("Own", (small,), {"on_train_epoch_end": lambda self: ended.append(self.current_epoch)})
    with pytest.warns(UserWarning, match="is NaN since batch 5") as caught:
        fit(module(rdrop_guard="warn"), rows, [Change(poison, 5)], max_epochs=2, log_every_n_steps=7)
    assert len([one for one in caught if "is NaN" in str(one.message)]) == 1
    assert ended == [0, 1]


def test_after_the_first_batch_the_device_is_waited_for_only_where_a_log_is_due(fit, small, rows, monkeypatch):
    read, compared = [], []
    monkeypatch.setattr(NanWatch, "reason", lambda watch: read.append(watch.batches))
    monkeypatch.setattr("lightning_rdrop.guard.guard.diagnose", lambda *arguments: compared.append(arguments))
    fit(small(), rows, max_epochs=2, log_every_n_steps=5)
    assert read == [1, 6, 8, 11, 16, 16]  # and at the end of an epoch of eight batches
    assert len(compared) == 1


@pytest.mark.parametrize("barebones", [False, True])
def test_without_logs_the_device_is_waited_for_at_the_beginning_and_at_the_end(small, rows, monkeypatch, barebones):
    read = []
    monkeypatch.setattr(NanWatch, "reason", lambda watch: read.append(watch.batches))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"barebones": True} if barebones else {"log_every_n_steps": 0} | off
    pl.Trainer(accelerator="cpu", max_epochs=2, **options).fit(small(), rows)
    assert read == [1, 8, 16]


def test_what_is_noted_is_read_before_it_is_forgotten(fit, small, rows, monkeypatch):
    read = []
    monkeypatch.setattr(NanWatch, "reason", lambda watch: read.append(watch.batches))
    monkeypatch.setattr("lightning_rdrop.guard.guard.KEPT", 4)
    for every in (0, 50):
        fit(small(), rows, log_every_n_steps=every)
    assert read == [1, 5, 8] * 2


def test_without_a_trainer_the_device_is_waited_for_every_50_steps(monkeypatch):
    module, batch, read = mlp(), rows(), []
    monkeypatch.setattr(NanWatch, "reason", lambda watch: read.append(watch.batches))
    for _ in range(120):
        module.rdrop_step(batch)
    assert read == [1, 51, 101]


@pytest.mark.parametrize("name", ["labels", "decoder_input_ids", "decoder_inputs_embeds"])
def test_decoder_inputs_may_have_other_names(name):
    model = hugging_face("ForConditionalGeneration").network
    assert missing_decoder_inputs(model, {"input_ids": tokens(), name: None}) is None


def test_a_copy_of_the_source_is_no_copy_of_the_decoder_inputs():
    source = tokens()
    shifted = torch.cat([torch.zeros_like(source[:, :1]), source[:, :-1]], 1)
    assert unshifted_labels({"input_ids": source, "decoder_input_ids": shifted}, source) is None
    assert "were not shifted" in unshifted_labels({"input_ids": shifted, "decoder_input_ids": source}, source)


def test_a_network_that_only_looks_like_an_encoder_decoder_is_left_in_peace():
    network = nn.Linear(8, 3)
    network.config, network.get_output_embeddings = object(), lambda: network
    assert missing_decoder_inputs(network, {"input_ids": tokens()}) is None


def test_a_row_of_numbers_that_is_its_own_target_is_no_sequence():
    assert unshifted_labels(torch.arange(4), torch.arange(4)) is None
    assert "were not shifted" in unshifted_labels(torch.arange(4).view(1, 4), torch.arange(4).view(1, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_under_separate_passes(layout):
    x = torch.nested.nested_tensor([torch.randn(1 + row % 3, 8) for row in range(6)], layout=layout)
    module = Module(Function(lambda f, x: f(x.to_padded_tensor(0.0).mean(1))), rdrop_passes="separate")
    assert module.rdrop_step((x, rows()[1])).kl > 0
    assert module.rdrop_step({"labeled": (x, rows()[1]), "unlabeled": x}).extra["kl_unlabeled"] > 0


class Criterion(Module):
    """A plain module's own loss, which its training_step used."""

    def __init__(self, criterion, **kwargs):
        super().__init__(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3), **kwargs)
        self.losses = nn.ModuleList([criterion])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class OwnStep(Criterion):
    def training_step(self, batch, batch_idx):
        terms = self.rdrop_step(batch)
        return self.losses[0](terms.prediction, batch[1]) + self.rdrop_alpha * terms.kl


class OwnLosses(Criterion):
    def rdrop_predict_with_losses(self, inputs):
        logits = self(inputs)
        return WithLosses(logits, {"own": self.losses[0](logits, torch.zeros(len(logits)).long())})


WEIGHT = torch.tensor([1.0, 1.0, 5.0])
MULTI_HOT = (torch.randn(6, 8), torch.randint(2, (6, 3)).float())


@pytest.mark.parametrize(
    ("criterion", "distance", "batch", "advice"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), None, rows(), r"Categorical(label_smoothing=0.1)"),
        (
            nn.CrossEntropyLoss(WEIGHT, ignore_index=0),
            Categorical(class_dim=1),
            rows(),
            "Categorical(class_dim=1, weight=self.losses[0].weight, ignore_index=0)",
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
            Bernoulli(),
            MULTI_HOT,
            "Bernoulli(pos_weight=self.losses[0].pos_weight)",
        ),
        (nn.NLLLoss(WEIGHT), None, rows(), "Categorical(weight=self.losses[0].weight)"),
        (
            nn.BCEWithLogitsLoss(WEIGHT),
            Bernoulli(),
            MULTI_HOT,
            "Weighted(Bernoulli()) in __init__, and return (target, self.losses[0].weight.expand_as(target))",
        ),
    ],
)
def test_a_criterion_that_is_not_used_is_a_warning_with_the_distance(fit, criterion, distance, batch, advice):
    loader = DataLoader([batch] * 2, batch_size=None)
    with pytest.warns(UserWarning, match=re.escape(f"set self.rdrop_distance = {advice}")) as seen:
        fit(Criterion(criterion, rdrop_distance=distance), loader, max_epochs=2)
    assert sum("rdrop_distance" in str(warning.message) for warning in seen) == 1


@pytest.mark.parametrize(
    ("kind", "criterion", "arguments"),
    [
        (Criterion, nn.CrossEntropyLoss(reduction="none"), {}),
        (Criterion, nn.CrossEntropyLoss(reduction="sum"), {"rdrop_distance": Focal()}),
        (Criterion, nn.BCEWithLogitsLoss(WEIGHT, reduction="sum"), {}),
        (Criterion, nn.CrossEntropyLoss(WEIGHT), {"rdrop_distance": Categorical(weight=[1.0, 1.0, 5.0])}),
        (Criterion, nn.CrossEntropyLoss(WEIGHT), {"rdrop_distance": Focal(weight=WEIGHT)}),
        (Criterion, nn.CrossEntropyLoss(WEIGHT), {"rdrop_guard": "off"}),
        (Criterion, nn.CrossEntropyLoss(WEIGHT), {"rdrop_regularizers": [GradientPenalty()]}),
        (Criterion, nn.BCEWithLogitsLoss(pos_weight=WEIGHT), {"rdrop_distance": Categorical(label_smoothing=0.1)}),
        (OwnStep, nn.CrossEntropyLoss(WEIGHT), {}),
        (OwnLosses, nn.CrossEntropyLoss(WEIGHT), {}),
    ],
)
def test_a_criterion_that_is_used_or_says_nothing_new_is_left_in_peace(fit, kind, criterion, arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The mixin's training_step")
        fit(kind(criterion, **arguments), DataLoader([rows()], batch_size=None))


@pytest.mark.parametrize(
    ("kind", "distance"),
    [(nn.CrossEntropyLoss, Categorical()), (nn.NLLLoss, Categorical()), (nn.BCEWithLogitsLoss, Bernoulli())],
)
def test_a_sum_is_told_from_the_mean_that_is_used(kind, distance):
    reason = unused_criterion(Criterion(kind(reduction="sum")), distance)
    assert f"not self.losses[0], a {kind.__name__} with reduction='sum'" in reason


def test_a_criterion_in_half_precision_is_that_of_the_distance():
    weight = torch.tensor([1 / 3, 1.0, 5.0])
    module = Criterion(nn.CrossEntropyLoss(weight), rdrop_distance=Categorical(weight=weight)).bfloat16()
    assert unused_criterion(module, module.rdrop_distance) is None


def test_nan_in_one_view_names_it():
    watch = NanWatch()
    for _ in range(3):
        watch.look(torch.zeros(2, 3, 4))
    watch.look(torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]))
    watch.look(torch.full((2, 2), torch.nan))
    assert watch.reason().startswith("The prediction of view 0 is NaN since batch 4")
    first_only = NanWatch()
    first_only.look(torch.tensor([[0.0, -torch.inf], [torch.nan, 1.0]]))
    assert first_only.reason().startswith("The prediction of view 1 is NaN since batch 0")


def test_nan_in_any_tensor_of_a_prediction_since_its_first_batch():
    watch = NanWatch()
    for _ in range(2):
        watch.look({"intent": torch.zeros(2, 3), "slots": torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])})
    assert watch.reason().startswith("The prediction of view 1 is NaN since batch 0")
    watch.look({"intent": torch.zeros(2, 3), "slots": torch.zeros(2, 2)})
    assert watch.reason() is None


def test_nan_is_seen_where_the_number_of_views_changes():
    module = mlp()
    for module.rdrop_views in (2, 3, 1, 2):
        assert module.rdrop_step(rows()).loss.isfinite()
    watch = NanWatch()
    for views in (2, 3):
        watch.look(torch.full((views, 4), torch.nan))
    assert watch.reason().startswith("The prediction of view 0 is NaN since batch 1.")


def test_manual_optimization_with_the_mixins_step_is_refused(fit, small, rows):
    module = small()
    module.automatic_optimization = False
    with pytest.raises(TypeError, match=r"weights would never change.*manual_backward"):
        fit(module, rows)


def plain(self, batch, batch_idx):
    return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_a_step_of_ones_own_that_hides_the_mixins_is_a_warning(fit, small, rows):
    hidden = type("Hidden", (small,), {"training_step": plain})
    with pytest.warns(UserWarning, match=r"Hidden has its own training_step.*rdrop_step\(batch\)") as caught:
        fit(hidden(), rows, max_epochs=2)
    assert len([one for one in caught if "has its own training_step" in str(one.message)]) == 1


def test_the_warning_comes_even_where_a_hook_forgets_super(fit, small, rows):
    hooks = {"on_train_batch_end": lambda self, outputs, batch, batch_idx: None, "training_step": plain}
    with pytest.warns(UserWarning, match="Forgetful has its own training_step"):
        fit(type("Forgetful", (small,), hooks)(), rows)


def decorated(step):
    return lambda self, batch, batch_idx: step(self, batch).loss


class Helper:
    """Calls the step where no look at the class's own code would find it."""

    def compute(self, batch):
        return self.rdrop_step(batch).loss


def right_steps():
    def closure(self, batch, batch_idx):
        return (lambda: self.rdrop_step(batch).loss)()

    def generator(self, batch, batch_idx):
        return next(one.rdrop_step(batch).loss for one in (self,))

    return {
        "decorated": decorated(lambda self, batch: self.rdrop_step(batch)),
        "closure": closure,
        "generator": generator,
        "a helper of another base": lambda self, batch, batch_idx: self.compute(batch),
        "extended": lambda self, batch, batch_idx: super(type(self), self).training_step(batch, batch_idx),
        "the views drawn by hand": lambda self, batch, batch_idx: (
            self.rdrop_distance.terms(self.rdrop_draw(*batch), batch[1], 1.0).loss
        ),
    }


@pytest.mark.parametrize("kind", right_steps())
def test_a_step_of_ones_own_that_draws_the_views_is_left_in_peace(fit, small, rows, kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has its own training_step")
        fit(type("Own", (Helper, small), {"training_step": right_steps()[kind]})(), rows, limit_train_batches=2)


class Forgetful:
    """A hook that does not call the mixin's."""

    def on_fit_start(self):
        pass


def other_network(module):
    module.network = nn.Sequential(nn.Linear(8, 3))


SECOND_FITS = {
    "p = 0": (lambda module: setattr(module.network[2], "p", 0.0), r"p = 0: network\.2"),
    "another network": (other_network, "no stochastic layer"),
    "eval mode": (lambda module: module.network.eval(), r"eval mode.*network\.2"),
}


@pytest.mark.parametrize("bases", [(), (Forgetful,)], ids=["", "a hook forgets super"])
@pytest.mark.parametrize("change", SECOND_FITS)
def test_a_second_fit_is_guarded_anew(fit, small, rows, change, bases):
    act, message = SECOND_FITS[change]
    module = type("Module", (*bases, small), {})()
    fit(module, rows)
    act(module)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(module, rows)


def test_a_second_fit_finds_its_split_anew(fit, small, rows):
    """Dropout that came before the old split would drop the same in all views: kl would be 0 there."""
    module = small(rdrop_duplicate_at="auto")
    fit(module, rows)
    module.network[1], module.network[2] = module.network[2], module.network[1]
    trainer = fit(module, rows)
    assert trainer.callback_metrics["train/kl"] > 0


class Breaks(pl.Callback):
    def on_train_batch_end(self, *args):
        raise OSError("disk full")


def test_a_fit_after_one_that_broke_off_watches_the_modules_of_its_own(fit, small, rows):
    module = small()
    with pytest.raises(OSError, match="disk full"):
        fit(module, rows, [Breaks()])
    module.network = small().network
    with pytest.raises(ValueError, match=r"p = 0: network\.2"):
        fit(module, rows, [Change(lambda module: setattr(module.network[2], "p", 0.0), 4)])


def test_a_dropout_that_is_replaced_between_epochs_is_seen_in_the_next_batch(fit, small, rows):
    class Replaced(small):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.network[2] = nn.Dropout(0.0)

    with pytest.raises(ValueError, match=r"p = 0: network\.2"):
        fit(Replaced(), rows, max_epochs=2)


def test_a_schedule_that_begins_at_0_is_no_alpha_0_on_purpose(fit, small, rows):
    """The module's own alpha tells, not that of the first batch."""
    with pytest.raises(ValueError, match=r"p = 0: network\.2"):
        fit(small(p=0.0), rows, [AlphaScheduler("linear", ramp=8)], limit_train_batches=1)
    fit(small(p=0.0, rdrop_alpha=0.0), rows)


def test_an_alpha_that_rises_from_0_later_needs_views_that_differ(fit, small, rows):
    with pytest.raises(ValueError, match=r"p = 0: network\.2"):
        fit(small(p=0.0, rdrop_alpha=0.0), rows, [AlphaScheduler("linear", ramp=2, delay=5, peak=4.0)])
    checked = []
    right = type("Right", (small,), {"rdrop_check": lambda self, *batch: checked.append(self.rdrop_alpha)})
    fit(right(rdrop_alpha=0.0), rows, [AlphaScheduler("linear", ramp=2, delay=5, peak=4.0)])
    assert checked == [0.0]  # values are not looked at again


def test_views_that_may_be_equal_for_a_time(fit, small, rows):
    """While alpha is 0 nothing is said of a p that is, and after it is."""

    def off(module):
        module.network[2].p, module.rdrop_alpha = 0.0, 0.0

    def fading(*more):
        fit(small(rdrop_alpha=0.0), rows, [Change(on, 0), Change(off), *more], max_epochs=8, log_every_n_steps=4)

    def on(module):
        module.rdrop_alpha = 4.0

    fading()
    with pytest.raises(ValueError, match=r"p = 0: network\.2"):
        fading(Change(on, 50))


def test_what_is_equal_by_chance_for_some_batches_is_left_in_peace(fit, rows):
    """With p = 0.02 every fourth batch of 32 numbers has equal views, and each is looked at."""
    module = Module(nn.Dropout(0.02), nn.Linear(8, 3))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    batches = [(torch.randn(4, 8), torch.arange(4) % 3) for _ in range(60)]
    fit(module, DataLoader(batches, batch_size=None), log_every_n_steps=1)
