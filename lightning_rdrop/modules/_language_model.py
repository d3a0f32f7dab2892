"""Shared by the Hugging Face language models: token predictions, and an output layer fused with the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_rdrop._compat import is_sharded
from lightning_rdrop.cross_entropy import Head
from lightning_rdrop.modules._pretrained import Pretrained
from lightning_rdrop.probe import without_side_effects


class LanguageModel(Pretrained):
    """A Hugging Face model that predicts tokens, trained with or without materializing its logits.

    Args:
        network: the model.
        metrics: metrics of validation and test, besides the task loss.
        fused_head: compute the training loss from the hidden states and the output layer, a few rows at a time, without
            materializing all logits. This saves most of the memory of a large vocabulary; the step's ``prediction`` is
            then None.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`.
    """

    def __init__(
        self, network: nn.Module, metrics: MetricCollection, *, fused_head: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(network, metrics, **kwargs)
        self.fused_head = fused_head
        if fused_head:
            check_head(network)

    def rdrop_predict(self, inputs: Any) -> Tensor:
        logits: Tensor = super().rdrop_predict(inputs | {"use_cache": False})
        return logits

    def rdrop_head(self) -> Head | None:
        return head_of(self.network) if self.fused_head else None

    def rdrop_hidden(self, inputs: Any) -> Tensor:
        return hidden_states(self.network, inputs | {"use_cache": False})


def output_layer(network: Any) -> nn.Linear:
    """The current output layer of a Hugging Face language model, which peft may have replaced.

    Raises:
        ValueError: it is not linear, or it has an adapter.
        TypeError: its weight is sharded across ranks or quantized.
    """
    layer, name = network.get_output_embeddings(), type(network).__name__
    if isinstance(copies := getattr(layer, "modules_to_save", None), nn.ModuleDict):
        layer = copies[layer.active_adapter]  # peft trains a copy
    layer = getattr(layer, "module", layer)  # FSDP1 wraps it
    if hasattr(layer, "base_layer"):
        raise ValueError(
            f"fused_head=True uses the output layer of {name} without its adapter, {type(layer).__name__}, which would "
            "never be trained. Leave the layer out of target_modules, as 'all-linear' does, or set fused_head=False."
        )
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"fused_head=True needs a linear output layer, but that of {name} is {layer!r}.")
    if is_sharded(layer.weight) or layer.weight.shape != (layer.out_features, layer.in_features):
        raise TypeError(
            f"fused_head=True needs the whole output layer, but that of {name} is sharded across ranks or quantized. "
            "FSDP and DeepSpeed gather it only in the layer's forward, which fused_head does not call. Set "
            "fused_head=False, or train with DDP."
        )
    return layer


def head_of(network: Any) -> Head:
    """The weight of the output layer, and the sum of all biases added to its output."""
    layer = output_layer(network)
    biases = (layer.bias, getattr(network, "final_logits_bias", None))
    added = [bias.flatten() for bias in biases if bias is not None]
    return Head(layer.weight, sum(added[1:], added[0]) if added else None)


def hidden_states(network: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The hidden states (B, T, D) before the output layer."""
    handle = output_layer(network).register_forward_pre_hook(_stop)
    try:
        network(**inputs)
    except _ReachedError as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise ValueError(f"{type(network).__name__} never called its output layer.")


def check_head(network: Any) -> None:
    """Check on two tokens that the output layer, applied to the hidden states, gives the model's own logits.

    Raises:
        ValueError: the model's output layer is not linear, or the model changes the logits further.
    """
    tokens = torch.tensor([[0, 1]], device=network.device)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if network.config.is_encoder_decoder else {})
    with without_side_effects(network, network.device):
        network.eval()
        expected = network(**inputs).logits
        found = nn.functional.linear(hidden_states(network, inputs), *head_of(network))
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ValueError(
            f"fused_head=True needs logits that come straight from the output layer, but {type(network).__name__} "
            "changes them further, for instance by a soft cap. Set fused_head=False."
        )


class _ReachedError(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _ReachedError(inputs[0])
