"""A loss that the model makes itself is added once, whatever the way in which the views are drawn."""

import copy
import warnings
from collections import namedtuple

import pytest
import pytorch_lightning as pl
import torch
from conftest import TOKEN_IDS, Small
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import VAT, Head, RDropMixin, SimCSEMixin, WithLosses, symmetric_kl

ALPHA = 2.0


class Experts(RDropMixin, pl.LightningModule):
    """Two experts and a gate, whose load is to be balanced."""

    def __init__(self, fused=False, **kwargs):
        super().__init__(**{"rdrop_alpha": ALPHA} | kwargs)
        self.stem, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)
        self.gate, self.experts, self.head = nn.Linear(8, 2), nn.Linear(8, 16), nn.Linear(8, 3)
        self.fused = fused
        self.passes = []

    def hidden_and_balance(self, x):
        x = self.dropout(self.stem(x))
        gates = self.gate(x).softmax(-1)
        hidden = (self.experts(x).unflatten(-1, (2, 8)) * gates.unsqueeze(-1)).sum(1)
        balance = gates.mean(0).square().sum()  # no mean over rows: on two batches together it is another one
        if self.training:
            self.passes.append((hidden, balance))
        return hidden, balance

    def forward(self, x):
        return self.head(self.hidden_and_balance(x)[0])

    def rdrop_head(self):
        return Head(self.head.weight, self.head.bias) if self.fused else None

    def rdrop_hidden(self, inputs):
        return self.hidden_and_balance(inputs)[0]

    def rdrop_predict_with_losses(self, inputs):
        hidden, balance = self.hidden_and_balance(inputs)
        return WithLosses(hidden if self.fused else self.head(hidden), {"balance": 0.1 * balance})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batch_of(seed=0):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).double()
    return x, torch.arange(6) % 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "way",
    [{}, {"rdrop_passes": "separate"}, {"rdrop_duplicate_at": "dropout"}, {"rdrop_duplicate_at": "head"}],
    ids=str,
)
def test_loss_and_gradients_are_the_formula(way, fused):
    if "head" in way.values():
        if fused:
            pytest.skip("the head is no submodule that is called")
        module = Experts(**way, rdrop_guard="off").double()  # all is shared, dropout as well
    else:
        module = Experts(fused, **way).double()
    x, target = batch_of()
    module.rdrop_step((x, target))  # the guard looks at the first batch, in passes of its own
    module.passes.clear()
    terms = module.rdrop_step((x, target))
    assert len(module.passes) == (2 if way == {"rdrop_passes": "separate"} else 1)
    hidden = torch.cat([hidden for hidden, _ in module.passes])
    logits = module.head(hidden if len(hidden) == 12 else hidden.repeat(2, 1)).unflatten(0, (2, 6))
    balance = 0.1 * torch.stack([balance for _, balance in module.passes]).mean()
    ce, kl = F.cross_entropy(logits.flatten(0, 1), target.repeat(2)), symmetric_kl(*logits).mean() / 2
    loss = ce + ALPHA * kl + balance
    torch.testing.assert_close((terms.ce, terms.kl, terms.extra["balance"]), (ce, kl, balance))
    torch.testing.assert_close(terms.loss, loss)
    assert not terms.extra["balance"].requires_grad
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, parameters), wanted)


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_a_step_of_the_trainer_is_the_step_by_hand(fit, passes):
    module = Experts(rdrop_passes=passes, rdrop_guard="off").double()
    by_hand = copy.deepcopy(module)
    torch.manual_seed(1)
    metrics = fit(module, DataLoader([batch_of()], batch_size=None), precision="64-true").callback_metrics
    logits = [by_hand.head(hidden) for hidden, _ in module.passes]
    assert len(logits) == (1 if passes == "joint" else 2)
    logged = {name: float(metrics[f"train/{name}"]) for name in ("loss", "ce", "kl", "balance")}
    assert logged["balance"] == pytest.approx(0.1 * sum(float(balance) for _, balance in module.passes) / len(logits))
    assert logged["loss"] == pytest.approx(logged["ce"] + ALPHA * logged["kl"] + logged["balance"])
    ce = F.cross_entropy(torch.cat(logits), batch_of()[1].repeat(2))
    assert logged["ce"] == pytest.approx(float(ce))


