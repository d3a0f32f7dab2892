"""Try a split on a batch, and compare the prediction with that for duplicated inputs."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rdrop import guard, submodules
from lightning_rdrop.late_duplication.duplicate_at import Call, Duplicator, KeyPath, Predict, Split, before_calls
from lightning_rdrop.nesting import copied, tensors_of
from lightning_rdrop.views import batch_size, duplicate, merge
from lightning_rdrop.views import split as split_views


class Trial:
    """Compares passes of a batch duplicated late with passes of the batch itself and with duplicated inputs.

    Args:
        network: in the modes of training; it is left in eval mode.
        predict, inputs, views: see :func:`find_split`.
    """

    def __init__(self, network: nn.Module, predict: Predict, inputs: Any, views: int) -> None:
        self._network, self._modules, self._predict = network, submodules.named(network), predict
        self._inputs, self._views = inputs, views
        doubled = duplicate(inputs, views)
        self._modes = [(module, module.training) for module in network.modules()]
        self._in_training, _, _ = self._shapes(doubled)
        network.eval()
        self._once, _, _ = self._shapes(inputs)
        self._twice, expected, self._work = self._shapes(doubled)
        self._expected = merge(split_views(expected, views, batch_size(inputs)))

    def split(self, at: Sequence[str]) -> Split:
        """The split before these submodules, after checking its prediction."""
        waiting, places = set(at), defaultdict[str, dict[int, dict[KeyPath, bool]]](dict)
        duplicator = Duplicator(self._views)

        def change(call: Call, arguments: Any) -> Any:
            name, index = call
            single, doubled = self._sort(call, arguments)
            here = name in waiting
            if here and not (single or doubled):
                raise ValueError(f"{name} gets no tensor with the batch.")
            waiting.discard(name)
            # after the last of these submodules everything is duplicated; before it, only next to duplicated tensors
            if not (here or doubled or not waiting):
                return arguments
            places[name][index] = dict.fromkeys(self._in_training.get(call, ()), False)
            places[name][index] |= {path: path in single for path, _ in tensors_of(arguments)}
            return duplicator(arguments, single)

        try:
            with before_calls(self._modules, change), FlopCounterMode(display=False) as counter:
                found = self._predict(copied(self._inputs))
            if waiting:
                raise ValueError(f"{', '.join(sorted(waiting))} is not called.")
            if not _same(found, self._expected):
                raise ValueError("The prediction differs from that for duplicated inputs.")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a network may raise anything when shapes do not match
            raise ValueError(
                f"rdrop_duplicate_at: the batch cannot be duplicated before {', '.join(at)}. {_sentence(error)} Name "
                "the beginning of a block: inside a residual connection, or if forward itself combines tensors from "
                "before and after the split, B rows would be combined with K * B rows."
            ) from error
        share = counter.get_total_flops() / self._work if self._work else 1.0
        watched = {name: calls for name, calls in places.items() if self._may_change(name, calls)}
        split = Split(tuple(at), watched, share)
        self._rehearse(split)
        return split

    def _rehearse(self, split: Split) -> None:
        """Run the split in the modes of training, in which forward may take another path than with dropout off."""
        waiting = set(split.at)

        def look(call: Call, arguments: Any) -> Any:
            name, index = call
            waiting.discard(name)
            if index in split.places.get(name, {}) and _in_checkpoint():
                raise ValueError(
                    f"{name} runs inside torch.utils.checkpoint, which recomputes it in the backward pass, where "
                    "nothing is duplicated: train without checkpointing it."
                )
            rows = {path: tensor.shape[:1] for path, tensor in tensors_of(arguments)}
            expected = self._in_training.get(call)  # None if LayerDrop skipped the call
            if not waiting and expected is not None and rows != {path: shape[:1] for path, shape in expected.items()}:
                raise ValueError(f"{name} is called with other tensors there, which are not duplicated.")
            return arguments

        def watched(inputs: Any) -> Any:
            with before_calls(self._modules, look):  # after the hooks that duplicate
                return self._predict(inputs)

        for module, mode in self._modes:
            module.training = mode
        try:
            split.predict(self._network, watched, self._inputs, self._views)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as above
            raise ValueError(
                f"rdrop_duplicate_at: the batch can be duplicated before {', '.join(split.at)} in eval mode, but not "
                f"in training. {_sentence(error)} Name another submodule, or train without rdrop_duplicate_at."
            ) from error
        finally:
            self._network.eval()

    def _may_change(self, name: str, calls: Mapping[int, Mapping[KeyPath, bool]]) -> bool:
        """Whether a call duplicates something, or may in another batch, which takes several arguments."""
        parameters = inspect.signature(self._modules[name].forward).parameters.values()
        several = len(parameters) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        return several or any(carries for known in calls.values() for carries in known.values())

    def latest(self, calls: Sequence[Call]) -> Split | None:
        """The split before the last of these calls or, if that fails, before the nearest enclosing submodule."""
        called = {name for name, _ in calls}
        parts = calls[-1][0].split(".") if calls else []
        for end in range(len(parts), 0, -1):
            if (name := ".".join(parts[:end])) in called:
                try:
                    return self.split([name])
                except ValueError:
                    continue
        return None

    def _shapes(self, inputs: Any) -> tuple[dict[Call, dict[KeyPath, torch.Size]], Any, int]:
        """The shapes of all arguments in a pass, the prediction, and the number of FLOPs."""
        shapes = {}

        def look(call: Call, arguments: Any) -> Any:
            shapes[call] = {path: tensor.shape for path, tensor in tensors_of(arguments)}
            return arguments

        with before_calls(self._modules, look), FlopCounterMode(display=False) as counter:
            prediction = self._predict(copied(inputs))
        return shapes, prediction, counter.get_total_flops()

    def _sort(self, call: Call, arguments: Any) -> tuple[list[KeyPath], bool]:
        """The tensors that carry the batch and are not duplicated yet, and whether others are already."""
        once, twice = self._once.get(call), self._twice.get(call)
        tensors = dict(tensors_of(arguments))
        if once is None or twice is None or not once.keys() == twice.keys() == tensors.keys():
            raise ValueError(f"How {call[0]} is called depends on the number of rows.")
        single, doubled = [], False
        for path, tensor in tensors.items():
            if once[path] == twice[path]:
                continue  # carries no batch
            doubled = doubled or tensor.shape == twice[path]
            if tensor.shape == once[path]:
                if twice[path] != (once[path][0] * self._views, *once[path][1:]):
                    raise ValueError(f"{call[0]} gets a batch that is not its first dimension, {tuple(tensor.shape)}.")
                single.append(path)
        return single, doubled


def _same(found: Any, expected: Any) -> bool:
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=False))
    if len(pairs) != len(list(tensors_of(expected))):
        return False
    return all(_same_rows(one, other) for (_, one), (_, other) in pairs)


def _same_rows(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if found.dtype in (torch.float16, torch.bfloat16):
        # before the split, rows are rounded in a batch of another size, and later layers amplify the difference
        return bool((found - expected).nan_to_num().float().norm() <= 0.05 * expected.nan_to_num().float().norm())
    return guard.same(found, expected)


def _sentence(error: Exception) -> str:
    return f"{error}".rstrip(".") + "."


def _in_checkpoint() -> bool:
    """Whether the caller runs inside a checkpointed function."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None
