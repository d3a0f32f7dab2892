"""Text classification with a Hugging Face model."""

from __future__ import annotations

from lightning_rdrop.modules._pretrained import PretrainedClassifier


class SequenceClassifier(PretrainedClassifier):
    """Text classification with a Hugging Face sequence classifier.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        num_classes: C of the logits (N, C); ``None`` takes the number of classes in a
            :class:`~lightning_rdrop.data.TextDataModule`.
        peft: train low-rank adapters (LoRA) around the frozen model, with these arguments of peft's ``LoraConfig``, as
            ``{r: 8, lora_dropout: 0.1, target_modules: all-linear}``. Checkpoints are without the model then, and a
            folder ``adapter`` beside them is what ``peft.PeftModel.from_pretrained`` loads.
        quantization: keep that model in 4 or 8 bits, with these arguments of ``BitsAndBytesConfig``; on a GPU.
        gradient_checkpointing: keep no activations inside a layer, and make them again on the way back.
        frozen_below: the submodule below which nothing is trained and nothing dropped, such as ``encoder.layer.6``.
            With the same name, ``rdrop_duplicate_at`` lets what is frozen run once.
        learning_rate: of AdamW; for LoRA 1e-4 and more.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``warmup``.
    """
