"""Every stochastic layer is found and works; switches touch nothing else; reasons name the culprit and the line."""

import ast
import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_rdrop.dropout import (
    as_table,
    dead_layers,
    explain,
    explain_dead,
    set_probability,
    stochastic_layers,
    switch_on,
)
from lightning_rdrop.guard import diagnose, same


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only wait for each other in networks as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class StochasticDepth(nn.Module):
    """As torchvision's."""

    def __init__(self, p: float, mode: str):
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        rows = len(x) if self.mode == "row" else 1
        return x * x.new_empty((rows,) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p) / (1 - self.p)


class DenseLayer(nn.Module):
    """As torchvision's: a functional dropout with a number of the module."""

    def __init__(self, drop_rate: float):
        super().__init__()
        self.drop_rate = drop_rate

    def forward(self, x):
        return nn.functional.dropout(x, p=self.drop_rate, training=self.training)


class LayerDropEncoder(nn.Module):
    """As Hugging Face's encoders: one coin for the batch."""

    def __init__(self, layerdrop: float):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.layerdrop = layerdrop

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand([]) >= self.layerdrop:
                x = x + layer(x)
        return x


class Attention(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=p, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, layers: int, p: float):
        super().__init__()
        self.recurrent = nn.LSTM(4, 4, num_layers=layers, dropout=p)

    def forward(self, x):
        return self.recurrent(x)[0]


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40}
    bert = small | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    gpt = small | {"n_embd": 16, "n_layer": 2, "n_head": 2}
    sizes = {
        "Bert": bert,
        "Roberta": bert,
        "Electra": bert | {"embedding_size": 16},
        "DistilBert": small | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
        "Bart": small
        | {"d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        | {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        | {f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
        "T5": small | {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
        "GPT2": gpt,
        "GPTJ": gpt | {"rotary_dim": 4},
        "Llama": bert,
        "Falcon": {key: size for key, size in bert.items() if key != "intermediate_size"}
        | {"parallel_attn": False, "alibi": True},  # otherwise it leaves out some of its dropout
        "ViT": {key: size for key, size in bert.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4},
    }[name]
    torch.manual_seed(0)
    # embeddings as large as in a trained model, or attention is uniform over equal values and hides its dropout
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, initializer_range=0.5))


HUGGING_FACE = ("Bert", "Roberta", "Electra", "DistilBert", "Bart", "T5", "GPT2", "GPTJ", "Llama", "Falcon", "ViT")


def predict(network: nn.Module) -> Tensor:
    """One pass; the same input every time."""
    kind = type(network).__name__
    generator = torch.Generator().manual_seed(1)
    if kind.startswith("ViT"):
        inputs = {"pixel_values": torch.rand(2, 3, 8, 8, generator=generator)}
    else:
        tokens = torch.randint(3, 40, (2, 6), generator=generator)
        inputs = {"input_ids": tokens}
        if kind.startswith(("T5", "Bart")):
            inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        return network(**inputs).last_hidden_state


def passes_differ(draw: Callable[[], Tensor]) -> bool:
    first = draw()
    return any(not same(first, draw()) for _ in range(8))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_nothing_is_missed_and_nothing_is_idle(name, attention):
    network = hugging_face(name).train()
    network.set_attn_implementation(attention)
    before = {layer.name: layer.p for layer in stochastic_layers(network)}
    earlier = set_probability(network, 0.0)
    first = predict(network)
    assert all(torch.equal(first, predict(network)) for _ in range(3))
    for layer in earlier:
        if name == "Falcon" and layer.endswith("hidden_dropout") and ".config." not in layer:
            continue  # a copy that Falcon keeps and does not use
        set_probability(network, {layer: 0.5})
        assert passes_differ(lambda: predict(network)), f"{layer} of {name} has no effect"
        set_probability(network, {layer: 0.0})
    set_probability(network, 0.3)
    assert passes_differ(lambda: predict(network))
    set_probability(network, earlier)
    assert {layer.name: layer.p for layer in stochastic_layers(network)} == before


def test_hugging_face_names():
    found = {layer.name: (layer.kind, layer.scope, layer.p) for layer in stochastic_layers(hugging_face("Bart"))}
    assert found["encoder.layers.0.self_attn.dropout"] == ("BartAttention.dropout", "element", 0.0)
    assert found["decoder.layers.1.activation_dropout"] == ("BartDecoderLayer.activation_dropout", "element", 0.0)
    assert found["encoder.layerdrop"] == ("BartEncoder.layerdrop", "batch", 0.0)
    falcon = hugging_face("Falcon")
    assert "h.0.config.hidden_dropout" in {layer.name for layer in stochastic_layers(falcon)}
    set_probability(falcon, 0.3)
    assert falcon.config.hidden_dropout == 0.3  # read in forward
    bert = hugging_face("Bert")
    set_probability(bert, 0.3)
    assert bert.config.hidden_dropout_prob == 0.1  # says how the model was built


