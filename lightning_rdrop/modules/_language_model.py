"""What language models of Hugging Face share: tokens as predictions, and an output layer that can be fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_rdrop._compat import is_sharded
from lightning_rdrop.cross_entropy import Head
from lightning_rdrop.modules._pretrained import Pretrained
from lightning_rdrop.probe import untouched


class LanguageModel(Pretrained):
    """A Hugging Face model that predicts tokens, trained with or without materializing its logits.

    Args:
        network: the model.
        metrics: what validation and test measure, besides the task loss.
        fused_head: compute the training loss from the hidden states and the output layer, a few rows at a time, without
            ever holding all logits. This saves most of the memory of a large vocabulary; the step's ``prediction`` is
            None then.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`.
    """

    def __init__(
        self, network: nn.Module, metrics: MetricCollection, *, fused_head: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(network, metrics, **kwargs)
        self._output_layer = OutputLayer(network) if fused_head else None

    def rdrop_predict(self, inputs: Any) -> Tensor:
        logits: Tensor = super().rdrop_predict(inputs | {"use_cache": False})
        return logits

    def rdrop_head(self) -> Head | None:
        return None if self._output_layer is None else self._output_layer.head

    def rdrop_hidden(self, inputs: Any) -> Tensor:
        if self._output_layer is None:
            return super().rdrop_hidden(inputs)
        return self._output_layer.hidden(inputs | {"use_cache": False})


class OutputLayer:
    """The output layer of a language model, apart from the rest of the model.

    Two tokens are tried first: the layer applied to the hidden states must give the model's own logits.

    Args:
        network: a Hugging Face language model.

    Raises:
        ValueError: the model's output layer is not linear, or the model changes the logits further.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        layer = network.get_output_embeddings()
        name = type(network).__name__
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"fused_head=True needs a linear output layer, and that of {name} is {layer!r}.")
        self._layer = layer
        tokens = torch.tensor([[0, 1]], device=network.device)
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if network.config.is_encoder_decoder else {})
        with untouched(network, network.device):
            network.eval()
            expected = network(**inputs).logits
            found = nn.functional.linear(self.hidden(inputs), *self.head)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ValueError(
                f"fused_head=True needs logits that come straight from the output layer, but {name} changes them "
                "further, for instance by a soft cap. Leave fused_head at False."
            )

    @property
    def head(self) -> Head:
        """The layer's weight, and all that is added to its result as the bias.

        Raises:
            TypeError: the weight is sharded across ranks.
        """
        weight = self._layer.weight
        if is_sharded(weight) or weight.shape != (self._layer.out_features, self._layer.in_features):
            raise TypeError(
                f"fused_head=True needs the whole output layer, and that of {type(self._network).__name__} is sharded "
                "across ranks: FSDP and DeepSpeed gather it in the layer's forward only, which is never called. "
                "Leave fused_head at False, or train with DDP."
            )
        biases = (self._layer.bias, getattr(self._network, "final_logits_bias", None))
        added = [bias.flatten() for bias in biases if bias is not None]
        return Head(weight, sum(added[1:], added[0]) if added else None)

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """The hidden states (B, T, D) before the layer."""
        handle = self._layer.register_forward_pre_hook(_stop)
        try:
            self._network(**inputs)
        except _ReachedError as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise ValueError(f"{type(self._network).__name__} never called its output layer.")


class _ReachedError(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _ReachedError(inputs[0])
