"""Causal language modeling with a Hugging Face model."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.text import Perplexity

from lightning_rdrop.modules._language_model import LanguageModel
from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.own_losses import WithLosses


class CausalLM(LanguageModel):
    """Next-token prediction with a Hugging Face causal language model.

    The module shifts the targets: position t predicts token t + 1. A batch has ``input_ids``, and optionally ``labels``
    of the same shape, with -100 for tokens that do not count, such as those of a prompt; without labels, all tokens
    count whose ``attention_mask`` is not 0. Validation and test log the cross-entropy and the perplexity, per token.

    A mixture of experts whose config has ``output_router_logits`` also minimizes its load-balancing loss, times its
    ``router_aux_loss_coef``, logged as ``train/balance``.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        fused_head: compute the training loss without materializing all logits. This saves most of the memory of a large
            vocabulary; the step's ``prediction`` is then None.
        peft: train low-rank adapters (LoRA) around the frozen model, with arguments of peft's ``LoraConfig`` such as
            ``{r: 8, lora_dropout: 0.1, target_modules: all-linear}``. Checkpoints then leave out the model, and
            ``peft.PeftModel.from_pretrained`` loads the folder ``adapter`` next to them.
        quantization: quantize that model to 4 or 8 bits, with these arguments of ``BitsAndBytesConfig``; needs a GPU.
        gradient_checkpointing: recompute activations inside a layer in the backward pass instead of storing them.
        learning_rate: of AdamW; for LoRA 1e-4 or more.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``warmup``.

    Raises:
        ValueError: ``fused_head`` for a model whose logits do not come straight from its output layer, or with
            ``output_router_logits``.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        fused_head: bool = False,
        peft: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        learning_rate: float = 2e-5,
        **kwargs: Any,
    ) -> None:
        metrics = MetricCollection({"perplexity": Perplexity(ignore_index=-100)})
        network = load(
            "AutoModelForCausalLM",
            pretrained,
            peft=peft,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
        )
        super().__init__(network, metrics, fused_head=fused_head, learning_rate=learning_rate, **kwargs)
        self.balances = getattr(network.config, "output_router_logits", False)
        if self.balances and fused_head:
            raise ValueError(
                f"fused_head=True never completes the forward pass, in which {type(network).__name__} computes its "
                "load-balancing loss. Set fused_head=False, or output_router_logits to false in its config.json."
            )

    def rdrop_unpack(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        if labels is None:
            labels = inputs["input_ids"]
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs, labels[:, 1:]

    def rdrop_unpack_unlabeled(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        return self.rdrop_unpack(batch)  # the texts are their own labels, with -100 for padding

    def rdrop_predict(self, inputs: Any) -> Tensor:
        return super().rdrop_predict(inputs)[:, :-1]  # no token follows the last one

    def rdrop_predict_with_losses(self, inputs: Any) -> Any:
        if not self.balances:
            return super().rdrop_predict_with_losses(inputs)
        output, config = self(**inputs, use_cache=False), cast(Any, self.network).config
        return WithLosses(output.logits[:, :-1], {"balance": config.router_aux_loss_coef * output.aux_loss})

    def rdrop_hidden(self, inputs: Any) -> Tensor:
        return super().rdrop_hidden(inputs)[:, :-1]

    def readable(self, prediction: Any, *, all_probabilities: bool = False) -> list[dict[str, Any]]:
        raise TypeError("CausalLM predicts the logits of all tokens, which a table cannot hold. Predict from Python.")