def test_wav2vec2_layerdrop_is_read_from_its_config():
    transformers = pytest.importorskip("transformers")
    encoder = transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2Encoder(
        transformers.Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, layerdrop=0.2)
    )
    (layer,) = (layer for layer in stochastic_layers(encoder) if layer.scope == "batch")
    assert (layer.name, layer.p) == ("config.layerdrop", 0.2)
    assert set_probability(encoder, {"config.layerdrop": 0.5}) == {"config.layerdrop": 0.2}
    assert encoder.config.layerdrop == 0.5


def test_every_probability_that_hugging_face_reads_in_forward_is_known():
    """In the source of each of its models: ``self.config.<...drop...>``, in the ``forward`` of a class."""
    transformers = pytest.importorskip("transformers")
    read = set()
    for path in Path(transformers.models.__file__).parent.glob("*/modeling_*.py"):
        source = path.read_text("utf8")
        if path.name.startswith(("modeling_tf_", "modeling_flax_")) or not re.search(r"self\.config\.\w*drop", source):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                forward = [ast.unparse(part) for part in node.body if getattr(part, "name", "") == "forward"]
                read |= {(node.name, name) for name in re.findall(r"self\.config\.(\w*drop\w*)", "".join(forward))}
    assert len(read) >= 20
    for kind, name in sorted(read):
        module = type(kind, (nn.Module,), {})()
        module.config = SimpleNamespace(**{name: 0.25})
        assert [(layer.name, layer.p) for layer in stochastic_layers(module)] == [(f"config.{name}", 0.25)], kind


BUILDING_BLOCKS = {
    "Dropout": (lambda p: nn.Dropout(p), "element"),
    "Dropout1d": (lambda p: nn.Dropout1d(p), "element"),
    "AlphaDropout": (lambda p: nn.AlphaDropout(p), "element"),
    "FeatureAlphaDropout": (lambda p: nn.FeatureAlphaDropout(p), "element"),
    "MultiheadAttention.dropout": (Attention, "element"),
    "LSTM.dropout": (lambda p: Recurrent(2, p), "element"),
    "DenseLayer.drop_rate": (DenseLayer, "element"),
    "DropPath": (DropPath, "example"),
    "StochasticDepth": (lambda p: StochasticDepth(p, "row"), "example"),
    "LayerDropEncoder.layerdrop": (LayerDropEncoder, "batch"),
}


@pytest.mark.parametrize("kind", BUILDING_BLOCKS)
def test_building_blocks(kind):
    make, scope = BUILDING_BLOCKS[kind]
    network = nn.Sequential(nn.Linear(4, 4), make(0.25))
    x = torch.randn(3, 5, 4)
    (layer,) = stochastic_layers(network)
    assert (layer.kind, layer.scope, layer.p, layer.active) == (kind, scope, 0.25, True)
    assert layer.name.startswith("1")
    assert passes_differ(lambda: network(x))
    network.eval()
    assert not layer.active
    assert not passes_differ(lambda: network(x))
    network.train()
    assert set_probability(network, {layer.name: 0.0}) == {layer.name: 0.25}
    assert not layer.active
    assert not passes_differ(lambda: network(x))


def test_a_subclass_of_dropout_under_another_name():
    class Noise(nn.Dropout):
        pass

    assert [layer.kind for layer in stochastic_layers(nn.Sequential(Noise(0.1)))] == ["Noise"]


def test_batch_wise_stochastic_depth():
    (layer,) = stochastic_layers(nn.Sequential(StochasticDepth(0.2, "batch")))
    assert (layer.kind, layer.scope) == ("StochasticDepth", "batch")


