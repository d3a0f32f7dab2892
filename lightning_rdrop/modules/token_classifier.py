"""Token classification with a Hugging Face model."""

from __future__ import annotations

from lightning_rdrop.modules._pretrained import PretrainedClassifier


class TokenClassifier(PretrainedClassifier):
    """Token classification with a Hugging Face token classifier.

    Args:
        pretrained: name or folder of the model, whose dropout is switched on.
        num_classes: C of the logits (N, T, C); ``None`` takes the number of classes in a
            :class:`~lightning_rdrop.data.TokenDataModule`. A token with the label -100 does not count.
        peft: train low-rank adapters (LoRA) around the frozen model, with arguments of peft's ``LoraConfig`` such as
            ``{r: 8, lora_dropout: 0.1, target_modules: all-linear}``. Checkpoints then leave out the model, and
            ``peft.PeftModel.from_pretrained`` loads the folder ``adapter`` next to them.
        quantization: quantize that model to 4 or 8 bits, with these arguments of ``BitsAndBytesConfig``; needs a GPU.
        gradient_checkpointing: recompute activations inside a layer in the backward pass instead of storing them.
        frozen_below: the submodule below which the network is frozen and dropout is off, such as ``encoder.layer.6``.
            Set ``rdrop_duplicate_at`` to the same name to run the frozen part once.
        learning_rate: of AdamW; for LoRA 1e-4 or more.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``warmup``.
    """

    auto = "AutoModelForTokenClassification"
