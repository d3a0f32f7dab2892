"""Sequence to sequence, with a Hugging Face model: translation, summarisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import CHRFScore, ROUGEScore, SacreBLEUScore

from lightning_rdrop.distance import Categorical
from lightning_rdrop.modules._language_model import LanguageModel
from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.transforms import RandomReplacement


class RougeL(ROUGEScore):
    """The F-measure of ROUGE-L alone, as Lightning logs one number a metric."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(rouge_keys="rougeL", **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        return super().compute()["rougeL_fmeasure"]


class Seq2Seq(LanguageModel):
    """A text for a text, by a Hugging Face seq2seq model.

    It is trained by teacher forcing: the decoder's inputs are made of the labels, which the model never sees, so that
    its own loss is not computed for nothing. Validation and test log the cross-entropy per token, and compare what
    the model generates, with dropout off, with the labels; prediction gives the generated texts.

    Args:
        pretrained: name or folder of the model and its tokenizer; the model's dropout is switched on.
        scores: any of ``"sacrebleu"``, ``"chrf"`` and ``"rouge"`` (ROUGE-L), each between 0 and 1; an empty list
            generates nothing, which makes validation quick. ``None`` is sacreBLEU alone.
        characters: whether the scores count characters, as for Chinese, and not words.
        label_smoothing: in the cross-entropy.
        random_replacement: the probability that an input token of the decoder is replaced in training, in half of the
            texts; see :class:`~lightning_rdrop.transforms.RandomReplacement`. Its author uses 0.3.
        fused_head: whether a training step never holds its logits, only a few rows of them at a time. That saves most
            of the memory of a large vocabulary; the step has no ``prediction`` then.
        max_new_tokens: the longest text that is generated.
        num_beams: of the beam search; 1 is greedy.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``learning_rate``.

    Raises:
        ValueError: a score that is not known; a probability out of its range; a batch without ``labels``;
            ``fused_head`` for a model that does more to its logits than its output layer.

    Shapes:
        batches with ``input_ids`` (N, S), ``attention_mask`` (N, S) and ``labels`` (N, T), padded with -100.
    """

    def __init__(
        self,
        pretrained: str,
        scores: list[Literal["sacrebleu", "chrf", "rouge"]] | None = None,
        *,
        characters: bool = False,
        label_smoothing: float = 0.0,
        random_replacement: float = 0.0,
        fused_head: bool = False,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        **kwargs: Any,
    ) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # an extra, needed by this module alone

        # ROUGE's own rules keep nothing but the letters a to z
        split: dict[str, Any] = {"normalizer": str, "tokenizer": list} if characters else {}
        known: dict[str, Callable[[], Metric]] = {
            "sacrebleu": lambda: SacreBLEUScore(tokenize="char" if characters else "13a"),
            "chrf": lambda: CHRFScore(n_word_order=0 if characters else 2),
            "rouge": lambda: RougeL(**split),
        }
        chosen = ["sacrebleu"] if scores is None else scores
        if unknown := [score for score in chosen if score not in known]:
            raise ValueError(f"scores must be any of {', '.join(map(repr, known))}, got {unknown[0]!r}.")
        metrics = MetricCollection({score: known[score]() for score in chosen})
        distance = Categorical(label_smoothing=label_smoothing)
        network = load(AutoModelForSeq2SeqLM, pretrained)
        super().__init__(network, metrics, rdrop_distance=distance, fused_head=fused_head, **kwargs)
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.replace = RandomReplacement(random_replacement, special=self.tokenizer.all_special_ids)
        self.generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}

    def rdrop_unpack(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(
                f"The batch has {', '.join(inputs)} and no labels, of which the inputs of the decoder are made. "
                "Without them some models would feed the source to the decoder."
            )
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self._shifted(labels)
        if self.training and self.replace.probability:
            inputs["decoder_input_ids"] = self.replace(inputs["decoder_input_ids"])  # the same ones in all views
        return inputs, labels

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Tensor, target: Tensor) -> None:
        if metrics:
            metrics.update(self.predict_step(batch, 0), [[text] for text in self._decode(target)])

    def predict_step(self, batch: Any, batch_idx: int) -> list[str]:
        """The generated texts."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        model: Any = self.network
        return self._decode(model.generate(**given, **self.generation))

    def _shifted(self, labels: Tensor) -> Tensor:
        """The inputs of the decoder: one token to start with, and all labels but the last."""
        model: Any = self.network
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
            return shifted
        # NLLB, M2M100 and Blenderbot shift inside their forward only
        start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, model.config.pad_token_id)

    def _decode(self, tokens: Tensor) -> list[str]:
        padded = tokens.masked_fill(tokens == -100, self.tokenizer.pad_token_id)
        texts: list[str] = self.tokenizer.batch_decode(padded, skip_special_tokens=True)
        return texts