@pytest.mark.parametrize("block", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers_through_their_parts(block):
    kinds = [layer.kind for layer in stochastic_layers(block(8, 2, 16, dropout=0.1))]
    attentions = 1 if block is nn.TransformerEncoderLayer else 2
    assert kinds.count("MultiheadAttention.dropout") == attentions
    assert kinds.count("Dropout") == 2 + attentions


def test_what_is_no_dropout_is_not_found():
    network = nn.Sequential(Recurrent(1, 0.0), nn.Linear(4, 4), nn.Identity())
    network.rdrop_alpha = network._rdrop_own_alpha = 0.5
    network.token_dropout = True
    network.dropped_batches = 0
    network.dropout = None
    network.p = 0.3
    assert stochastic_layers(network) == []


def test_set_probability_leaves_depth_alone():
    network = nn.Sequential(nn.Dropout(0), DropPath(0.1), StochasticDepth(0.2, "row"), LayerDropEncoder(0.3))
    earlier = set_probability(network, 0.5)
    assert earlier == {"0": 0}
    assert [layer.p for layer in stochastic_layers(network)] == [0.5, 0.1, 0.2, 0.3]
    assert set_probability(network, {"1": 0.4, "3.layerdrop": 0.0}) == {"1": 0.1, "3.layerdrop": 0.3}
    assert [layer.p for layer in stochastic_layers(network)] == [0.5, 0.4, 0.2, 0.0]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2), st.floats(0, 1, exclude_max=True))
@settings(max_examples=25, deadline=None)
def test_restores_exactly_plain_floats(values, p):
    network = nn.Sequential(nn.Dropout(values[0]), Attention(values[1]))
    earlier = pickle.loads(pickle.dumps(set_probability(network, p)))
    assert all(type(value) is float for value in earlier.values())
    assert [layer.p for layer in stochastic_layers(network)] == [p, p]
    assert set_probability(network, earlier) == {"0": p, "1.attention.dropout": p}
    assert [layer.p for layer in stochastic_layers(network)] == values


@pytest.mark.parametrize("p", [-0.1, 1, 1.0, float("nan"), float("inf")])
def test_probability_out_of_range(p):
    with pytest.raises(ValueError, match="0 <= p < 1"):
        set_probability(nn.Dropout(0.1), p)


def test_unknown_name_changes_nothing():
    network = nn.Sequential(nn.Dropout(0.1))
    with pytest.raises(ValueError, match="no stochastic layer head; it has 0"):
        set_probability(network, {"0": 0.2, "head": 0.2})
    assert network[0].p == 0.1


def pretrained() -> nn.Module:
    """A backbone in eval mode, its first block frozen, under a head in training mode."""
    backbone = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.BatchNorm1d(4)).requires_grad_(False),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.BatchNorm1d(4), Attention(0.3)),
    )
    return nn.Sequential(backbone.eval(), nn.Linear(4, 3))


def test_switch_on_wakes_what_is_trained():
    network = pretrained()
    assert switch_on(network) == ["0.1.1", "0.1.3.attention.dropout"]
    asleep = {name for name, module in network.named_modules() if not module.training}
    assert asleep == {"0.0", "0.0.0", "0.0.1", "0.0.2", "0.1.2"}  # the frozen block and the BatchNorm
    assert switch_on(network) == []


def test_switch_on_keeps_a_batch_norm_that_trains():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    network[1].train()
    switch_on(network)
    assert network[1].training
    assert network[2].training  # no running statistics: nothing to protect


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_switch_on_wakes_hugging_face_models(name):
    network = hugging_face(name).eval()
    set_probability(network, 0.3)
    assert not passes_differ(lambda: predict(network))
    assert len(switch_on(network)) == len([layer for layer in stochastic_layers(network) if layer.p > 0])
    assert passes_differ(lambda: predict(network))


def test_dead_layers_are_off_but_trained():
    network = pretrained()
    assert [layer.name for layer in dead_layers(network)] == ["0.1.1", "0.1.3.attention.dropout"]
    assert "0.1.1, 0.1.3.attention.dropout." in explain_dead(network)
    assert "self[0].train()" in explain_dead(network)
    set_probability(network, {"0.1.1": 0.0})
    assert [layer.name for layer in dead_layers(network)] == ["0.1.3.attention.dropout"]
    switch_on(network)
    assert explain_dead(network) is None


def test_dropout_belongs_to_the_nearest_module_with_parameters():
    block = nn.Sequential(nn.Sequential(nn.Dropout(0.1)), nn.Linear(4, 4)).eval()
    network = nn.Sequential(block, nn.Linear(4, 4))
    assert [layer.name for layer in dead_layers(network)] == ["0.0.0"]
    block.requires_grad_(False)
    assert dead_layers(network) == []
    assert [layer.name for layer in dead_layers(nn.Sequential(nn.Dropout(0.1)).eval())] == ["0"]  # none at all


def test_table():
    assert as_table(pretrained()).splitlines() == [
        "module                   kind                          p  mode",
        "0.0.1                    Dropout                     0.1  eval, frozen",
        "0.1.1                    Dropout                     0.2  eval",
        "0.1.3.attention.dropout  MultiheadAttention.dropout  0.3  eval",
    ]