def test_no_other_pass_has_it():
    module = Experts(rdrop_regularizers=[VAT()]).double()
    module.rdrop_step(batch_of())
    module.passes.clear()
    terms = module.rdrop_step(batch_of())
    balance = 0.1 * module.passes[0][1]  # the first pass is R-Drop's, the others are those of VAT
    assert len(module.passes) > 1
    torch.testing.assert_close(terms.extra["balance"], balance)
    torch.testing.assert_close(terms.loss, terms.ce + ALPHA * terms.kl + terms.extra["vat"] + balance)


def test_a_step_of_ones_own_has_it():
    module = Experts().double()
    x, target = batch_of()
    predictions = module.rdrop_draw(x, target)
    assert predictions.prediction.shape == (2, 6, 3)
    terms = module.rdrop_loss(predictions, target)
    torch.testing.assert_close(terms.loss, terms.ce + ALPHA * terms.kl + predictions.losses["balance"])


def test_unlabelled_examples_have_theirs():
    module = Experts(rdrop_unlabeled_weight=0.5).double()
    terms = module.rdrop_step({"labeled": batch_of(), "unlabeled": batch_of(1)[0]})
    extra = terms.extra
    torch.testing.assert_close(extra["balance"], extra["balance_labeled"] + 0.5 * extra["balance_unlabeled"])
    torch.testing.assert_close(terms.loss, terms.ce + ALPHA * terms.kl + extra["balance"])


def test_a_loss_that_comes_with_the_unlabelled_part_only():
    class Some(Experts):
        def rdrop_predict_with_losses(self, inputs):
            found = super().rdrop_predict_with_losses(inputs)
            return found if len(inputs) % 6 else found.prediction

    module = Some(rdrop_unlabeled_weight=0.5).double()
    terms = module.rdrop_step({"labeled": batch_of(), "unlabeled": batch_of(1)[0][:5]})
    torch.testing.assert_close(terms.loss, terms.ce + ALPHA * terms.kl + 0.5 * terms.extra["balance_unlabeled"])


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_simcse_has_it(passes):
    class Encoder(SimCSEMixin, pl.LightningModule):
        def __init__(self):
            super().__init__(rdrop_passes=passes)
            self.network = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 4))

        def forward(self, x):
            return self.network(x)

        def rdrop_predict_with_losses(self, inputs):
            output = self(inputs)
            return WithLosses(output, {"size": output.square().mean()})

    terms = Encoder().rdrop_step(batch_of()[0].float())
    assert terms.extra["size"] > 0
    torch.testing.assert_close(terms.loss, terms.ce + terms.extra["size"])


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ({"kl": torch.ones(())}, ValueError, "train/kl would be logged twice"),
        ({"vat": torch.ones(())}, ValueError, "train/vat would be logged twice"),
        ({"size": 0.1}, TypeError, r"losses\['size'\] must be a tensor, got a float"),
    ],
)
def test_bad_losses_are_refused(losses, error, message):
    class Bad(Experts):
        def rdrop_predict_with_losses(self, inputs):
            return WithLosses(self(inputs), losses)

    with pytest.raises(error, match=message):
        Bad(rdrop_regularizers=[VAT()]).double().rdrop_step(batch_of())


