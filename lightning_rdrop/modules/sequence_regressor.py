"""Regression on texts, or pairs of texts, with a Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.modules.regressor import Regressor


class SequenceRegressor(Regressor):
    """Regression on texts, such as scores, or on pairs of texts, such as similarities.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Regressor`.
    """

    def __init__(self, pretrained: str, **kwargs: Any) -> None:
        from transformers import AutoModelForSequenceClassification  # an extra, needed by this module alone

        super().__init__(load(AutoModelForSequenceClassification, pretrained, num_labels=1), **kwargs)

    def rdrop_predict(self, inputs: Any) -> Tensor:
        logits: Tensor = super().rdrop_predict(inputs)
        return logits.squeeze(-1)  # one logit, in the shape of the targets (N,)
