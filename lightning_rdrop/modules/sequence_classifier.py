"""Text classification with a Hugging Face model."""

from __future__ import annotations

from typing import Any

from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.modules.classifier import Classifier


class SequenceClassifier(Classifier):
    """Text classification with a Hugging Face sequence classifier.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        num_classes: C of the logits (N, C).
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``learning_rate``.
    """

    def __init__(self, pretrained: str, num_classes: int, **kwargs: Any) -> None:
        from transformers import AutoModelForSequenceClassification  # an extra, needed by this module alone

        network = load(AutoModelForSequenceClassification, pretrained, num_labels=num_classes)
        super().__init__(network, num_classes, **kwargs)
