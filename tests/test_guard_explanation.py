"""Reasons name the culprit and the line to write."""

import pytest
import torch
from torch import nn

from lightning_rdrop.guard import explain, explain_negligible
from tests.networks import Blocks, LayerDropEncoder, StochasticDepth, reason


def test_only_what_the_batch_shares_is_blamed_for_it():
    text = explain(nn.Sequential(LayerDropEncoder(0.5), LayerDropEncoder(0.0), nn.Dropout(0.3)), shared=True)
    assert "random numbers of 0.layerdrop. Use one pass for each view" in text


def test_layer_drop_that_is_asleep_is_a_stochastic_layer():
    assert "In eval mode inside a trained part: layerdrop." in explain(LayerDropEncoder(0.5).eval())
    assert "no stochastic layer" in explain(LayerDropEncoder(0.0).eval())


def test_eval_mode_is_named_with_the_line_to_write():
    network = Blocks()
    network.network.eval()
    text = reason(network)
    assert "In eval mode" in text
    assert "network.blocks.0.1, network.blocks.1.1." in text
    assert "self.network.train()" in text
    assert "switch_on(model)" in text
    assert "not trained, such as a teacher, freeze it: requires_grad_(False)" in text
    assert "p = 0" not in text
    assert "frozen part," not in text
    network.network.train()
    assert reason(network) is None


def test_eval_mode_of_everything_and_of_a_part():
    assert "model.train()" in reason(Blocks().eval())
    network = Blocks(blocks=3)
    for block in network.network.blocks:
        block.eval()
    assert "self.network.blocks[0].train(), self.network.blocks[1].train(), self.network.blocks[2]" in reason(network)


def test_long_lists_are_cut():
    text = reason(Blocks(blocks=17).eval())
    assert "network.blocks.4.1 and 12 more." in text
    assert "network.blocks.5.1" not in text


def test_zero_probability_is_named_with_the_line_to_write():
    text = reason(Blocks(p=0.0))
    assert "p = 0: network.blocks.0.1, network.blocks.1.1." in text
    assert "set_probability(model, 0.3)" in text
    assert "In eval mode" not in text
    both = reason(Blocks(p=0.0).eval())
    assert "p = 0" in both
    assert "model.train()" in both


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.3, self.training)


def test_functional_dropout_is_off_in_eval_mode():
    network = nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Sequential(Functional()), Functional().requires_grad_(False))
    assert reason(network) is None
    network[1].eval()
    network[2].eval()
    text = reason(network)
    assert "no stochastic layer" in text
    assert "functional dropout, call self[1].train() before" in text
    assert "model.train()" in reason(network.eval())
    assert "eval mode" not in explain(
        nn.Sequential(nn.BatchNorm1d(4).eval(), Functional().eval().requires_grad_(False))
    )


@pytest.mark.parametrize("head", [None, LayerDropEncoder(0.0)])
def test_no_stochastic_layer(head):
    text = reason(Blocks(blocks=0, head=head))
    assert "no stochastic layer" in text
    assert "nn.Dropout(0.3)" in text
    assert "rdrop_views=1" in text


def test_dropout_in_a_frozen_part_only():
    network = Blocks()
    network.network.eval().requires_grad_(False)
    text = reason(network)
    assert "frozen part, where switch_on does not change it: network.blocks.0.1" in text
    assert "before the head" in text
    assert ".train()" not in text


@pytest.mark.parametrize(
    ("layer", "culprit"), [(LayerDropEncoder(0.5), "head.layerdrop"), (StochasticDepth(0.5, "batch"), "head")]
)
def test_randomness_shared_by_the_batch(layer, culprit):
    text = reason(Blocks(p=0.0, head=layer))
    assert f"shares the random numbers of {culprit}." in text
    assert 'rdrop_passes="separate"' in text
    assert "p = 0" not in text


def test_shared_randomness_that_cannot_be_seen():
    class Coin(nn.Module):
        def forward(self, x):
            return x * torch.rand(1)

    text = reason(Blocks(p=0.0, head=Coin()))
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

    text = reason(Blocks(p=0.0, head=Aside()))
    assert "without effect on the prediction: head.drop." in text


def test_dropout_in_user_code_has_the_last_word():
    class Functional(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    network = Blocks(p=0.0, head=Functional())
    assert "p = 0" in explain(network)
    assert reason(network) is None


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lora_is_advised_a_dropout_of_its_own(p):
    """A Llama has none that is above 0, and dropout inside its frozen layers would be for nothing."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).eval()
    network = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], lora_dropout=p))
    text = explain(network)
    assert ("lora_dropout=0.1" in text) == (p == 0)
    assert ("set_probability" in text) == (p > 0)
    assert "Adapt more layers" in explain_negligible(network, 1e-6, 100)
