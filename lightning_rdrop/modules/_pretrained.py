"""Shared by the modules with a pretrained Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_rdrop._compat import has_sharded_weights
from lightning_rdrop._lightning import monitored_checkpoint
from lightning_rdrop.dropout import stochastic_layers, switch_on
from lightning_rdrop.extras import from_pretrained, require
from lightning_rdrop.modules._adapter import adapt, fill_in_frozen, leave_out_frozen, save_adapter
from lightning_rdrop.modules._classes import ClassTask
from lightning_rdrop.modules._frozen import freeze_below
from lightning_rdrop.modules.classifier import Classifier
from lightning_rdrop.modules.task import Task

LATER: Any = None
"""Placeholder for a network that ``configure_model`` loads."""
TUNING = ("peft", "quantization", "gradient_checkpointing", "frozen_below")
"""Arguments of fine-tuning that are passed on to ``load``."""


class Pretrained(Task):
    """A module whose model is loaded with dropout on, which is logged when training starts.

    With ``peft``, checkpoints leave out the frozen base model, and the adapter is saved next to them after training.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.hparams.get("peft") and not has_sharded_weights(self):  # FSDP loads its shards before any hook
            leave_out_frozen(self, checkpoint.get("state_dict", {}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.hparams.get("peft"):
            fill_in_frozen(self, checkpoint.get("state_dict", {}))

    def on_fit_end(self) -> None:
        """Save the adapter of the best checkpoint, or the final adapter if no metric is monitored.

        If the weights are sharded, the final adapter is that of the latest checkpoint.
        """
        files = monitored_checkpoint(self.trainer) or self.trainer.checkpoint_callback
        if not self.hparams.get("peft") or not isinstance(files, ModelCheckpoint) or files.dirpath is None:
            return
        folder, saved = Path(files.dirpath) / "adapter", Path(files.best_model_path)
        if not saved.is_file() and has_sharded_weights(self):
            rank_zero_warn(f"No adapter was saved to {folder}: the weights are sharded, and there is no checkpoint.")
            return
        taken = saved.is_file() and (files.monitor or has_sharded_weights(self))
        save_adapter(self.network, folder, saved if taken else None, write=self.trainer.is_global_zero)
        rank_zero_info(f"Adapter saved to {folder}. Load it with peft.PeftModel.from_pretrained(base, folder).")

    def on_fit_start(self) -> None:
        on = [layer.name for layer in stochastic_layers(self.network) if layer.active]
        if on:
            rank_zero_info(
                f"{self.hparams['pretrained']} was loaded in eval mode. Switched on for training: {len(on)} dropout "
                f"layers, {on[0]} to {on[-1]}."
            )


class PretrainedClasses(Pretrained, ClassTask):
    """Load a model with one output per class, as soon as the number of classes is known."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    """The transformers class that loads it."""

    def configure_model(self) -> None:
        if self.network is None:
            given = {name: self.hparams[name] for name in TUNING if name in self.hparams}
            count = getattr(self, self.count_argument)
            self.network = load(self.auto, self.hparams["pretrained"], num_labels=count, **given)


class PretrainedClassifier(PretrainedClasses, Classifier):
    """Classification of texts or tokens; the subclasses document the arguments."""

    def __init__(
        self,
        pretrained: str,
        num_classes: int | None = None,
        *,
        peft: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        frozen_below: str | None = None,
        learning_rate: float = 2e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(LATER, num_classes, learning_rate=learning_rate, **kwargs)
        if num_classes is not None:
            self.configure_model()


def load(
    auto: str,
    pretrained: str,
    *,
    peft: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    frozen_below: str | None = None,
    **config: Any,
) -> nn.Module:
    """``auto.from_pretrained(pretrained, **config)`` with its dropout switched on.

    ``from_pretrained`` returns models in eval mode, and Lightning's ``fit`` keeps that mode.

    Args:
        auto: the name of one of the ``AutoModel`` classes of transformers.
        pretrained: name or folder of the model.
        peft: train LoRA adapters, with these arguments of ``LoraConfig``, instead of the model.
        quantization: quantize the frozen model, with these arguments of ``BitsAndBytesConfig``.
        gradient_checkpointing: recompute activations inside a layer in the backward pass instead of storing them.
        frozen_below: submodule below which the network is frozen and dropout is off.
        config: other arguments of ``from_pretrained``.

    Raises:
        ModuleNotFoundError: transformers, or peft, is not installed.
        OSError: there is no such model, or it cannot be loaded.
        ValueError: an unknown argument of ``LoraConfig``; ``quantization`` without ``peft``; both ``peft`` and
            ``frozen_below``.
    """
    transformers = require("transformers", "huggingface", auto)
    if quantization:
        if not peft:
            raise ValueError(
                f"quantization={dict(quantization)} freezes the model, so nothing is left to train. Pass peft as well, "
                "for instance {r: 8, lora_dropout: 0.1, target_modules: all-linear}."
            )
        config["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
    if peft and frozen_below:
        raise ValueError(
            f"frozen_below={frozen_below!r} freezes a part of the model, but peft freezes all of it. Pass only one of "
            "them; peft's layers_to_transform selects the layers with adapters."
        )
    network: Any = from_pretrained(getattr(transformers, auto), "pretrained", pretrained, **config)
    if gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if peft:
        network = adapt(network, peft, auto, quantized=bool(quantization))
    switch_on(network)
    if frozen_below:
        freeze_below(network, frozen_below)
    trained: nn.Module = network
    return trained
