"""Multi-label text classification with a Hugging Face model."""

from __future__ import annotations

from typing import Any

from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.modules.multilabel_classifier import MultilabelClassifier


class SequenceMultilabelClassifier(MultilabelClassifier):
    """Multi-label text classification with a Hugging Face sequence classifier.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        num_labels: L of the logits (N, L).
        kwargs: the arguments of :class:`~lightning_rdrop.modules.MultilabelClassifier`, such as ``learning_rate``.
    """

    def __init__(self, pretrained: str, num_labels: int, **kwargs: Any) -> None:
        from transformers import AutoModelForSequenceClassification  # an extra, needed by this module alone

        network = load(AutoModelForSequenceClassification, pretrained, num_labels=num_labels)
        super().__init__(network, num_labels, **kwargs)
