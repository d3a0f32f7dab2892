"""Check whether a loss that the module keeps has settings that the distance in use does not have."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_rdrop.description import describe, same_description, spell
from lightning_rdrop.distance import Bernoulli, Categorical, Distance
from lightning_rdrop.submodules import expression, named

_COUNTERPARTS: dict[type[nn.Module], tuple[type[Distance], dict[str, Any]]] = {
    nn.CrossEntropyLoss: (Categorical, {"weight": None, "label_smoothing": 0.0, "ignore_index": -100}),
    nn.NLLLoss: (Categorical, {"weight": None, "ignore_index": -100}),
    nn.BCEWithLogitsLoss: (Bernoulli, {"pos_weight": None}),
}
"""The distance for each criterion, and the defaults of the arguments that both have."""


def unused_criterion(network: nn.Module, distance: Distance) -> str | None:
    """Report a cross-entropy, binary or not, with settings that the distance lacks; else ``None``.

    A deleted ``training_step`` may have used it. Default settings are not reported, and neither is a distance of
    another kind or with arguments, which was chosen on purpose.

    Example:
        >>> network = nn.ModuleDict({"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)})
        >>> "self.rdrop_distance = Categorical(label_smoothing=0.1)" in unused_criterion(network, Categorical())
        True
        >>> unused_criterion(network, Categorical(label_smoothing=0.1)) is None
        True
    """
    for name, criterion in named(network).items():
        kind, defaults = _COUNTERPARTS.get(type(criterion), (Distance, {}))
        if type(distance) is not kind and (type(distance) is not Categorical or distance.init_args):
            continue
        own = {key: getattr(criterion, key) for key in defaults}
        own = {key: value for key, value in own.items() if not _same(value, defaults[key])}
        path = expression(name)
        if all(_same(value, getattr(distance, key, None)) for key, value in own.items()):
            if type(distance) is kind and (reason := _not_in_a_distance(criterion, path, spell(describe(distance)))):
                return reason
            continue
        kept = distance.init_args if type(distance) is kind else {}
        arguments = {key: spell(describe(value)) for key, value in kept.items()}
        arguments |= {key: f"{path}.{key}" if isinstance(own[key], Tensor) else f"{own[key]}" for key in own}
        return (
            f"The mixin's training_step uses rdrop_distance={spell(describe(distance))} and not {path}, a "
            f"{type(criterion).__name__} with another {' and '.join(own)}. If it is the training loss, set "
            f"self.rdrop_distance = {kind.__name__}({', '.join(f'{key}={value}' for key, value in arguments.items())}) "
            f"in __init__, after {path}."
        )
    return None


def _not_in_a_distance(criterion: Any, path: str, distance: str) -> str | None:
    """Report a setting that is no argument of the distance."""
    kind = type(criterion).__name__
    if isinstance(criterion, nn.BCEWithLogitsLoss) and criterion.weight is not None:
        return (
            f"The mixin's training_step uses rdrop_distance={distance} and not {path}, a {kind} with a weight. If it "
            f"is the training loss, set self.rdrop_distance = Weighted({distance}) in __init__, and return (target, "
            f"{path}.weight.expand_as(target)) as the target from rdrop_unpack."
        )
    if criterion.reduction == "sum":
        return (
            f"The mixin's training_step minimizes a mean over rows and not {path}, a {kind} with reduction='sum', so "
            "gradients are smaller by the number of rows in a batch. If it is the training loss, delete it and "
            "multiply the learning rate by that number, but not that of Adam, which ignores the scale."
        )
    return None


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        second = second.to(first.dtype)  # half precision casts a criterion, but not a distance
    return same_description(describe(first), describe(second))
