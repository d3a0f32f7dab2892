import copy
from importlib import import_module

import pytest
import torch
from conftest import Net, sequential
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import Gaussian
from lightning_rdrop.dropout import set_probability

transformers = pytest.importorskip("transformers")

BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 40}
D_MODEL = {"d_model": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 16}


def tokens(examples, length=7, decoder=False, labels="class"):
    generator = torch.Generator().manual_seed(examples)
    inputs = {"input_ids": torch.randint(3, 40, (examples, length), generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][-1, length // 2 :] = 0
    if decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 40, (examples, 5), generator=generator)
    shape = {"class": (examples,), "token": (examples, length), "decoder": (examples, 5)}[labels]
    return inputs | {"labels": torch.randint(2, shape, generator=generator)}


def bert_like(name):
    pads = {} if name == "Bert" else {"pad_token_id": 1}
    settings = getattr(transformers, f"{name}Config")(**BERT, **pads, max_position_embeddings=20)
    return getattr(transformers, f"{name}ForSequenceClassification")(settings), tokens


def distilbert():
    settings = transformers.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=16, n_layers=4, n_heads=2)
    return transformers.DistilBertForSequenceClassification(settings), tokens


def gpt2():
    settings = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=20)
    return transformers.GPT2LMHeadModel(settings), lambda n, t=7: tokens(n, t, labels="token")


def llama():
    settings = transformers.LlamaConfig(**BERT, num_key_value_heads=1, attention_dropout=0.2)
    return transformers.LlamaForCausalLM(settings), lambda n, t=7: tokens(n, t, labels="token")


def bart():
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             {"layers": 2, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
    settings = transformers.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=20, **sizes)
    return transformers.BartForConditionalGeneration(settings), lambda n, t=7: tokens(n, t, True, "decoder")


def t5():
    settings = transformers.T5Config(vocab_size=40, **D_MODEL)
    return transformers.T5ForConditionalGeneration(settings), lambda n, t=7: tokens(n, t, True, "decoder")


def images(examples, size=8):
    generator = torch.Generator().manual_seed(examples)
    x = torch.randn(examples, 3, size, size, generator=generator, dtype=torch.double)
    return x, torch.arange(examples) % 2


def vit():
    sizes = {name: value for name, value in BERT.items() if name != "vocab_size"}
    settings = transformers.ViTConfig(image_size=8, patch_size=4, hidden_dropout_prob=0.1, **sizes)
    return transformers.ViTForImageClassification(settings), images


