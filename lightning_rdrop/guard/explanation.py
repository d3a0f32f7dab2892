"""Explain why the views of a batch agree, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_rdrop.dropout import StochasticLayer, dead_layers, stochastic_layers
from lightning_rdrop.submodules import expression, few

ALIKE_IN_DATA = (
    "The Views that the batch was unpacked into have the same inputs, and nothing random makes them differ: use a "
    "different augmentation for each view, or dropout. "
)
"""Precedes the reason if the views come with the data."""


def explain_dead(network: nn.Module) -> str | None:
    """Name the dead layers (see :func:`dead_layers`) and the call that switches them on; ``None`` if there are none.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)).eval()
        >>> "model.train()" in explain_dead(network)
        True
    """
    dead = dead_layers(network)
    return _how_to_switch_on(network, dead) if dead else None


def explain(network: nn.Module, *, shared: bool = False) -> str:
    """Explain why the views of a batch agree: the layers responsible, and the fix.

    Args:
        network: in the state in which the views were drawn.
        shared: whether two passes differed although the views of each agreed, so all rows share random numbers.

    Example:
        >>> "no stochastic layer" in explain(nn.Linear(4, 2))
        True
    """
    agree = "The views are identical, so R-Drop has no effect. "
    layers = stochastic_layers(network)
    if shared and (at := getattr(network, "rdrop_duplicate_at", None)):
        return (
            f"{agree}Two passes differ, but the views of one pass do not: everything random runs before "
            f"rdrop_duplicate_at={at!r}, or is shared by the whole batch, as in LayerDrop. Name a submodule before the "
            "first dropout, or 'auto'; or train without rdrop_duplicate_at."
        )
    if shared:
        culprits = few(layer.name for layer in layers if layer.scope == "batch" and layer.active)
        return (
            f"{agree}Two passes differ, but the views of one pass do not: the whole batch shares the random numbers of "
            f'{culprits or "some layer"}. Use one pass for each view: rdrop_passes="separate".'
        )
    usable = [layer for layer in layers if layer.p > 0 or layer.scope == "element"]  # LayerDrop is often 0 on purpose
    bare = _without_dropout(network)
    if not usable:
        add = "Add nn.Dropout(0.3) before its head, or train without R-Drop: rdrop_views=1."
        return agree + (bare or f"The network has no stochastic layer. {_functional_dropout(network)}{add}")
    reasons = [bare] if bare else []
    if asleep := [each for each in usable if each.trained and not each.module.training and not (bare and each.p == 0)]:
        reasons.append(_how_to_switch_on(network, asleep))
    zero = few(layer.name for layer in usable if layer.trained and layer.p == 0)
    if zero and not bare:
        reasons.append(f"With p = 0: {zero}. Call lightning_rdrop.dropout.set_probability(model, 0.3).")
    if frozen := few(layer.name for layer in usable if not layer.trained and not layer.active):
        reasons.append(f"Off inside a frozen part, where switch_on does not change it: {frozen}.")
        if not bare:
            reasons.append("Add nn.Dropout(0.3) to a trained part, for example before the head.")
    if idle := few(layer.name for layer in usable if layer.active):
        reasons.append(f"On, but without effect on the prediction: {idle}. Does the prediction depend on it?")
    return agree + " ".join(reasons)


def explain_negligible(network: nn.Module, share: float, steps: int) -> str:
    """Explain what to increase if the views differ too little to matter.

    Args:
        network: the network that is trained.
        share: the largest kl of the first steps, as a fraction of ce.
        steps: the number of these steps.

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
        f"In the first {steps} steps kl was at most {share:.0e} of ce: R-Drop costs a second pass but has almost no "
        f"effect. {' '.join(reasons)}"
    )


def _lora(network: nn.Module) -> dict[str, nn.ModuleDict]:
    """The dropout of each layer that peft has wrapped with LoRA, by the name of the layer."""
    found = {name: getattr(part, "lora_dropout", None) for name, part in network.named_modules()}
    return {name: dropout for name, dropout in found.items() if isinstance(dropout, nn.ModuleDict)}


def _without_dropout(network: nn.Module) -> str:
    """The message for LoRA layers without their own dropout; empty if there are none."""
    bare = few(name for name, dropout in _lora(network).items() if not stochastic_layers(dropout))
    return bare and (
        f"LoRA without its own dropout: {bare}. Pass lora_dropout=0.1 to LoraConfig, or to the argument peft."
    )


def _functional_dropout(network: nn.Module) -> str:
    """The message for functional dropout, which is not visible and off in a part in eval mode; empty if all is on."""
    if not (asleep := few(_train_call(path) for path, module in _in_eval_mode(network) if _may_drop(module))):
        return ""
    return (
        f"But a part is in eval mode: if its forward uses functional dropout, call {asleep} before training, or "
        "lightning_rdrop.dropout.switch_on(model). If not: "
    )


def _in_eval_mode(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost submodules in eval mode, with their paths."""
    if not module.training:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _in_eval_mode(child, f"{path}.{name}".removeprefix("."))


def _may_drop(module: nn.Module) -> bool:
    """Whether a module is not frozen, and no layer of torch, such as a BatchNorm, whose dropout would be visible."""
    trained = [weight.requires_grad for weight in module.parameters()]
    layer = type(module).__module__.startswith("torch.nn.") and not any(module.children())
    return not layer and (any(trained) or not trained)


def _train_call(path: str) -> str:
    """The expression that puts a submodule into training mode."""
    return f"{expression(path)}.train()" if path else "model.train()"


def _how_to_switch_on(network: nn.Module, layers: list[StochasticLayer]) -> str:
    asleep = {path for path, module in network.named_modules() if not module.training}
    calls = {}
    for layer in layers:
        parts = layer.name.split(".")
        outermost = next(path for end in range(len(parts) + 1) if (path := ".".join(parts[:end])) in asleep)
        calls[_train_call(outermost)] = layer
    return (
        f"In eval mode inside a trained part: {few(layer.name for layer in layers)}. "
        "Since Lightning 2.2, fit keeps the mode of each submodule, and from_pretrained returns models in eval mode. "
        f"Call {few(calls)} before training, or lightning_rdrop.dropout.switch_on(model), which does not change "
        "BatchNorm and frozen parts. If a part is not trained, such as a teacher, freeze it: requires_grad_(False)."
    )
