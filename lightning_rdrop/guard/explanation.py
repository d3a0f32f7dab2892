"""Why the views of a batch agree, and the line to write."""

from __future__ import annotations

import re

from torch import nn

from lightning_rdrop.dropout import StochasticLayer, dead_layers, stochastic_layers
from lightning_rdrop.submodules import few

ALIKE_IN_DATA = (
    "The Views that the batch was unpacked into hold the same inputs, and nothing random makes them differ: give each "
    "view an augmentation of its own, or dropout. "
)
"""Comes before the reason where the views come with the data."""


def explain_dead(network: nn.Module) -> str | None:
    """Names the dead layers (see :func:`dead_layers`) and the line that wakes them; ``None`` if there are none.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)).eval()
        >>> "model.train()" in explain_dead(network)
        True
    """
    dead = dead_layers(network)
    return _wake(network, dead) if dead else None


def explain(network: nn.Module, *, shared: bool = False) -> str:
    """Why the views of a batch agree: the names of the layers, and the line to write.

    Args:
        network: as it stood when the views were drawn.
        shared: two passes differed although the views of each agreed, so that all rows share their random numbers.

    Example:
        >>> "no stochastic layer" in explain(nn.Linear(4, 2))
        True
    """
    agree = "The views are identical, so R-Drop has no effect. "
    layers = stochastic_layers(network)
    if shared and (at := getattr(network, "rdrop_duplicate_at", None)):
        return (
            f"{agree}Two passes differ, the views of one pass do not: everything random lies before "
            f"rdrop_duplicate_at={at!r}, or is shared by the whole batch as LayerDrop is. Name a submodule before the "
            "first dropout, or 'auto'; or train without rdrop_duplicate_at."
        )
    if shared:
        culprits = few(layer.name for layer in layers if layer.scope == "batch" and layer.active)
        return (
            f"{agree}Two passes differ, the views of one pass do not: the whole batch shares the random numbers of "
            f'{culprits or "some layer"}. Give each view a pass of its own: rdrop_passes="separate".'
        )
    usable = [layer for layer in layers if layer.p > 0 or layer.scope == "element"]  # LayerDrop is mostly 0 on purpose
    bare = _without_dropout(network)
    if not usable:
        return agree + (
            bare
            or "The network has no stochastic layer. Put nn.Dropout(0.3) in front of its head, or train it plainly: "
            "rdrop_views=1."
        )
    reasons = [bare] if bare else []
    if asleep := [each for each in usable if each.trained and not each.module.training and not (bare and each.p == 0)]:
        reasons.append(_wake(network, asleep))
    zero = few(layer.name for layer in usable if layer.trained and layer.p == 0)
    if zero and not bare:
        reasons.append(f"With p = 0: {zero}. Write lightning_rdrop.dropout.set_probability(model, 0.3).")
    if frozen := few(layer.name for layer in usable if not layer.trained and not layer.active):
        reasons.append(f"Off inside a frozen part, which is left as it is: {frozen}.")
        if not bare:
            reasons.append("Put nn.Dropout(0.3) into a part that is trained, for instance in front of the head.")
    if idle := few(layer.name for layer in usable if layer.active):
        reasons.append(f"On, but without any effect on the prediction: {idle}. Does the prediction come from there?")
    return agree + " ".join(reasons)


def explain_negligible(network: nn.Module, share: float, steps: int) -> str:
    """What to raise where the views have differed too little to matter.

    Args:
        network: that is trained.
        share: the largest kl of the first steps, as a share of ce.
        steps: how many they were.

    Example:
        >>> "Raise the dropout: 0 (p = 0.01)." in explain_negligible(nn.Sequential(nn.Dropout(0.01)), 1e-6, 100)
        True
    """
    reasons = [reason for reason in (_without_dropout(network), explain_dead(network)) if reason]
    if active := few(f"{layer.name} (p = {layer.p:g})" for layer in stochastic_layers(network) if layer.active):
        reasons.append(f"Raise the dropout: {active}.")
    if _lora(network):
        reasons.append("Adapt more layers (target_modules='all-linear'), or raise the learning rate.")
    return (
        f"In the first {steps} steps kl was at most {share:.0e} of ce: R-Drop costs a second pass and adds almost "
        f"nothing. {' '.join(reasons)}"
    )


def _lora(network: nn.Module) -> dict[str, nn.ModuleDict]:
    """The dropout of each layer that peft has wrapped in a LoRA, by the name of the layer."""
    found = {name: getattr(part, "lora_dropout", None) for name, part in network.named_modules()}
    return {name: dropout for name, dropout in found.items() if isinstance(dropout, nn.ModuleDict)}


def _without_dropout(network: nn.Module) -> str:
    """What to say of LoRA without dropout of its own; empty if there is none."""
    bare = few(name for name, dropout in _lora(network).items() if not stochastic_layers(dropout))
    return bare and (
        f"LoRA without a dropout of its own: {bare}. Give lora_dropout=0.1 to LoraConfig, or to the argument peft."
    )


def _wake(network: nn.Module, layers: list[StochasticLayer]) -> str:
    asleep = {path for path, module in network.named_modules() if not module.training}
    calls = {}
    for layer in layers:
        parts = layer.name.split(".")
        outermost = next(path for end in range(len(parts) + 1) if (path := ".".join(parts[:end])) in asleep)
        owner = re.sub(r"\.(\d+)", r"[\1]", f"self.{outermost}") if outermost else "model"
        calls[f"{owner}.train()"] = layer
    return (
        f"In eval mode inside a part that is being trained: {few(layer.name for layer in layers)}. "
        "Since Lightning 2.2, fit keeps each submodule's mode, and from_pretrained hands models out in eval mode. "
        f"Write {few(calls)} before the training, or lightning_rdrop.dropout.switch_on(model), which leaves "
        "BatchNorm and frozen parts as they are."
    )
