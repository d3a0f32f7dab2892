"""Sequence-to-sequence tasks, such as translation and summarization, with a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import CHRFScore, ROUGEScore, SacreBLEUScore

from lightning_rdrop.distance import Categorical
from lightning_rdrop.extras import from_pretrained, require
from lightning_rdrop.modules._language_model import LanguageModel
from lightning_rdrop.modules._pretrained import load
from lightning_rdrop.transforms import RandomReplacement


def characters_of(text: str) -> list[str]:
    return list("".join(text.split()))


class RougeL(ROUGEScore):
    """The F-measure of ROUGE-L as a single number, which Lightning can log."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(rouge_keys="rougeL", **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        return super().compute()["rougeL_fmeasure"]


class Seq2Seq(LanguageModel):
    """Text generation from text with a Hugging Face seq2seq model.

    Training uses teacher forcing: the decoder's inputs are the shifted labels. The labels themselves are not passed to
    the model, which would compute an unused loss. Validation and test log the cross-entropy per token, and score
    generated texts against the labels; prediction returns generated texts.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on, and of its tokenizer.
        scores: any of ``"sacrebleu"``, ``"chrf"`` and ``"rouge"`` (ROUGE-L), each in [0, 1]. ``None`` is sacreBLEU;
            with an empty list nothing is generated, which makes validation fast.
        characters: score characters instead of words, as for Chinese. Spaces are ignored, because many Chinese
            tokenizers put them between all tokens.
        label_smoothing: of the cross-entropy.
        random_replacement: the probability that an input token of the decoder is replaced in training, in half of the
            texts; see :class:`~lightning_rdrop.transforms.RandomReplacement`. Its author uses 0.3.
        fused_head: compute the training loss without materializing all logits. This saves most of the memory of a large
            vocabulary; the step's ``prediction`` is then None.
        max_new_tokens: the maximum length of a generated text, in tokens.
        num_beams: of beam search; 1 is greedy decoding.
        peft: train low-rank adapters (LoRA) around the frozen model, with arguments of peft's ``LoraConfig`` such as
            ``{r: 8, lora_dropout: 0.1, target_modules: all-linear}``. Checkpoints then leave out the model, and
            ``peft.PeftModel.from_pretrained`` loads the folder ``adapter`` next to them.
        quantization: quantize that model to 4 or 8 bits, with these arguments of ``BitsAndBytesConfig``; needs a GPU.
        gradient_checkpointing: recompute activations inside a layer in the backward pass instead of storing them.
        frozen_below: the submodule below which the network is frozen and dropout is off; ``model.decoder`` freezes the
            encoder of a BART and its embeddings, which the decoder shares. Not with ``peft``.
        learning_rate: of AdamW; for LoRA 1e-4 or more.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``warmup``.

    Raises:
        ValueError: an unknown score; a probability out of its range; a batch without ``labels``; ``fused_head`` for a
            model whose logits do not come straight from its output layer.

    Shapes:
        batches with ``input_ids`` (N, S), ``attention_mask`` (N, S) and ``labels`` (N, T), padded with -100.
    """

    not_averageable = "texts"

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
        peft: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        frozen_below: str | None = None,
        learning_rate: float = 2e-5,
        **kwargs: Any,
    ) -> None:
        # ROUGE's default normalizer removes everything but letters a to z and digits
        split: dict[str, Any] = {"normalizer": str, "tokenizer": characters_of} if characters else {}
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
        network = load(
            "AutoModelForSeq2SeqLM",
            pretrained,
            peft=peft,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
            frozen_below=frozen_below,
        )
        super().__init__(
            network, metrics, rdrop_distance=distance, fused_head=fused_head, learning_rate=learning_rate, **kwargs
        )
        auto = require("transformers", "huggingface", "Seq2Seq").AutoTokenizer
        self.tokenizer = from_pretrained(auto, "pretrained", pretrained)
        self.replace = RandomReplacement(random_replacement, special=self.tokenizer.all_special_ids)
        self.generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}

    def rdrop_unpack(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(
                f"The batch has {', '.join(inputs)} but no labels, from which the decoder's inputs are made. "
                "Without them some models feed the source to the decoder. Add labels (N, T), padded with -100."
            )
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self._shifted(labels)
        if self.training and self.replace.probability:
            inputs["decoder_input_ids"] = self.replace(inputs["decoder_input_ids"])  # the same for all views
        return inputs, labels

    def measure(self, metrics: MetricCollection, batch: Any, prediction: Tensor, target: Tensor) -> None:
        if metrics:
            metrics.update(self.predict_step(batch, 0), [[text] for text in self._decode(target)])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Generated texts."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        model: Any = self.network
        return self._decode(model.generate(**given, **self.generation))

    def _shifted(self, labels: Tensor) -> Tensor:
        """The decoder's inputs: a start token, then all labels but the last."""
        model: Any = self.network
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
            return shifted
        # NLLB, M2M100 and Blenderbot shift inside their forward and offer no method for it
        start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, model.config.pad_token_id)

    def _decode(self, tokens: Tensor) -> list[str]:
        padded = tokens.masked_fill(tokens == -100, self.tokenizer.pad_token_id)
        texts: list[str] = self.tokenizer.batch_decode(padded, skip_special_tokens=True)
        return texts