class Classifier(nn.Module):
    """Like a user's: a backbone that was loaded, blocks in a list, a head of their own."""

    def __init__(self, p: float = 0.1, blocks: int = 2, head: nn.Module | None = None):
        super().__init__()
        self.network = nn.Module()
        self.network.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(p)) for _ in range(blocks))
        self.head = head or nn.Linear(4, 3)

    def forward(self, x):
        for block in self.network.blocks:
            x = block(x)
        return self.head(x)


def reason(network: nn.Module, rows: int = 5) -> str | None:
    """What the guard would say about two views of a batch."""
    batch = torch.randn(rows, 4).repeat(2, 1)

    def draw() -> Tensor:
        return network(batch).view(2, rows, -1)

    return diagnose(network, draw, draw())


def test_eval_mode_is_named_with_the_line_to_write():
    network = Classifier()
    network.network.eval()
    text = reason(network)
    assert "In eval mode" in text
    assert "network.blocks.0.1, network.blocks.1.1." in text
    assert "self.network.train()" in text
    assert "switch_on(model)" in text
    assert "p = 0" not in text
    assert "frozen part," not in text
    network.network.train()
    assert reason(network) is None


def test_eval_mode_of_everything_and_of_a_part():
    assert "model.train()" in reason(Classifier().eval())
    network = Classifier(blocks=3)
    for block in network.network.blocks:
        block.eval()
    assert "self.network.blocks[0].train(), self.network.blocks[1].train(), self.network.blocks[2]" in reason(network)


def test_long_lists_are_cut():
    text = reason(Classifier(blocks=17).eval())
    assert "network.blocks.4.1 and 12 more." in text
    assert "network.blocks.5.1" not in text


def test_zero_probability_is_named_with_the_line_to_write():
    text = reason(Classifier(p=0.0))
    assert "p = 0: network.blocks.0.1, network.blocks.1.1." in text
    assert "set_probability(model, 0.3)" in text
    assert "In eval mode" not in text
    both = reason(Classifier(p=0.0).eval())
    assert "p = 0" in both
    assert "model.train()" in both


@pytest.mark.parametrize("head", [None, LayerDropEncoder(0.0)])
def test_no_stochastic_layer(head):
    text = reason(Classifier(blocks=0, head=head))
    assert "no stochastic layer" in text
    assert "nn.Dropout(0.3)" in text
    assert "rdrop_views=1" in text


def test_dropout_in_a_frozen_part_only():
    network = Classifier()
    network.network.eval().requires_grad_(False)
    text = reason(network)
    assert "frozen part, which is left as it is: network.blocks.0.1" in text
    assert "front of the head" in text
    assert ".train()" not in text


@pytest.mark.parametrize(
    ("layer", "culprit"), [(LayerDropEncoder(0.5), "head.layerdrop"), (StochasticDepth(0.5, "batch"), "head")]
)
def test_randomness_shared_by_the_batch(layer, culprit):
    text = reason(Classifier(p=0.0, head=layer))
    assert f"shares the random numbers of {culprit}." in text
    assert 'rdrop_passes="separate"' in text
    assert "p = 0" not in text


def test_shared_randomness_that_cannot_be_seen():
    class Coin(nn.Module):
        def forward(self, x):
            return x * torch.rand(1)

    text = reason(Classifier(p=0.0, head=Coin()))
    assert "random numbers of some layer." in text
    assert 'rdrop_passes="separate"' in text


def test_dropout_that_does_not_reach_the_prediction():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            self.drop(x)
            return x

    text = reason(Classifier(p=0.0, head=Aside()))
    assert "without any effect on the prediction: head.drop." in text


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("head", "rows"),
    [
        (nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 3)), 1),
        (nn.Sequential(*(DropPath(0.05) for _ in range(4)), nn.Linear(4, 3)), 4),
        (nn.Sequential(StochasticDepth(0.3, "row"), nn.Linear(4, 3)), 2),
        (nn.Sequential(StochasticDepth(0.5, "batch"), nn.Dropout(0.5)), 2),
    ],
)
def test_equal_views_by_chance_are_drawn_again(head, rows, seed):
    torch.manual_seed(seed)
    assert reason(Classifier(p=0.0, head=copy.deepcopy(head)), rows) is None


