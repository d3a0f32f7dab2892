"""Multi-label text classification with a Hugging Face model."""

from __future__ import annotations

from typing import Any

from lightning_rdrop.modules._pretrained import LATER, PretrainedClasses
from lightning_rdrop.modules.multilabel_classifier import MultilabelClassifier


class SequenceMultilabelClassifier(PretrainedClasses, MultilabelClassifier):
    """Multi-label text classification with a Hugging Face sequence classifier.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        num_labels: L of the logits (N, L); ``None`` takes the number of classes in a
            :class:`~lightning_rdrop.data.MultilabelTextDataModule`.
        learning_rate: of AdamW.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.MultilabelClassifier`, such as ``warmup``.
    """

    def __init__(
        self, pretrained: str, num_labels: int | None = None, *, learning_rate: float = 2e-5, **kwargs: Any
    ) -> None:
        super().__init__(LATER, num_labels, learning_rate=learning_rate, **kwargs)
        if num_labels is not None:
            self.configure_model()
