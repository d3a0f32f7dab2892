import csv
import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import Net, ragged, train
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import FGM, VAT, Categorical, Gaussian, GradientPenalty, RDropMixin, Regularizer
from lightning_rdrop.callbacks import ExactAccumulation
from lightning_rdrop.regularizers.perturbation import Passes

EVERY = [FGM, GradientPenalty, VAT]


def softmax_network(**kwargs):
    """tanh, then softmax, in float64: W1 (16, 6), W2 (4, 16)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    return Net(network, rdrop_views=1, **kwargs).double(), torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 3, 1])


def closed_form(parameters, x, y):
    """Logits, and the gradient of each example's cross-entropy with respect to its input, written out."""
    w1, b1, w2, b2 = parameters
    hidden = torch.tanh(x @ w1.T + b1)
    logits = hidden @ w2.T + b2
    error = logits.softmax(-1) - F.one_hot(y, 4)
    return logits, ((error @ w2) * (1 - hidden**2)) @ w1


def finite_differences(function, parameters, step=1e-6):
    gradients = []
    for index, parameter in enumerate(parameters):
        gradient = torch.zeros_like(parameter)
        for entry in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                moved = [other.clone() for other in parameters]
                moved[index].view(-1)[entry] += sign * step
                values.append(function(moved))
            gradient.view(-1)[entry] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


def test_fgm_is_the_loss_at_the_worst_step_whose_length_is_epsilon():
    module, x, y = softmax_network()
    parameters = [parameter.detach() for parameter in module.parameters()]
    _, g = closed_form(parameters, x, y)
    r = 0.7 * g / g.norm(dim=1, keepdim=True)  # a constant of the optimisation

    def loss(parameters):
        return F.cross_entropy(closed_form(parameters, x + r, y)[0], y)

    term = FGM(epsilon=0.7)(module, x, y).mean
    torch.testing.assert_close(term, loss(parameters))
    gradients = torch.autograd.grad(term, list(module.parameters()))
    torch.testing.assert_close(list(gradients), finite_differences(loss, parameters), rtol=1e-5, atol=1e-8)


def test_the_gradient_penalty_is_differentiated_twice():
    module, x, y = softmax_network()
    parameters = [parameter.detach() for parameter in module.parameters()]

    def penalty(parameters):
        return closed_form(parameters, x, y)[1].square().sum(1).mean() / 2

    term = GradientPenalty()(module, x, y).mean
    torch.testing.assert_close(term, penalty(parameters))
    gradients = torch.autograd.grad(term, list(module.parameters()), materialize_grads=True)
    torch.testing.assert_close(list(gradients), finite_differences(penalty, parameters), rtol=1e-5, atol=1e-8)


def fisher_directions(module, x, gap=1.2):
    """The first eigenvector of J^T (diag p - p p^T) J of each example."""
    directions = []
    for row in x:
        jacobian = torch.autograd.functional.jacobian(module.network, row)
        p = module.network(row).softmax(-1).detach()
        values, vectors = torch.linalg.eigh(jacobian.T @ (p.diag() - p.outer(p)) @ jacobian)
        assert values[-1] > gap * values[-2]  # or the power iteration would be slow
        directions.append(vectors[:, -1])
    return torch.stack(directions)


def given_to(module):
    """What reaches the network, pass by pass."""
    seen = []

    def hook(network, inputs):
        if network.training:  # the guard's passes are in eval mode
            seen.append(inputs[0].detach())

    module.network.register_forward_pre_hook(hook)
    return seen


