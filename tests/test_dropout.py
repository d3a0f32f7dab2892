"""Every stochastic layer is found and works; switches touch nothing else."""

import ast
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

from lightning_rdrop.dropout import as_table, dead_layers, set_probability, stochastic_layers, switch_on
from lightning_rdrop.guard import explain_dead, same
from tests.networks import DropPath, LayerDropEncoder, StochasticDepth


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only wait for each other in networks as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class DenseLayer(nn.Module):
    """As torchvision's: a functional dropout with a number of the module."""

    def __init__(self, drop_rate: float):
        super().__init__()
        self.drop_rate = drop_rate

    def forward(self, x):
        return nn.functional.dropout(x, p=self.drop_rate, training=self.training)


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


def hugging_face(name: str, attention: str | None = None) -> nn.Module:
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
    chosen = {"initializer_range": 0.5, "attn_implementation": attention}
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, **chosen))


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


@pytest.mark.parametrize("attention", [None, "eager"])  # None: sdpa, where a model has it
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_nothing_is_missed_and_nothing_is_idle(name, attention):
    network = hugging_face(name, attention).train()
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
    network.rdrop_alpha = 0.5
    network.token_dropout = True
    network.dropped_batches = 0
    network.dropout = None
    network.p = 0.3
    network.drop_rate_decay = network.dropout_scale = network.lr_drop = network.dropout_warmup = 0.95
    network.drop_token_id = network.dropout_samples = network.num_drop = network.drop_last = 0
    network.dropout_count = network.dropout = 1
    assert stochastic_layers(network) == []
    network = type("LitRDrop", (nn.Linear,), {})(4, 4)
    network.p = 0.3
    assert stochastic_layers(network) == []


FUNCTIONAL = """
    dropout attention_dropout hidden_dropout_prob attn_pdrop attn_dropout_p p_dropout drop attn_drop drop_rate
    dropout_ratio drop_prob dropProb dropout1 dropout_2
"""


@pytest.mark.parametrize("name", FUNCTIONAL.split())
@pytest.mark.parametrize("p", [0.1, 0.0])
def test_names_of_probabilities_for_a_functional_dropout(name, p):
    network = nn.Linear(4, 4)
    setattr(network, name, p)
    assert set_probability(network, 0.3) == ({"": p} if name == "drop_prob" else {name: p})
    assert getattr(network, name) == 0.3


@pytest.mark.parametrize("name", ["layerdrop", "drop_path", "drop_path_rate", "drop_connect_rate", "stochastic_depth"])
def test_names_of_probabilities_for_a_branch(name):
    network = nn.Linear(4, 4)
    setattr(network, name, 0.1)
    assert [(layer.name, layer.p) for layer in stochastic_layers(network)] == [(name, 0.1)]
    assert set_probability(network, 0.3) == {}


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "layerdrop", "attn_pdrop", "dropout_rate"])
def test_an_integer_0_switches_dropout_off(name):
    """As a config has it that somebody wrote by hand."""
    network = nn.Linear(4, 4)
    setattr(network, name, 0)
    assert [(layer.name, layer.p) for layer in stochastic_layers(network)] == [(name, 0.0)]


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


def test_dropout_behind_an_adapter_is_trained():
    """LoRA on the attention of the second layer: from there on everything drops what is being trained."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    config = peft.LoraConfig(target_modules=["c_attn"], layers_to_transform=[1], lora_dropout=0.1, fan_in_fan_out=True)
    network = peft.get_peft_model(base, config).eval()
    frozen = {
        layer.name.partition("model.transformer.")[2] for layer in stochastic_layers(network) if not layer.trained
    }
    assert frozen == {f"h.0.{name}" for name in ("attn.attn_dropout", "attn.resid_dropout", "mlp.dropout")}
    switched = switch_on(network)
    assert len(switched) == 13 - 2 - 3  # of GPT-2's ten and the adapter's one
    assert {f"base_model.model.transformer.h.{layer}.mlp.dropout" for layer in (1, 2)} <= {*switched}
    assert not base.transformer.h[0].mlp.training


def test_all_dropout_of_an_adapted_model_is_switched_on():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 4, "n_head": 2}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    network = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert len(switch_on(network)) == 13


@pytest.mark.parametrize(
    ("chain", "frozen", "left"),
    [
        (True, [0], ["0.1"]),  # lower layers
        (True, [1], []),  # behind one that is trained
        (True, [0, 1, 2], ["0.1", "1.1", "2.1"]),
        (False, [1], ["1.1"]),  # a teacher stands beside its student
    ],
)
def test_what_is_frozen(chain, frozen, left):
    parts = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(3)]
    network = nn.Sequential(*parts) if chain else nn.Module()
    for number, part in enumerate(parts):
        part.requires_grad_(number not in frozen)
        network.add_module(str(number), part)
    assert [layer.name for layer in stochastic_layers(network) if not layer.trained] == left
    dead = {layer.name for layer in dead_layers(network.eval())}
    assert dead == {"0.1", "1.1", "2.1"} - {*left}
