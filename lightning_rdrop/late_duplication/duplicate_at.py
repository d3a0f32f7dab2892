"""Duplicate a batch in the middle of a forward pass: the submodules before the split run once for all views."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop.nesting import copied, parts_of, tensors_of, with_parts

Predict = Callable[[Any], Any]
KeyPath = tuple[Any, ...]
"""The path of keys to a tensor in a nested container."""
Call = tuple[str, int]
"""The name of a submodule and the index of the call, counted from 0 in each forward pass."""


class UnforeseenError(Exception):
    """A submodule is called with tensors that it did not get when the split was found, such as a mask."""


@dataclass(frozen=True)
class Split:
    """Where the batch is duplicated in a forward pass.

    Args:
        at: the submodules before which it is duplicated.
        places: the tensors among the arguments (args, kwargs), by submodule and index of the call, and whether to
            duplicate each: those of ``at``, and those that later submodules get from before the split. Submodules that
            might get a further tensor in another batch are included even if nothing is duplicated.
        share: the FLOPs of a forward pass, as a fraction of those with duplicated inputs (matrix products only).
        shared: a random submodule before the split, whose random numbers all views share; None if there is none.
    """

    at: tuple[str, ...]
    places: Mapping[str, Mapping[int, Mapping[KeyPath, bool]]]
    share: float
    shared: str | None = None

    def __str__(self) -> str:
        return (
            f"The batch is duplicated before {', '.join(self.at)}; a forward pass takes {self.share:.0%} of the FLOPs."
        )

    def predict(self, network: nn.Module, predict: Predict, inputs: Any, views: int) -> Any:
        """The prediction for K views of the inputs, K * B rows.

        Args:
            network: the module whose submodules ``at`` names.
            predict: calls the network.
            inputs: inputs of B examples, not duplicated.
            views: K.

        Raises:
            ValueError: the forward pass never reached the split.
            UnforeseenError: a call has tensors for which it is unknown whether to duplicate them.
        """
        duplicator, reached = Duplicator(views), False

        def change(call: Call, arguments: Any) -> Any:
            nonlocal reached
            name, index = call
            reached = reached or name in self.at
            if not reached:
                return arguments
            calls = self.places[name]
            known = calls[index] if index in calls else _of_a_further_call(calls)
            if any(path not in known for path, _ in tensors_of(arguments)):
                raise UnforeseenError(f"{name} is called with other tensors than before.")
            return duplicator(arguments, [path for path, carries in known.items() if carries])

        with before_calls({name: network.get_submodule(name) for name in self.places}, change):
            prediction = predict(copied(inputs))
        if not reached:
            raise ValueError(
                f"rdrop_duplicate_at: {', '.join(self.at)} was not called in this forward pass, so nothing was "
                "duplicated. Name a submodule that every forward pass calls and LayerDrop never skips."
            )
        return prediction

    def with_places_of(self, other: Split) -> Split:
        """This split with the calls of another batch added."""
        places = {name: dict(calls) for name, calls in self.places.items()}
        for name, calls in other.places.items():
            for index, known in calls.items():
                here = places.setdefault(name, {})
                here[index] = {**here.get(index, {}), **known}
        return replace(self, places=places)


class Duplicator:
    """Repeats tensors K times, only once per forward pass even if several submodules get the same tensor."""

    def __init__(self, views: int) -> None:
        self._views = views
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any, paths: Collection[KeyPath]) -> Any:
        """The same container with the tensors at these paths duplicated; missing paths are skipped."""
        if isinstance(value, Tensor):
            if value.is_inference():  # inference tensors have no version
                return torch.cat([value] * self._views)
            key = id(value), value._version  # changed by in-place operations between two calls
            if key not in self._copies:
                self._copies[key] = value, torch.cat([value] * self._views)
            return self._copies[key][1]
        below = defaultdict(list)
        for path in paths:
            if path:  # else another batch had a tensor here
                below[path[0]].append(path[1:])
        parts = parts_of(value) or {}
        changed = {key: self(parts[key], inner) for key, inner in below.items() if key in parts}
        return with_parts(value, parts | changed) if changed else value


def _of_a_further_call(calls: Mapping[int, Mapping[KeyPath, bool]]) -> dict[KeyPath, bool]:
    """What is known of a call beyond those seen, as in a loop over time: not duplicated if no earlier call was."""
    if any(carries for known in calls.values() for carries in known.values()):
        return {}
    return {path: False for known in calls.values() for path in known}


@contextmanager
def before_calls(modules: Mapping[str, nn.Module], change: Callable[[Call, Any], Any]) -> Iterator[None]:
    """Context in which ``change`` replaces the arguments (args, kwargs) of each call of these submodules."""
    calls: Counter[str] = Counter()

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls[name] += 1
            return change((name, calls[name] - 1), (args, kwargs))

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