def test_vat_goes_along_the_first_eigenvector_of_the_fisher_information():
    module, x, _ = softmax_network()
    expected = fisher_directions(module, x)
    seen = given_to(module)
    VAT(epsilon=2.0, xi=1e-5, iterations=200)(module, x)
    clean, *_, last = seen
    assert len(seen) == 202
    torch.testing.assert_close(clean, x)
    along = ((last - x) / 2.0 * expected).sum(1).abs()
    torch.testing.assert_close(along, torch.ones(5).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("half", [False, True])
def test_vat_finds_its_direction_in_the_precision_of_the_network(half):
    """The published xi = 1e-6 finds none of it in float32, nor does 0.01 in bfloat16."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2000, 64), nn.Tanh(), nn.Linear(64, 4))
    module, x = Net(network), torch.randn(5, 2000)
    expected = fisher_directions(module, x, gap=1.05)
    seen = given_to(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        VAT(epsilon=2.0, iterations=30)(module, x)
    along = ((seen[-1] - x) / 2.0 * expected).sum(1).abs()
    assert along.min() > 0.95


def test_vat_is_the_published_one_sided_divergence():
    module, x, y = softmax_network()
    seen = given_to(module)
    term = VAT(epsilon=3.0)(module, x).mean
    p, q = (module.network(inputs).log_softmax(-1) for inputs in (x, seen[-1]))
    p = p.detach()
    expected = (p.exp() * (p - q)).sum(-1).mean()
    backward = (q.exp() * (q - p)).sum(-1).mean()
    assert abs(expected / backward - 1) > 0.05  # so that the other direction, or both, would be noticed
    torch.testing.assert_close(term, expected)
    parameters = list(module.parameters())
    torch.testing.assert_close(torch.autograd.grad(term, parameters), torch.autograd.grad(expected, parameters))

    y[3] = -100  # with a target, a row that does not count does not
    seen.clear()
    term = VAT(epsilon=3.0)(module, x, y)
    p, q = (module.network(inputs).log_softmax(-1) for inputs in (x, seen[2]))
    rows = (p.exp() * (p - q)).sum(-1)
    assert term.weight == 4
    torch.testing.assert_close(term.mean, rows[[0, 1, 2, 4]].mean())


def images(**kwargs):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(288, 3)
    )
    return Net(network, **kwargs), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", EVERY)
def test_nothing_of_the_passes_remains(kind, momentum):
    module, x, y = images(rdrop_views=1, rdrop_regularizers=[kind()])
    module.network[1].momentum = momentum
    plain, _, _ = images(rdrop_views=1)
    plain.network[1].momentum = momentum
    for one in (module, plain):
        torch.manual_seed(1)
        one.rdrop_step((x, y))
    assert module.network[1].num_batches_tracked == 1
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module.network._forward_hooks


@pytest.mark.parametrize("kind", [FGM, VAT])
def test_the_perturbation_of_each_image_has_the_norm_epsilon(kind):
    module, x, y = images()
    seen = given_to(module)
    kind(epsilon=0.5)(module, x, y)
    torch.testing.assert_close((seen[-1] - x).flatten(1).norm(dim=1), torch.full((4,), 0.5), rtol=1e-4, atol=0)


def test_all_passes_have_the_same_dropout_masks_and_the_next_step_has_others():
    module, x, y = images()
    outputs = []
    module.network.register_forward_hook(lambda network, inputs, output: outputs.append(output.detach()))
    assert VAT(epsilon=0.0)(module, x).total == 0
    clean, _, last = outputs
    assert torch.equal(clean, last)
    FGM(epsilon=0.0)(module, x, y)
    assert torch.equal(outputs[3], outputs[4])
    assert not torch.equal(clean, outputs[3])


def test_all_passes_have_the_same_masks_of_numpy_as_specaugment_draws_them():
    module, x, _ = images()
    scaled = module.network.register_forward_pre_hook(lambda network, inputs: (inputs[0] * np.random.uniform(),))
    assert VAT(epsilon=0.0)(module, x).total == 0
    scaled.remove()


WORDS = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **WORDS)).train()


def sentences():
    ids = torch.randint(4, 20, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3], [6]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_a_hugging_face_model_is_perturbed_at_its_words(bert, kind, frozen):
    module, (inputs, y) = Net(bert), sentences()
    module.requires_grad_(True)
    bert.bert.embeddings.requires_grad_(not frozen)
    term = kind()(module, inputs, y).mean
    term.backward()
    assert term > 0
    assert bert.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    words = bert.get_input_embeddings().weight.grad
    assert (words is None) if frozen else (words.abs().sum() > 0)


@pytest.mark.parametrize("kind", [FGM, VAT])
def test_padding_is_not_perturbed(bert, kind):
    module, (inputs, y) = Net(bert), sentences()
    words, positions = [], []
    bert.get_input_embeddings().register_forward_hook(lambda m, i, output: words.append(output.detach()))
    bert.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda m, i: positions.append(i[0].detach()))
    kind(epsilon=0.5)(module, inputs, y)
    added = positions[-1] - positions[0]
    assert (added[inputs["attention_mask"] == 0] == 0).all()
    torch.testing.assert_close(added.flatten(1).norm(dim=1), torch.full((4,), 0.5), rtol=1e-4, atol=0)


def test_vat_starts_from_noise_that_leaves_padding_out(bert):
    module, (inputs, _) = Net(bert), sentences()
    positions = []
    bert.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda m, i: positions.append(i[0].detach()))
    VAT(xi=0.2)(module, inputs)
    clean, small, _ = positions
    torch.testing.assert_close((small - clean).flatten(1).norm(dim=1), torch.full((4,), 0.2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", EVERY)
def test_the_encoder_of_a_seq2seq_model_is_perturbed(kind):
    transformers = pytest.importorskip("transformers")
    settings = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    module, (inputs, _) = Net(transformers.T5ForConditionalGeneration(settings).train()), sentences()
    encoded = []
    module.network.encoder.register_forward_hook(lambda m, i, output: encoded.append(output[0].detach()))
    target = torch.randint(20, (4, 5))
    term = kind()(module, inputs | {"decoder_input_ids": torch.randint(20, (4, 5))}, target)
    term.mean.backward()
    assert term.total > 0
    assert term.weight == 20
    if kind is not GradientPenalty:
        assert not torch.equal(encoded[0], encoded[-1])


def test_fgm_at_the_output_of_a_submodule():
    module, x, y = softmax_network()
    term = FGM(epsilon=0.3, at="network.1")(module, x, y).mean
    hidden = module.network[:2](x).detach()
    w2, b2 = module.network[2].weight, module.network[2].bias
    g = ((hidden @ w2.T + b2).softmax(-1) - F.one_hot(y, 4)) @ w2
    expected = F.cross_entropy((hidden + 0.3 * g / g.norm(dim=1, keepdim=True)) @ w2.T + b2, y)
    torch.testing.assert_close(term, expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_an_embedding_bag_frozen_or_not(kind, frozen):
    network = nn.Sequential(nn.EmbeddingBag(30, 8), nn.Tanh(), nn.Linear(8, 3))
    network[0].requires_grad_(not frozen)
    module = Net(network)
    kind()(module, torch.randint(30, (4, 5)), torch.tensor([0, 1, 2, 0])).mean.backward()
    assert network[2].weight.grad.abs().sum() > 0
    assert (network[0].weight.grad is None) == frozen


def test_each_token_is_a_row_of_the_penalty():
    """Two sentences, of three tokens and of one: half the squared gradient of each sentence's sum, over four rows."""
    head = nn.Linear(6, 4).double()
    module = Net(head, rdrop_views=1)
    x, y = torch.randn(2, 3, 6).double(), torch.tensor([[0, 1, 2], [3, -100, -100]])
    error = (head(x).softmax(-1) - F.one_hot(y.clamp(min=0), 4)) * (y != -100).unsqueeze(-1)
    term = GradientPenalty()(module, x, y)
    assert term.weight == 4
    torch.testing.assert_close(term.mean, (error @ head.weight).square().sum() / 2 / 4)


def test_the_loss_is_ce_plus_alpha_kl_plus_the_weighted_terms(small):
    every = [FGM(weight=0.5, epsilon=0.3), GradientPenalty(weight=2.0), VAT(weight=0.25)]
    module = small(rdrop_alpha=3.0, rdrop_regularizers=every)
    batch = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    terms = module.rdrop_step(batch)
    assert list(terms.extra) == ["fgm", "gradient_penalty", "vat"]
    assert all(value > 0 and not value.requires_grad for value in terms.extra.values())
    weighted = 0.5 * terms.extra["fgm"] + 2.0 * terms.extra["gradient_penalty"] + 0.25 * terms.extra["vat"]
    torch.testing.assert_close(terms.loss.detach(), terms.ce + 3.0 * terms.kl + weighted)

    torch.manual_seed(5)
    whole = torch.autograd.grad(module.rdrop_step(batch).loss, list(module.parameters()))
    torch.manual_seed(5)
    parts = [small.rdrop_step(_without(module), batch).loss]
    parts += [one.weight * one(module, *batch).mean for one in every]
    torch.testing.assert_close(whole, torch.autograd.grad(sum(parts), list(module.parameters())))


def _without(module):
    module.rdrop_regularizers = nn.ModuleList()
    return module


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_a_regularizer_passes_the_examples_once_and_not_their_views(small, passes):
    module = small(rdrop_views=3, rdrop_passes=passes, rdrop_regularizers=[FGM()])
    seen = given_to(module)
    module.rdrop_step((torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])))
    assert [len(rows) for rows in seen] == ([15] if passes == "joint" else [5] * 3) + [5, 5]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", EVERY)
