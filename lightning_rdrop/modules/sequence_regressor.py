"""A number for a text, or for a pair of texts, with a Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.modules.regressor import Regressor


class SequenceRegressor(Regressor):
    """A number for a text, such as a score, or for a pair of texts, such as their similarity.

    Args:
        pretrained: name or folder of the model; its dropout is switched on.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Regressor`.
    """

    def __init__(self, pretrained: str, **kwargs: Any) -> None:
        from transformers import AutoModelForSequenceClassification  # an extra, needed by this module alone

        super().__init__(load(AutoModelForSequenceClassification, pretrained, num_labels=1), **kwargs)

    def rdrop_predict(self, inputs: Any) -> Tensor:
        logits: Tensor = super().rdrop_predict(inputs)
        return logits.squeeze(-1)  # the model's one logit, a number as the targets are
