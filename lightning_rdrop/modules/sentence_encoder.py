"""Embeddings of sentences, with a Hugging Face model."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection, SpearmanCorrCoef

from lightning_rdrop.arguments import one_of
from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.modules.task import Task
from lightning_rdrop.simcse import Pooling, SimCSEMixin, pool


class SentenceEncoder(SimCSEMixin, Task):
    """Embeddings of sentences by a Hugging Face encoder, trained on nothing but sentences by SimCSE.

    Validation and test log Spearman's correlation of cosine and score over pairs of sentences, those of
    :class:`~lightning_rdrop.data.SentencePairDataModule`; prediction gives embeddings (B, D).

    Args:
        pretrained: name or folder of the model; its dropout is switched on.
        pooling: ``"cls"``, ``"mean"`` or ``"first-last-average"``, see :func:`~lightning_rdrop.simcse.pool`.
        kwargs: the arguments of :class:`~lightning_rdrop.SimCSEMixin`, and of
            :class:`~lightning_rdrop.modules.Task` those for the optimizer.
    """

    def __init__(self, pretrained: str, *, pooling: Pooling = "cls", **kwargs: Any) -> None:
        from transformers import AutoModel  # an extra, needed by the modules of Hugging Face models alone

        one_of("pooling", pooling, get_args(Pooling))
        network: Any = load(AutoModel, pretrained)
        if getattr(network, "pooler", None) is not None:
            network.pooler = None  # its output is not used, and DDP would wait for its gradients
        # by name, or the CLI would ask for them: it does not follow positions through SimCSEMixin
        super().__init__(network=network, metrics=MetricCollection({"spearman": SpearmanCorrCoef()}), **kwargs)
        self.pooling = pooling

    def rdrop_predict(self, inputs: Any) -> Tensor:
        both = self.pooling == "first-last-average"
        output = self(**inputs, output_hidden_states=both)
        return pool(
            output.hidden_states if both else [output.last_hidden_state], inputs.get("attention_mask"), self.pooling
        )

    def evaluate(self, batch: Any, metrics: MetricCollection, loss: MeanMetric) -> None:
        first, second = (self.rdrop_predict(batch[side]) for side in ("first", "second"))
        metrics.update(F.cosine_similarity(first.float(), second.float()), batch["labels"])
        self.log_dict(metrics, batch_size=len(first), prog_bar=metrics is self.val_metrics)
