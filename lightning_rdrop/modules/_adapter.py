"""LoRA with peft: wrap a frozen model, keep it out of checkpoints, and write a folder that peft loads."""

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
"""peft's task type for each ``AutoModel`` class."""
_OUTPUT_LAYER = r"(.*\.)?(classifier|score)(\..*)?"
"""The output layer of a classifier is new: peft trains it fully and cannot put an adapter on it as well."""


def adapt(network: nn.Module, lora: Mapping[str, Any], auto: str, *, quantized: bool = False) -> nn.Module:
    """Freeze a model and put low-rank adapters around its layers.

    Args:
        network: a Hugging Face model.
        lora: arguments of ``peft.LoraConfig`` by name.
        auto: name of the ``AutoModel`` class that loaded it.
        quantized: whether its weights are quantized; norms and embeddings are not.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: ``LoraConfig`` has no such argument.
    """
    peft = require("peft", "peft", "The argument peft")
    known = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    for name in lora:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Known are r, lora_alpha, lora_dropout, target_modules, ..."
            raise ValueError(f"peft: LoraConfig has no argument {name!r}. {hint}")
    if quantized:
        network = peft.prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    default = {"task_type": _TASKS[auto]}
    if default["task_type"].endswith("CLS") and lora.get("target_modules") == "all-linear":
        default["exclude_modules"] = _OUTPUT_LAYER
    adapted: nn.Module = peft.get_peft_model(network, peft.LoraConfig(**default | dict(lora)))
    return adapted


def leave_out_frozen(module: nn.Module, state: dict[str, Any]) -> None:
    """Delete everything from a module's state except trained parameters and buffers.

    This also removes what quantization adds to frozen parameters, such as ``weight.absmax`` and ``SCB``.
    """
    buffers = module.named_buffers(remove_duplicate=False)
    kept = {name for name, _ in buffers} | {name for name, each in _with_tied(module) if each.requires_grad}
    for name in [name for name in state if name not in kept]:
        del state[name]


def fill_in_frozen(module: nn.Module, state: dict[str, Any]) -> None:
    """Add the frozen parameters missing from a state, with the module's values, which are those of the base model."""
    for name, parameter in _with_tied(module):
        if not parameter.requires_grad:
            state.setdefault(name, parameter.detach())


def _with_tied(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters; a tied parameter appears under each of its names."""
    return module.named_parameters(remove_duplicate=False)


def save_adapter(network: Any, folder: Path, checkpoint: Path | None, *, write: bool) -> None:
    """Write the adapter as a folder for ``peft.PeftModel.from_pretrained``.

    Args:
        network: a peft model, the ``network`` of a module.
        folder: created if missing.
        checkpoint: the file to take the weights from; ``None`` takes those of the network.
        write: whether this process writes; only one process does.
    """
    state = None
    if checkpoint is not None:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]  # written by this run
        state = {name.removeprefix("network."): value for name, value in saved.items()}
    network.save_pretrained(folder, state_dict=state, is_main_process=write)
