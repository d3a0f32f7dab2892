"""Causal language models of Hugging Face."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.text import Perplexity

from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.modules.task import Task


class CausalLM(Task):
    """The next token of a text, by a Hugging Face causal language model.

    The targets are shifted here: position t predicts token t + 1. A batch has ``input_ids``, and ``labels`` of the
    same shape if some tokens, such as those of a prompt, do not count (-100); without labels all tokens count that
    the ``attention_mask`` shows. Validation and test log the cross-entropy and the perplexity, per token.

    Args:
        pretrained: name or folder of the model; its dropout is switched on.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``learning_rate``.
    """

    def __init__(self, pretrained: str, **kwargs: Any) -> None:
        from transformers import AutoModelForCausalLM  # an extra, needed by this module alone

        metrics = MetricCollection({"perplexity": Perplexity(ignore_index=-100)})
        super().__init__(load(AutoModelForCausalLM, pretrained), metrics, **kwargs)

    def rdrop_unpack(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        if labels is None:
            labels = inputs["input_ids"]
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs, labels[:, 1:]

    def rdrop_predict(self, inputs: Any) -> Tensor:
        logits: Tensor = super().rdrop_predict(inputs | {"use_cache": False})
        return logits[:, :-1]  # after the last token comes nothing to be compared with
