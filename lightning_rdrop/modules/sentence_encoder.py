"""Sentence embeddings with a Hugging Face encoder."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection, SpearmanCorrCoef

from lightning_rdrop.arguments import one_of
from lightning_rdrop.modules._mean_loss import MeanLoss
from lightning_rdrop.modules._pretrained import Pretrained, load
from lightning_rdrop.simcse import Pooling, SimCSEMixin, pool


class SentenceEncoder(SimCSEMixin, Pretrained):
    """Sentence embeddings with a Hugging Face encoder, trained by SimCSE on sentences without labels.

    Validation and test log Spearman's correlation between cosine similarity and score over pairs of sentences, such as
    those of :class:`~lightning_rdrop.data.SentencePairDataModule`; prediction returns embeddings (B, D).

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        pooling: ``"cls"``, ``"mean"`` or ``"first-last-average"``, see :func:`~lightning_rdrop.simcse.pool`.
        learning_rate: of AdamW.
        kwargs: the arguments of :class:`~lightning_rdrop.SimCSEMixin`, and the optimizer arguments of
            :class:`~lightning_rdrop.modules.Task`.
    """

    not_averageable = "embeddings"

    def __init__(
        self, pretrained: str, *, pooling: Pooling = "cls", learning_rate: float = 2e-5, **kwargs: Any
    ) -> None:
        one_of("pooling", pooling, get_args(Pooling))
        network: Any = load("AutoModel", pretrained)
        if getattr(network, "pooler", None) is not None:
            network.pooler = None  # unused parameters, whose gradients DDP would wait for
        # by keyword: jsonargparse cannot follow positional arguments through SimCSEMixin, and would require both
        metrics = MetricCollection({"spearman": SpearmanCorrCoef()})
        super().__init__(network=network, metrics=metrics, learning_rate=learning_rate, **kwargs)
        self.pooling = pooling

    def rdrop_predict(self, inputs: Any) -> Tensor:
        both = self.pooling == "first-last-average"
        output = self(**inputs, output_hidden_states=both)
        return pool(
            output.hidden_states if both else [output.last_hidden_state], inputs.get("attention_mask"), self.pooling
        )

    def evaluate(self, batch: Any, metrics: MetricCollection, loss: MeanLoss) -> None:
        first, second = (self.rdrop_predict(batch[side]) for side in ("first", "second"))
        metrics.update(F.cosine_similarity(first.float(), second.float()), batch["labels"])
        self.log_dict(metrics, batch_size=len(first), prog_bar=metrics is self.val_metrics)