def test_dead_dropout_is_seen_behind_a_loss_that_is_random():
    class Jitter(Experts):
        def __init__(self):
            super().__init__(rdrop_passes="separate")
            self.dropout.p = 0.0

        def rdrop_predict_with_losses(self, inputs):
            return WithLosses(self(inputs), {"noise": torch.rand(())})

    with pytest.raises(ValueError, match="The views are identical"):
        Jitter().double().rdrop_step(batch_of())


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_the_experts_of_hugging_face(fit, passes):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.MixtralConfig(
        **sizes, num_key_value_heads=2, num_local_experts=4, attention_dropout=0.3, router_aux_loss_coef=0.02,
        attn_implementation="eager", **TOKEN_IDS,
    )  # fmt: skip
    balances = []

    class Mixtral(RDropMixin, pl.LightningModule):
        def __init__(self):
            super().__init__(rdrop_passes=passes, rdrop_alpha=ALPHA)
            self.model = transformers.MixtralForCausalLM(settings).train()

        def forward(self, **inputs):
            return self.model(**inputs, use_cache=False)

        def rdrop_predict_with_losses(self, inputs):
            output = self(**inputs, output_router_logits=True)
            if self.training:
                balances.append(output.aux_loss.detach())
            return WithLosses(output.logits, {"balance": 0.02 * output.aux_loss})

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    tokens = torch.randint(4, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
    module = Mixtral()
    metrics = fit(module, DataLoader([batch] * 8, batch_size=None)).callback_metrics
    value = {name: float(metrics[f"train/{name}"]) for name in ("loss", "ce", "kl", "balance")}
    last = balances[-1:] if passes == "joint" else balances[-2:]
    assert value["balance"] == pytest.approx(0.02 * float(torch.stack(last).mean()), rel=1e-5)
    assert value["loss"] == pytest.approx(value["ce"] + ALPHA * value["kl"] + value["balance"], rel=1e-5)
    assert value["ce"] < float(metrics["train/ce_epoch"])  # it learns


def test_a_model_with_a_loss_beside_its_logits():
    """The labels are among the inputs, as a Hugging Face model wants them, and are doubled with them."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    class Bert(RDropMixin, pl.LightningModule):
        def __init__(self):
            super().__init__(rdrop_alpha=ALPHA)
            settings = transformers.BertConfig(vocab_size=20, num_labels=3, **sizes)
            self.model = transformers.BertForSequenceClassification(settings).train()

        def forward(self, **inputs):
            return self.model(**inputs)

        def rdrop_unpack(self, batch):
            return batch, batch["labels"]

        def rdrop_predict_with_losses(self, inputs):
            output = self(**inputs)
            return WithLosses(output.logits, {"own": output.loss})

    batch = {"input_ids": torch.randint(20, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}
    terms = Bert().rdrop_step(batch)
    torch.testing.assert_close(terms.extra["own"], terms.ce)  # both are the cross-entropy of the 8 rows
    torch.testing.assert_close(terms.loss, 2 * terms.ce + ALPHA * terms.kl)


Outputs = namedtuple("Outputs", ["logits", "aux2", "aux1"])  # as torchvision's GoogLeNet


class OfGoogLeNet(Small):
    def forward(self, x):
        logits = super().forward(x)
        return Outputs(logits, logits * 2, logits.detach()) if self.training else logits


class OfMixtral(Small):
    def rdrop_unpack(self, batch):
        return {"x": batch[0]}, batch[1]

    def forward(self, x):
        logits = super().forward(x)
        return {"logits": logits, "aux_loss": logits.mean(), "router_z_loss": logits.square().mean(), "hidden": logits}


@pytest.mark.parametrize(
    ("kind", "names", "call"),
    [(OfGoogLeNet, "aux2", "self(inputs)"), (OfMixtral, "aux_loss and router_z_loss", r"self(**inputs)")],
)
def test_a_loss_beside_the_logits_is_told_once_in_a_fit(fit, rows, kind, names, call):
    with pytest.warns(UserWarning, match=rf"forward of {kind.__name__} returns {names} besides logits") as warned:
        fit(kind(), rows, max_epochs=2)
    (said,) = (str(one.message) for one in warned if "besides logits" in str(one.message))
    assert f"output = {call}" in said


def test_a_loss_beside_the_logits_that_is_used_or_ignored_on_purpose_is_left_in_peace(fit, rows):
    class Used(OfMixtral):
        def rdrop_predict_with_losses(self, inputs):
            output = self(**inputs)
            return WithLosses(output["logits"], {"own": output["aux_loss"]})

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*besides logits")
        fit(Used(), rows)
        fit(OfMixtral(rdrop_guard="off"), rows)