def test_every_one_in_a_trainer(fit, small, rows, kind, views, tmp_path):
    module = small(rdrop_views=views, rdrop_alpha=2.0, rdrop_regularizers=[kind(weight=0.5)])
    logger = CSVLogger(tmp_path, name="")
    fit(module, rows, logger=logger, log_every_n_steps=1, max_epochs=2)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(table) == 16
    for row in table:
        loss, ce, kl, term = (float(row[f"train/{name}"]) for name in ("loss", "ce", "kl", kind.name))
        assert loss == pytest.approx(ce + 2.0 * kl + 0.5 * term, rel=1e-6)
        assert term > 0
        assert (kl > 0) == (views == 2)


def test_gradient_penalty_makes_the_loss_flat_and_vat_the_prediction(fit, small, rows):
    def trained(**kwargs):
        torch.manual_seed(0)
        module = small(p=0.0, rdrop_views=1, **kwargs)
        fit(module, rows, max_epochs=15)
        x, y = rows.dataset.tensors
        torch.manual_seed(0)
        return GradientPenalty()(module, x, y).mean.item(), VAT(iterations=5)(module, x).mean.item()

    penalty, vat = trained()
    assert trained(rdrop_regularizers=[GradientPenalty(weight=10.0)])[0] < 0.5 * penalty
    assert trained(rdrop_regularizers=[VAT(weight=2.0)])[1] < 0.5 * vat


