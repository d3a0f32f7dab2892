"""Find where a batch can be doubled late: try a split on the first batch, and compare the predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rdrop import guard, submodules
from lightning_rdrop.duplicate_at import Call, Doubling, KeyPath, Predict, Split, before_calls
from lightning_rdrop.probe import untouched
from lightning_rdrop.views import batch_size, duplicate, parts_of
from lightning_rdrop.views import split as split_views

_REDRAWS = 16


class LateDuplication:
    """The splits of a module, each found when inputs of its kind first come.

    Args:
        at: a submodule, by its dotted name or the end of it; several; or a glob. ``"auto"`` is the latest place before
            which nothing is random.
        views: K.
    """

    def __init__(self, at: str | Sequence[str], views: int) -> None:
        self.at = at
        self.views = views
        self._splits: dict[tuple[KeyPath, ...], Split | None] = {}
        self._modes: list[bool] = []

    def forget(self) -> None:
        """Drop all splits, so that each is looked for again."""
        self._splits.clear()

    def split(
        self,
        network: nn.Module,
        predict: Predict,
        inputs: Any,
        modes: list[bool],
        on_all_ranks: Callable[[bool], bool] = bool,
    ) -> tuple[Split | None, bool]:
        """The split for inputs of this structure, and whether it has just been found.

        Args:
            network, predict, inputs, on_all_ranks: see :func:`find_split`.
            modes: train or eval of every module of the network; where they change, all splits are dropped.

        Returns:
            the split, or None where the batch is doubled at the entrance; and whether it is new.
        """
        if modes != self._modes:  # a part that was frozen or switched off may be random now
            self.forget()
            self._modes = modes
        structure = tuple(path for path, _ in _tensors(inputs))
        new = structure not in self._splits
        if new:
            self._splits[structure] = find_split(network, predict, inputs, self.views, self.at, on_all_ranks)
        return self._splits[structure], new


def find_split(
    network: nn.Module,
    predict: Predict,
    inputs: Any,
    views: int,
    at: str | Sequence[str],
    on_all_ranks: Callable[[bool], bool] = bool,
) -> Split | None:
    """Try to double a batch late, with dropout off, and compare the prediction with that of a batch doubled early.

    Which arguments carry the batch is found by one pass of B rows and one of K * B: theirs are the tensors that grow
    K-fold. No size is ever compared with B.

    Args:
        network: the module whose submodules are named.
        predict: the prediction (N, ...) for some inputs.
        inputs: those of B examples.
        views: K.
        at: see :class:`LateDuplication`.
        on_all_ranks: as for :func:`lightning_rdrop.guard.diagnose`.

    Returns:
        the split; None for ``"auto"`` if nothing is random, or if the first submodule already is.

    Raises:
        ValueError: a submodule that does not exist, or before which the batch cannot be doubled.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        >>> print(find_split(network, network, torch.ones(5, 4), 2, "auto"))
        The batch is doubled before 1; a forward pass takes 67% of the FLOPs.
    """
    _refuse_hidden_calls(network)
    patterns = [at] if isinstance(at, str) else at
    chosen = None if at == "auto" else submodules.matching("rdrop_duplicate_at", network, patterns)
    if batch_size(inputs) == 1:  # the tensors of one row would broadcast against those of two, unnoticed
        inputs = duplicate(inputs, 2)
    device = next(tensor.device for _, tensor in _tensors(inputs))
    with untouched(network, device):
        calls, random = _first_random(network, predict, inputs, device, on_all_ranks)
        network.eval()
        trial = _Trial(network, predict, inputs, views)
        if chosen is None:
            return None if random is None else trial.latest(calls[:random])
        split = trial.split(chosen)
    reached = min((index for index, (name, _) in enumerate(calls) if name in chosen), default=0)
    shared = calls[random - 1][0] if random is not None and 0 < random <= reached else None
    return replace(split, shared=shared)


def _refuse_hidden_calls(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"rdrop_duplicate_at: {name} computes its activations again in the backward pass, where nothing is "
                "doubled. Train without gradient checkpointing, or without rdrop_duplicate_at."
            )
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise ValueError(
                f"rdrop_duplicate_at: {name} is compiled, which hides the calls of its submodules. Train without "
                "torch.compile, or without rdrop_duplicate_at."
            )


class _Trial:
    """Passes of a batch doubled late, compared with those of the batch itself and of the batch doubled early."""

    def __init__(self, network: nn.Module, predict: Predict, inputs: Any, views: int) -> None:
        self._modules, self._predict, self._inputs, self._views = submodules.named(network), predict, inputs, views
        self._once, _, _ = self._shapes(inputs)
        self._twice, expected, self._work = self._shapes(duplicate(inputs, views))
        self._expected = split_views(expected, views, batch_size(inputs)).flatten(0, 1)

    def split(self, at: Sequence[str]) -> Split:
        """The split before these submodules, once its prediction is found to be right."""
        waiting, places, double = set(at), defaultdict[str, dict[int, list[KeyPath]]](dict), Doubling(self._views)

        def change(call: Call, arguments: Any) -> Any:
            name, index = call
            single, doubled = self._sort(call, arguments)
            here = name in waiting
            if here and not (single or doubled):
                raise ValueError(f"{name} gets no tensor with the batch.")
            waiting.discard(name)
            # behind the last split everything is doubled; before it, only what meets something doubled
            if not single or not (here or doubled or not waiting):
                return arguments
            places[name][index] = single
            return double(arguments, single)

        try:
            with before_calls(self._modules, change), FlopCounterMode(display=False) as counter:
                found = self._predict(self._inputs)
            if waiting:
                raise ValueError(f"{', '.join(sorted(waiting))} is not called.")
            if not _same(found, self._expected):
                raise ValueError("The prediction is not that of a batch which is doubled at the entrance.")
        except Exception as error:  # a network may raise anything when shapes do not match
            raise ValueError(
                f"rdrop_duplicate_at: the batch cannot be doubled before {', '.join(at)}. {error} Name the beginning "
                "of a block: inside a residual connection, or where forward itself combines a tensor from before the "
                "split with one from behind it, B rows would meet K * B rows."
            ) from error
        share = counter.get_total_flops() / self._work if self._work else 1.0
        return Split(tuple(at), dict(places), share)

    def latest(self, calls: Sequence[Call]) -> Split | None:
        """The split before the last of these calls or, where that fails, before the nearest submodule around it."""
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
        """The shapes of all arguments in a pass, the prediction, and the FLOPs."""
        shapes = {}

        def look(call: Call, arguments: Any) -> Any:
            shapes[call] = {path: tensor.shape for path, tensor in _tensors(arguments)}
            return arguments

        with before_calls(self._modules, look), FlopCounterMode(display=False) as counter:
            prediction = self._predict(inputs)
        return shapes, prediction, counter.get_total_flops()

    def _sort(self, call: Call, arguments: Any) -> tuple[list[KeyPath], bool]:
        """The tensors that carry the batch and are not doubled yet, and whether there are others that are."""
        once, twice = self._once.get(call), self._twice.get(call)
        tensors = dict(_tensors(arguments))
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


def _first_random(
    network: nn.Module, predict: Predict, inputs: Any, device: torch.device, on_all_ranks: Callable[[bool], bool]
) -> tuple[list[Call], int | None]:
    """The calls of a pass, and the index of the first whose arguments are random; None if there is none.

    Random arguments differ between two passes. But they may agree by chance, and LayerDrop draws a number even when it
    drops nothing. So passes are repeated until the first call that differed is the first before which any random
    number was drawn.
    """

    def one_pass() -> tuple[list[tuple[Call, list[str]]], list[bool]]:
        seen, drawn, start = [], [], _random_state(device)

        def look(call: Call, arguments: Any) -> Any:
            seen.append((call, [_sum(tensor) for _, tensor in _tensors(arguments)]))
            drawn.append(not all(map(torch.equal, start, _random_state(device))))
            return arguments

        with before_calls(submodules.named(network), look):
            prediction = predict(inputs)
        look(("", 0), prediction)
        return seen, drawn

    first, drawn = one_pass()
    random: int | None = None
    for _ in range(_REDRAWS if True in drawn else 0):
        pairs = enumerate(zip_longest(first, one_pass()[0]))
        differing = next((index for index, (one, other) in pairs if one != other), None)
        random = min((index for index in (random, differing) if index is not None), default=None)
        if on_all_ranks(random == drawn.index(True)):
            break
    return [call for call, _ in first], random


def _random_state(device: torch.device) -> list[Tensor]:
    others = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *others]


def _sum(tensor: Tensor) -> str:
    """A fingerprint of a tensor: its sum, as text, so that NaN equals NaN."""
    return str(tensor.sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64).item())


def _same(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if found.dtype in (torch.float16, torch.bfloat16):
        # the rows before the split are rounded in a batch of another size, and later layers amplify the difference
        return bool((found - expected).nan_to_num().float().norm() <= 0.05 * expected.nan_to_num().float().norm())
    return guard.same(found, expected)


def _tensors(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Tensor]]:
    """Every tensor in a nested container, with its keys."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in (parts_of(value) or {}).items():
        yield from _tensors(part, (*path, key))
