"""LoRA by peft: put around a frozen model, kept in checkpoints without it, written as a folder that peft loads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_rdrop.extras import require

_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
"""What peft calls the task of a class of transformers."""
_OUTPUT_LAYER = r"(.*\.)?(classifier|score)(\..*)?"
"""That of a classifier is new. peft trains it as it is, and cannot put an adapter on it as well."""


def adapt(network: nn.Module, lora: Mapping[str, Any], auto: str, *, quantized: bool = False) -> nn.Module:
    """The model, frozen, with low-rank adapters around its layers.

    Args:
        network: a Hugging Face model.
        lora: arguments of ``peft.LoraConfig`` by name.
        auto: the class of transformers that loaded it.
        quantized: whether it is kept in fewer bits; its norms, and its embeddings, are not.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: ``LoraConfig`` has no such argument.
    """
    peft = require("peft", "peft", "The argument peft")
    known = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    for name in lora:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "There are r, lora_alpha, lora_dropout, target_modules, ..."
            raise ValueError(f"peft: LoraConfig has no argument {name!r}. {hint}")
    if quantized:
        network = peft.prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    default = {"task_type": _TASKS[auto]}
    if default["task_type"].endswith("CLS") and lora.get("target_modules") == "all-linear":
        default["exclude_modules"] = _OUTPUT_LAYER
    adapted: nn.Module = peft.get_peft_model(network, peft.LoraConfig(**default | dict(lora)))
    return adapted


def leave_out_frozen(module: nn.Module, state: dict[str, Any]) -> None:
    """Delete from the state of a module all but trained parameters and buffers.

    Besides frozen parameters that is what quantization adds to them, as ``weight.absmax`` and ``SCB``.
    """
    buffers = module.named_buffers(remove_duplicate=False)
    kept = {name for name, _ in buffers} | {name for name, each in _with_tied(module) if each.requires_grad}
    for name in [name for name in state if name not in kept]:
        del state[name]


def fill_in_frozen(module: nn.Module, state: dict[str, Any]) -> None:
    """Add the frozen parameters that a state lacks as the module has them, which are those of the base model."""
    for name, parameter in _with_tied(module):
        if not parameter.requires_grad:
            state.setdefault(name, parameter.detach())


def _with_tied(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Its parameters, of which tied ones have two names."""
    return module.named_parameters(remove_duplicate=False)


def save_adapter(network: Any, folder: Path, checkpoint: Path | None, *, write: bool) -> None:
    """Write the adapter as a folder for ``peft.PeftModel.from_pretrained``.

    Args:
        network: a peft model, the ``network`` of a module.
        folder: is made.
        checkpoint: the file whose weights are written; ``None`` takes those of the network.
        write: whether this process writes, which one of several does.
    """
    state = None
    if checkpoint is not None:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]  # this run wrote it
        state = {name.removeprefix("network."): value for name, value in saved.items()}
    network.save_pretrained(folder, state_dict=state, is_main_process=write)