def test_a_checkpoint_has_the_keys_of_the_class_and_is_safe_to_load(fit, small, rows, tmp_path):
    module = small(rdrop_alpha=2.5, rdrop_regularizers=[VAT(), FGM(epsilon=0.5)])
    trainer = fit(module, rows)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(small().state_dict())
    assert saved["hyper_parameters"] == {"p": 0.3, "rdrop_alpha": 2.5}
    for given in ([VAT()], []):  # an empty list switches them off
        loaded = small.load_from_checkpoint(tmp_path / "last.ckpt", rdrop_regularizers=given)
        assert len(loaded.rdrop_regularizers) == len(given)


class Again(VAT):
    name = "kl"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FGM(weight=-1.0), ValueError, r"weight must be a finite number >= 0, got -1\.0"),
        (lambda: FGM(weight=math.nan), ValueError, "weight must be a finite number >= 0, got nan"),
        (lambda: VAT(epsilon=math.inf), ValueError, "epsilon must be a finite number >= 0, got inf"),
        (lambda: FGM(epsilon="1"), ValueError, "epsilon must be a finite number >= 0, got '1'"),
        (lambda: VAT(xi=0.0), ValueError, r"xi must be > 0, .*got 0\.0"),
        (lambda: VAT(iterations=0), ValueError, "iterations must be an int >= 1, got 0"),
        (lambda: Net(None, rdrop_regularizers=VAT()), TypeError, r"must be a list of regularizers.*got VAT\(\)"),
        (lambda: Net(None, rdrop_regularizers=["vat"]), TypeError, r"must be a list of regularizers.*got \['vat'\]"),
        (lambda: Net(None, rdrop_regularizers=[VAT(), VAT()]), ValueError, r"train/vat would be logged twice"),
        (lambda: Net(None, rdrop_regularizers=[Again()]), ValueError, r"train/kl would be logged twice"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Twice(nn.Module):
    """A mean of embeddings, with positions, and a part that is never called."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(5, 8)
        self.words = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def forward(self, ids):
        embedded = self.words(ids) + self.positions(torch.arange(5))
        return self.head(self.lstm(embedded)[0].mean(1))


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ("network.wrds", ValueError, r"at='network\.wrds' is not a submodule of Net\. Did you mean network\.words"),
        ("", ValueError, r"at='' is not a submodule of Net\. Its submodules are network, network\.positions"),
        ("network.unused", ValueError, r"network\.unused, .*was not called in a forward pass"),
        ("network.lstm", TypeError, r"network\.lstm, .*gives a tuple, but only a floating-point tensor"),
        (None, ValueError, r"network\.positions, .*gives the shape \(5, 8\) for 4 examples.*at='\.\.\.'"),
    ],
)
def test_a_place_that_is_none(at, error, message):
    module = Net(Twice())
    with pytest.raises(error, match=message):
        FGM(at=at)(module, torch.randint(30, (4, 5)), torch.tensor([0, 1, 2, 0]))
    assert not any(part._forward_hooks for part in module.modules())
    FGM(at="network.words")(module, torch.randint(30, (4, 5)), torch.tensor([0, 1, 2, 0]))


def test_inputs_without_a_place_or_without_examples():
    with pytest.raises(ValueError, match=r"No place for the perturbation was found.*has no embedding.*at='\.\.\.'"):
        Passes(Net(nn.Linear(2, 2)), {"x": torch.ones(2, 2), "z": torch.ones(2, 2)}, None)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    with pytest.raises(TypeError, match="A perturbation has a norm per example, whose number is unknown here"):
        Passes(Net(nn.LSTM(2, 2)), packed, "network")


def test_a_mapping_of_one_tensor_of_floats_is_perturbed_itself():
    network = nn.Linear(6, 3)
    module = Net(network)
    x = torch.randn(4, 6)
    seen = given_to_forward(module)
    FGM(epsilon=0.5)(module, {"input": x}, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close((seen[-1] - x).norm(dim=1), torch.full((4,), 0.5))


def given_to_forward(module):
    seen = []
    module.network.register_forward_pre_hook(lambda m, a, k: seen.append(k["input"].detach()), with_kwargs=True)
    return seen


def test_a_regression():
    module = Net(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), rdrop_distance=Gaussian()).double()
    w, b = module.network[0].weight, module.network[0].bias
    x, y = torch.randn(5, 6).double(), torch.randn(5).double()
    gap = (x @ w.T + b).squeeze(1) - y
    torch.testing.assert_close(FGM()(module, x, y).mean, (gap + gap.sign() * w.norm()).square().mean())
    torch.testing.assert_close(GradientPenalty()(module, x, y).mean, 2 * gap.square().mean() * w.square().sum())
    torch.testing.assert_close(VAT(epsilon=0.5)(module, x).mean, 0.25 * w.square().sum())


class Tagger(RDropMixin, pl.LightningModule):
    """Five tags for each token, without any chance."""

    def __init__(self):
        penalties = [FGM(epsilon=0.5), GradientPenalty(weight=3.0)]
        super().__init__(rdrop_views=1, rdrop_regularizers=penalties)
        torch.manual_seed(7)
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_exact_accumulation_stays_exact(fit):
    def trained(batch_size, callbacks=(), **trainer):
        module = Tagger()
        fit(module, DataLoader(ragged(5, 4), batch_size), callbacks, **trainer)
        return weights(module)

    big = trained(8, max_epochs=2)
    exact = trained(2, [ExactAccumulation()], accumulate_grad_batches=4, max_epochs=2)
    plain = trained(2, accumulate_grad_batches=4, max_epochs=2)
    torch.testing.assert_close(exact, big)
    assert (plain - big).abs().max() > 1e-3


class TaggerAndVAT(Tagger):
    def __init__(self):
        super().__init__()
        self.rdrop_regularizers.append(VAT())


def of_a_rank():
    module = TaggerAndVAT()
    train(module, DataLoader(ragged(5, 4), 2), strategy="ddp", devices=2, max_epochs=2)
    return weights(module).tolist()


def test_two_ranks(pair):
    first, second = pair.run(of_a_rank)
    assert first == second
    assert (torch.tensor(first) - weights(TaggerAndVAT())).abs().max() > 0.1


class Rows(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=8)


def test_one_word_on_the_command_line_changes_the_method(tmp_path):
    from lightning_rdrop.cli import RDropCLI

    class CLI(RDropCLI):
        def after_fit(self):
            assert [part.name for part in self.model.rdrop_regularizers] == ["vat", "fgm"]
            assert self.model.rdrop_regularizers[0].epsilon == 2.0
            metrics = self.trainer.callback_metrics
            weighted = 0.5 * metrics["train/vat"] + metrics["train/fgm"]
            torch.testing.assert_close(metrics["train/loss"], metrics["train/ce"] + weighted)

    CLI(
        args=[
            "fit", "--model=Classifier", "--model.network=torch.nn.Linear", "--model.network.in_features=8",
            "--model.network.out_features=3", "--model.num_classes=3", "--model.rdrop_views=1",
            '--model.rdrop_regularizers=[{"class_path": "VAT", "init_args": {"epsilon": 2.0, "weight": 0.5}}]',
            "--model.rdrop_regularizers+=FGM",
            f"--data={__name__}.Rows", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
            "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}",
            "--trainer.enable_progress_bar=False",
        ]
    )  # fmt: skip
    checkpoint = next(Path(tmp_path).rglob("*.ckpt"))
    torch.load(checkpoint, weights_only=True)


def test_a_regularizer_of_ones_own(fit, rows, small):
    class Flat(Regularizer):
        """The squared logits."""

        name = "flat"

        def forward(self, module, inputs, target=None):
            logits = module.rdrop_predict(inputs)
            return Categorical().between(logits, torch.zeros_like(logits))

    metrics = fit(small(rdrop_regularizers=[Flat(weight=0.1)]), rows).callback_metrics
    assert metrics["train/flat"] > 0
    own = metrics["train/ce"] + 4.0 * metrics["train/kl"]
    torch.testing.assert_close(metrics["train/loss"], own + 0.1 * metrics["train/flat"])