class Block(nn.Module):
    """As in a ResNet."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm, self.drop = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Dropout2d(0.2),
        )

    def forward(self, x):
        return F.relu(x + self.drop(self.norm(self.conv(x))))


def resnet():
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4, 2))
    return nn.Sequential(stem, Block(4), Block(4), head), images


def features(*shape):
    def batch_of(examples):
        generator = torch.Generator().manual_seed(examples)
        return torch.randn(examples, *shape, generator=generator, dtype=torch.double), torch.arange(examples) % 2

    return batch_of


class Padded(nn.Module):
    """In eval mode nn.TransformerEncoder takes a fast path here, over nested tensors."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.lower, self.upper = (nn.TransformerEncoder(layer, 2) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        mask = (torch.arange(x.shape[1]) >= 4).expand(x.shape[:2])
        x = self.upper(self.lower(x, src_key_padding_mask=mask), src_key_padding_mask=mask)
        return self.head(x[:, :4].mean(1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, gate):
        return self.linear(x) * gate.clone()


class InPlace(nn.Module):
    """Two layers with one mask, which is written to in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Gated(), Gated(), nn.Linear(8, 2)

    def forward(self, x):
        mask = x > 0
        x = self.first(x, mask)
        mask.logical_not_()
        return self.head(self.second(x, mask))


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Inference(nn.Module):
    """A part that is never trained, by inference tensors."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(8, 8).requires_grad_(False), Scaled(8, 2)

    def forward(self, x):
        with torch.inference_mode():
            x = self.frozen(x)
        return self.head(x)


class Recomputed(nn.Module):
    """A layer before the split and one behind it that are computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.lower, self.middle, self.upper, self.head = (nn.Linear(8, size) for size in (8, 8, 8, 2))

    def forward(self, x):
        x = self.middle(checkpoint(self.lower, x, use_reentrant=False))
        return self.head(checkpoint(self.upper, x, use_reentrant=False))


CASES = [
    (lambda: bert_like("Bert"), "encoder.layer.2"),
    (lambda: bert_like("Roberta"), "encoder.layer.1"),
    (distilbert, "transformer.layer.3"),
    (gpt2, "transformer.h.2"),
    (llama, "model.layers.3"),
    (bart, "encoder.layers.1"),
    (bart, "decoder.layers.1"),
    (t5, "encoder.block.1"),
    (t5, "decoder.block.1"),
    (vit, "*.layer*.2"),  # its encoder was `encoder.layer` before transformers 5.20
    (resnet, "network.2"),
    (lambda: (Padded(), features(6, 8)), "upper"),
    (lambda: (Padded(), features(6, 8)), "upper.layers.1"),
    (lambda: (InPlace(), features(8)), "first"),
    (lambda: (Inference(), features(8)), "head"),
    (lambda: (Recomputed(), features(8)), "middle"),
]
NAMES = ["bert", "roberta", "distilbert", "gpt2", "llama", "bart-e", "bart-d", "t5-e", "t5-d", "vit", "resnet"]
NAMES += ["padded", "inside", "in-place", "inference", "checkpoint"]


def pair(build, at, **kwargs):
    """The same network doubled at the entrance and late, with nothing random, and its batches."""
    torch.manual_seed(0)
    network, batch_of = build()
    network = network.double().train()
    early = Net(copy.deepcopy(network), **kwargs)
    late = Net(network, rdrop_duplicate_at=at, **kwargs)
    return early, late, batch_of


def gradients(module, batch):
    torch.manual_seed(1)
    terms = module.rdrop_step(batch)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return terms, torch.autograd.grad(terms.loss, parameters, allow_unused=True)


@pytest.mark.parametrize(("build", "at"), CASES, ids=NAMES)
def test_a_late_split_gives_the_loss_and_the_gradients_of_an_early_one(build, at):
    early, late, batch_of = pair(build, at, rdrop_guard="off")
    for module in (early, late):
        set_probability(module, 0.0)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()  # the unbiased variance of doubled rows is another
    for examples, length in ((4, 7), (7, 7), (1, 6), (5, 8)):  # the first proves it; B == T; B == 1
        batch = batch_of(examples, length) if isinstance(batch_of(examples), dict) else batch_of(examples)
        (terms, found), (expected, wanted) = gradients(late, batch), gradients(early, batch)
        torch.testing.assert_close(terms.loss, expected.loss)
        torch.testing.assert_close(terms.prediction, expected.prediction)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def without_padding(batch):
    return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}


@pytest.mark.parametrize("padded_first", [True, False])
@pytest.mark.parametrize(("build", "at"), CASES[:9], ids=NAMES[:9])
def test_masks_that_come_and_go(build, at, padded_first):
    """Attention is called without a mask where nothing is padded."""
    early, late, batch_of = pair(build, at, rdrop_guard="off")
    for module in (early, late):
        set_probability(module, 0.0)
    for number, examples in enumerate((4, 5, 6, 1, 3)):
        batch = batch_of(examples)
        batch = batch if (number % 2 == 0) == padded_first else without_padding(batch)
        (terms, found), (expected, wanted) = gradients(late, batch), gradients(early, batch)
        torch.testing.assert_close(terms.loss, expected.loss)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    (split,) = late._rdrop_late._splits.values()
    late.rdrop_step(batch_of(4)), late.rdrop_step(without_padding(batch_of(4)))
    assert late._rdrop_late._splits == {next(iter(late._rdrop_late._splits)): split}  # all is known


def test_a_mask_that_comes_later_is_refused_where_ranks_share_the_weights(monkeypatch):
    room = import_module("lightning_rdrop.late_duplication.find_split")
    monkeypatch.setattr(room, "has_sharded_weights", lambda network: True)
    module = Net(bert_like("Bert")[0].train(), rdrop_duplicate_at="encoder.layer.2", rdrop_guard="off")
    module.rdrop_step(without_padding(tokens(4)))
    with pytest.raises(ValueError, match=r"encoder\.layer\.2 is called with other tensors than before.*share the wei"):
        module.rdrop_step(tokens(4))


FROZEN = [
    (lambda: bert_like("Bert"), "encoder.layer.2", ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]),
    (gpt2, "transformer.h.1", ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0"]),
    (t5, "encoder.block.1", ["shared", "encoder.dropout", "encoder.block.0"]),
    (resnet, "network.2", ["0", "1"]),
]


def freeze(network, names):
    for name in names:
        network.get_submodule(name).eval().requires_grad_(False)


@pytest.mark.parametrize("automatic", [True, False], ids=["auto", "by name"])
@pytest.mark.parametrize(("build", "at", "frozen"), FROZEN[:2], ids=["bert", "gpt2"])
def test_masks_that_come_to_a_split_with_dropout_on(build, at, frozen, automatic):
    """As in a batch doubled early: no random number is drawn for the pass that fails."""
    early, late, batch_of = pair(build, "auto" if automatic else at, rdrop_guard="off")
    for module in (early, late):
        freeze(module.network, frozen)
    for batch in (without_padding(batch_of(4)), batch_of(4), without_padding(batch_of(3)), batch_of(5)):
        (terms, found), (expected, wanted) = gradients(late, batch), gradients(early, batch)
        torch.testing.assert_close(terms.kl, expected.kl)
        torch.testing.assert_close(found, wanted)


def test_auto_saves_nothing_behind_an_embedding_and_lets_masks_come():
    """BERT makes its mask behind the embeddings, from B rows."""
    module = Net(bert_like("Bert")[0].train(), rdrop_duplicate_at="auto")
    for batch in (without_padding(tokens(4)), tokens(4)):
        assert module.rdrop_step(batch).kl > 0
    assert list(module._rdrop_late._splits.values()) == [None]


class Unpadding(nn.Linear):
    """As flash attention: padding comes as lengths, and what has none is left 0, without an error."""

    def forward(self, x, lengths=None):
        x = super().forward(x)
        if lengths is None:
            return x
        padded = torch.zeros_like(x)
        padded[: len(lengths)] = x[: len(lengths)] * lengths.view(-1, 1)
        return padded


class Looping(nn.Module):
    """A cell that is called for each number of an example, with a gate from before the split."""

    def __init__(self):
        super().__init__()
        self.first, self.cell = nn.Linear(1, 8), Gated()

    def forward(self, x):
        gates = x.unsqueeze(-1) > 0
        steps = self.first(x.unsqueeze(-1))
        return sum(self.cell(steps[:, t], gates[:, t]) for t in range(x.shape[1]))


class Late(nn.Module):
    """What comes with a negative number is combined with the second layer as ``combine`` says."""

    def __init__(self, combine):
        super().__init__()
        self.first, self.drop, self.second, self.combine = nn.Linear(8, 8), nn.Dropout(0.3), Unpadding(8, 3), combine

    def forward(self, x):
        hidden = self.drop(self.first(x))
        return self.second(hidden) if (x >= 0).all() else self.combine(self, hidden, (x > 0).sum(1))


@pytest.mark.parametrize(
    ("network", "at"),
    [
        (lambda: Late(lambda self, hidden, lengths: self.second(hidden, lengths)), "drop"),
        (lambda: Late(lambda self, hidden, lengths: self.second(hidden) * lengths.view(-1, 1)), "auto"),
        (Looping, "first"),
    ],
    ids=["silently", "in the network itself", "in a further call"],
)
def test_tensors_that_come_later(network, at):
    early, late, _ = pair(lambda: (network(), None), at, rdrop_guard="off")
    x, y = torch.randn(4, 8, dtype=torch.double), torch.tensor([0, 1, 2, 0])
    for inputs in (x.abs(), x, x.abs(), x) if network is not Looping else (x[:, :3], x, x[:, :5]):
        torch.testing.assert_close(gradients(late, (inputs, y))[1], gradients(early, (inputs, y))[1])


def test_what_cannot_be_doubled_in_a_later_batch_is_said_and_a_networks_own_error_stays():
    module = Net(
        Late(lambda self, hidden, lengths: self.second(hidden) * lengths.view(-1, 1)), rdrop_duplicate_at="drop"
    )
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    module.rdrop_step((x.abs(), y))
    with pytest.raises(ValueError, match=r"cannot be duplicated before network\.drop.*must match the size of tensor"):
        module.rdrop_step((x, y))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module.rdrop_step((x[:, :5], y))


@pytest.mark.parametrize(("build", "at", "frozen"), FROZEN, ids=["bert", "gpt2", "t5", "resnet"])
@pytest.mark.parametrize("views", [2, 3])
def test_with_dropout_on_the_masks_are_the_same_too(build, at, frozen, views):
    early, late, batch_of = pair(build, at, rdrop_views=views)
    for module in (early, late):
        freeze(module.network, frozen)
    for examples in (4, 6):
        (terms, found), (expected, wanted) = gradients(late, batch_of(examples)), gradients(early, batch_of(examples))
        assert terms.kl > 0
        torch.testing.assert_close(terms.kl, expected.kl)
        torch.testing.assert_close(found, wanted)


def test_what_lies_before_runs_once_and_keeps_no_graph_where_it_is_frozen():
    module = Net(bert_like("Bert")[0].train(), rdrop_duplicate_at="encoder.layer.2")
    freeze(module.network, FROZEN[0][2])
    module.rdrop_step(tokens(4))
    rows = {}
    for number, layer in enumerate(module.network.bert.encoder.layer):
        layer.register_forward_hook(lambda _, args, out, number=number: rows.update({number: (len(out), out.grad_fn)}))
    module.rdrop_step(tokens(5))
    assert {number: size for number, (size, _) in rows.items()} == {0: 5, 1: 5, 2: 10, 3: 10}
    assert [graph is None for _, graph in rows.values()] == [True, True, False, False]
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def test_auto_in_a_half_frozen_encoder():
    module = Net(bert_like("Bert")[0].train(), rdrop_duplicate_at="auto")
    freeze(module.network, FROZEN[0][2])
    assert module.rdrop_step(tokens(4)).kl > 0
    (split,) = module._rdrop_late._splits.values()
    # no residual connection reaches into it: what is added to its result is an argument of the submodule that does so
    assert "duplicated before network.bert.encoder.layer.2.attention.self; a forward pass takes 75%" in str(split)


def test_auto_passes_over_a_layerdrop_that_drops_nothing():
    network, batch_of = bart()
    network.train()
    set_probability(network, 0.0)
    network.model.decoder.layers[1].dropout = 0.3
    module = Net(network, rdrop_duplicate_at="auto")
    assert module.rdrop_step(batch_of(4)).kl > 0
    (split,) = module._rdrop_late._splits.values()
    assert split.at == ("network.model.decoder.layers.1",)


def test_batch_norm_behind_the_split_sees_all_rows():
    network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 3))
    early, late = (Net(copy.deepcopy(network), rdrop_duplicate_at=at) for at in (None, "network.1"))
    batch = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    for one, other in zip(gradients(late, batch)[1], gradients(early, batch)[1], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(late.network[2].running_var, early.network[2].running_var)
    assert late.network[2].num_batches_tracked == 1


def test_a_mask_of_positions_is_not_a_batch():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))
            return x

    early, late = (Net(Causal(), rdrop_distance=Gaussian(), rdrop_duplicate_at=at) for at in (None, "layers.1"))
    late.load_state_dict(early.state_dict())
    for module in (early, late):
        module.network.layers[0].eval()
    for examples in (6, 4, 6):  # B == T but once
        batch = torch.randn(examples, 6, 8), torch.randn(examples, 6, 8)
        torch.testing.assert_close(gradients(late, batch)[1], gradients(early, batch)[1], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_compiled_networks_are_refused():
    network = bert_like("Bert")[0].train()
    network.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"network\.bert recomputes its activations"):
        Net(network, rdrop_duplicate_at="auto").rdrop_step(tokens(4))
    compiled = torch.compile(sequential(0.3), backend="eager")
    with pytest.raises(ValueError, match="network is compiled, which hides the calls"):
        Net(compiled, rdrop_duplicate_at="auto").rdrop_step((torch.randn(4, 8), torch.zeros(4, dtype=torch.long)))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), Gated(), nn.Linear(8, 3)

    def forward(self, x, mask=None):
        x = self.first(x)
        return self.head(self.second(x, torch.ones(8) if mask is None else mask))


def test_inputs_of_another_structure_have_a_split_of_their_own():
    early = Net(Masked(), rdrop_guard="off")
    late = Net(copy.deepcopy(early.network), rdrop_duplicate_at="second", rdrop_guard="off")
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    for inputs in ({"x": x}, {"x": x, "mask": (x > 0).float()}, {"x": x}):
        torch.testing.assert_close(gradients(late, (inputs, y))[1], gradients(early, (inputs, y))[1])


def test_a_split_that_is_left_out_is_noticed():
    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.left_out, self.head = nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))

        def forward(self, x):
            return self.head(x if self.training else self.left_out(x))

    module = Net(Leaving(), rdrop_duplicate_at="left_out")
    with pytest.raises(ValueError, match=r"network\.left_out was not called in this forward pass"):
        module.rdrop_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))


def test_it_trains(fit):
    x = torch.randn(22, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=4)
    module = Net(sequential(0.0, 0.3), rdrop_duplicate_at="auto")
    before = copy.deepcopy(module.network[0].weight)
    assert fit(module, loader, max_epochs=2).callback_metrics["train/kl"] > 0
    assert not torch.equal(module.network[0].weight, before)
