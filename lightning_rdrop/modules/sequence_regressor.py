"""Regression on texts, or pairs of texts, with a Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rdrop.modules._pretrained import Pretrained, load
from lightning_rdrop.modules.regressor import Regressor


class SequenceRegressor(Pretrained, Regressor):
    """Regression on texts, such as scores, or on pairs of texts, such as similarities.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        learning_rate: of AdamW.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Regressor`.
    """

    def __init__(self, pretrained: str, *, learning_rate: float = 2e-5, **kwargs: Any) -> None:
        network = load("AutoModelForSequenceClassification", pretrained, num_labels=1)
        super().__init__(network, learning_rate=learning_rate, **kwargs)

    def rdrop_predict(self, inputs: Any) -> Tensor:
        logits: Tensor = super().rdrop_predict(inputs)
        return logits.squeeze(-1)  # one logit, in the shape of the targets (N,)