def test_dropout_in_user_code_has_the_last_word():
    class Functional(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    network = Classifier(p=0.0, head=Functional())
    assert "p = 0" in explain(network)
    assert reason(network) is None


class LoRA(nn.Module):
    """A frozen layer with a low-rank update that starts at zero, as peft's."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lora_dropout = nn.Dropout(0.1)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(self.lora_dropout(x)))


def test_dropout_behind_a_zero_weight_is_alive():
    network = Classifier(p=0.0, head=LoRA())
    up = network.head.up.weight
    assert reason(network) is None
    assert network.head.up.weight is up
    assert not up.any()
    network.head.lora_dropout.p = 0.0
    assert "head.lora_dropout" in reason(network)


def test_diagnose_leaves_everything_as_it_was():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Dropout(0.0))
    batch = torch.randn(10, 4)
    draws = []

    def draw() -> Tensor:
        draws.append(torch.rand(()))
        return network(batch).expand(2, -1, -1)

    views = draw()
    state, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    buffers = list(network.buffers())
    assert diagnose(network, draw, views) is not None
    assert len(draws) == 1 + 16
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(now is then for now, then in zip(network.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    views.sum().backward()  # the graph of the step survived the redraws


def test_diagnose_draws_only_if_it_must():
    def draw() -> Tensor:
        raise AssertionError("drawn")

    views = torch.randn(2, 3, 4)
    assert diagnose(nn.Linear(1, 1), draw, views) is None
    assert diagnose(nn.Linear(1, 1), draw, torch.stack([views[0], views[0], views[1]])) is None
    with pytest.raises(AssertionError, match="drawn"):
        diagnose(nn.Linear(1, 1), draw, views[:1].expand(2, -1, -1))


def test_diagnose_restores_after_an_error():
    network = LoRA()
    up = network.up.weight

    def draw() -> Tensor:
        assert network.up.weight is not up
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        diagnose(network, draw, torch.zeros(2, 3, 4))
    assert network.up.weight is up


@pytest.mark.parametrize("rows", [1, 3, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_no_difference_and_dropout_is(rows, dtype):
    torch.manual_seed(rows)
    layers = [layer for _ in range(6) for layer in (nn.Linear(333, 333), nn.GELU(), nn.Dropout(0.05))]
    network = nn.Sequential(*layers, nn.Linear(333, 7)).to(dtype)
    batch = torch.randn(rows, 333, dtype=dtype).repeat(2, 1)
    first, second = network.eval()(batch).view(2, rows, 7)
    assert same(first, second)
    first, second = network.train()(batch).view(2, rows, 7)
    assert not same(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_last_bit_is_rounding(dtype):
    one = torch.linspace(-3, 3, 64, dtype=torch.float64).to(dtype)
    assert same(one, one * (1 + torch.finfo(dtype).eps))
    assert not same(one, one * (1 + 400 * torch.finfo(dtype).eps))


def test_a_small_number_is_judged_by_the_others():
    assert same(torch.tensor([1.0, 1.0, 1e-9]), torch.tensor([1.000001, 1.000001, 3e-9]))
    assert not same(torch.tensor([1e-9]), torch.tensor([3e-9]))  # without others, by itself


@pytest.mark.parametrize("mask", [-torch.inf, -1e9, torch.finfo(torch.float32).min])
def test_masked_classes_do_not_set_the_scale(mask):
    one = torch.randn(8, 10)
    other = one + 0.01
    one[:, 3:] = other[:, 3:] = mask
    assert not same(one, other)
    assert same(one, one.clone())


def test_a_few_masked_classes_that_differ_do_not_set_the_scale():
    one = torch.randn(8, 10)
    one[:, 7:] -= 1e5
    assert not same(one, one + 0.1)


def test_nan_and_infinity():
    nan, inf = torch.nan, torch.inf
    assert same(torch.tensor([nan, 1.0, inf]), torch.tensor([nan, 1.0, inf]))
    assert not same(torch.tensor([nan, 1.0]), torch.tensor([1.0, 1.0]))
    assert not same(torch.tensor([inf, 1.0]), torch.tensor([-inf, 1.0]))
    assert not same(torch.tensor([inf, 1.0]), torch.tensor([2.0, 1.0]))


def test_other_shapes_and_integers():
    assert not same(torch.zeros(2), torch.zeros(2, 1))
    assert same(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert not same(torch.tensor([10**9]), torch.tensor([10**9 + 1]))
    assert same(torch.zeros(0), torch.zeros(0))


def test_a_difference_in_the_last_piece_is_seen():
    one = torch.zeros(2**20 + 5)
    other = one.clone()
    other[-1] = 1.0
    assert not same(one, other)
