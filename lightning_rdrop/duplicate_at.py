"""Double the batch late: what lies before a submodule runs once for all views."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rdrop import _compat, guard, submodules, views
from lightning_rdrop.probe import untouched

Predict = Callable[[Any], Any]
Path = tuple[Any, ...]
"""Where a tensor stands in a nesting, key by key."""
Call = tuple[str, int]
"""A submodule, and the how-manieth of its calls in a forward pass, from 0."""

_REDRAWS = 16


@dataclass(frozen=True)
class Split:
    """Where the batch is doubled in a forward pass.

    Args:
        at: the submodules before which it is.
        places: the arguments (args, kwargs) that are doubled, by submodule and call: those of ``at``, and what later
            ones get from outside.
        share: the FLOPs of a forward pass (those of matrix products), as a share of those of a doubled batch.
        shared: the submodule before it whose random numbers all views share, if there is one.
    """

    at: tuple[str, ...]
    places: Mapping[str, Mapping[int, Collection[Path]]]
    share: float
    shared: str | None = None

    def __str__(self) -> str:
        return f"The batch is doubled before {', '.join(self.at)}; a forward pass takes {self.share:.0%} of the FLOPs."

    def predict(self, network: nn.Module, predict: Predict, inputs: Any, count: int) -> Any:
        """The prediction for K views of the inputs.

        Raises:
            ValueError: the network did not come by the split this time.
        """
        double, reached = _Doubling(count), False

        def change(call: Call, arguments: Any) -> Any:
            nonlocal reached
            name, number = call
            reached = reached or name in self.at
            paths = self.places[name].get(number)
            return double(arguments, paths) if reached and paths else arguments

        with _before_calls({name: network.get_submodule(name) for name in self.places}, change):
            prediction = predict(inputs)
        if not reached:
            raise ValueError(
                f"rdrop_duplicate_at: {', '.join(self.at)} was not called in this forward pass, so nothing was "
                "doubled. Name a submodule that no LayerDrop leaves out."
            )
        return prediction


@dataclass
class LateDuplication:
    """The splits of a module, each found when it is first asked for.

    Args:
        at: a submodule, by its dotted name or the end of it; several; or a glob. ``"auto"`` is the latest place before
            which nothing is random.
        views: K.
    """

    at: str | Sequence[str]
    views: int
    _splits: dict[tuple[Path, ...], Split | None] = field(default_factory=dict)
    _modes: list[bool] = field(default_factory=list)

    def split(
        self,
        network: nn.Module,
        predict: Predict,
        inputs: Any,
        modes: list[bool],
        on_all_ranks: Callable[[bool], bool] = bool,
    ) -> tuple[Split | None, bool]:
        """Where such inputs are doubled in these modes, and whether this is news; None is the entrance."""
        if modes != self._modes:  # what was frozen, or switched off, may not be so any more
            self._splits, self._modes = {}, modes
        structure = tuple(path for path, _ in _tensors(inputs))
        new = structure not in self._splits
        if new:
            self._splits[structure] = find_split(network, predict, inputs, self.views, self.at, on_all_ranks)
        return self._splits[structure], new


def find_split(
    network: nn.Module,
    predict: Predict,
    inputs: Any,
    count: int,
    at: str | Sequence[str],
    on_all_ranks: Callable[[bool], bool] = bool,
) -> Split | None:
    """Double a batch late, with dropout off, and hold the prediction against that of a batch doubled at the entrance.

    Which argument of which call carries the batch is told by passes of B and of K * B rows: it is what grows K-fold.
    No size is ever compared with B.

    Args:
        network: the module whose submodules are named.
        predict: the prediction (N, ...) for some inputs.
        inputs: those of B examples.
        count: K.
        at: see :class:`LateDuplication`.
        on_all_ranks: as for :func:`lightning_rdrop.guard.diagnose`.

    Returns:
        None for ``"auto"`` where nothing is random, or nothing lies before what is.

    Raises:
        ValueError: a submodule that is not there, or before which the batch cannot be doubled.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        >>> print(find_split(network, network, torch.ones(5, 4), 2, "auto"))
        The batch is doubled before 1; a forward pass takes 67% of the FLOPs.
    """
    _refuse_hidden_calls(network)
    chosen = None if at == "auto" else _named(network, [at] if isinstance(at, str) else at)
    if views.batch_size(inputs) == 1:  # a view of one row would be broadcast where it meets two
        inputs = views.duplicate(inputs, 2)
    device = next(tensor.device for _, tensor in _tensors(inputs))
    with untouched(network, device):
        calls, random = _first_random(network, predict, inputs, device, on_all_ranks)
        network.eval()
        trial = _Trial(network, predict, inputs, count)
        if chosen is None:
            return None if random is None else trial.latest(calls[:random])
        split = trial.split(chosen)
    reached = min((number for number, call in enumerate(calls) if call[0] in chosen), default=0)
    shared = calls[random - 1][0] if random is not None and 0 < random <= reached else None
    return replace(split, shared=shared)


def _refuse_hidden_calls(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"rdrop_duplicate_at: {name} computes its activations again in the backward pass, where nothing is "
                "doubled. Do without gradient checkpointing, or without rdrop_duplicate_at."
            )
        if _compat.is_compiled(module):
            raise ValueError(
                f"rdrop_duplicate_at: {name} is compiled, which hides the calls of its submodules. Do without "
                "torch.compile, or without rdrop_duplicate_at."
            )


class _Trial:
    """Passes of a batch that is doubled late, beside those of the batch and of the doubled batch."""

    def __init__(self, network: nn.Module, predict: Predict, inputs: Any, count: int) -> None:
        self._modules, self._predict, self._inputs, self._count = submodules.named(network), predict, inputs, count
        self._once, _, _ = self._shapes(inputs)
        self._twice, expected, self._work = self._shapes(views.duplicate(inputs, count))
        self._expected = views.split(expected, count, views.batch_size(inputs)).flatten(0, 1)

    def split(self, at: Sequence[str]) -> Split:
        """The split before these submodules, which has proved itself."""
        waiting, places, double = set(at), defaultdict[str, dict[int, list[Path]]](dict), _Doubling(self._count)

        def change(call: Call, arguments: Any) -> Any:
            single, doubled = self._sort(call, arguments)
            here = call[0] in waiting
            if here and not (single or doubled):
                raise ValueError(f"{call[0]} gets no tensor with the batch.")
            waiting.discard(call[0])
            # after the last split everything is doubled; before it, what meets something that is
            if not single or not (here or doubled or not waiting):
                return arguments
            places[call[0]][call[1]] = single
            return double(arguments, single)

        try:
            with _before_calls(self._modules, change), FlopCounterMode(display=False) as counter:
                found = self._predict(self._inputs)
            if waiting:
                raise ValueError(f"{', '.join(sorted(waiting))} is not called.")
            if not _same(found, self._expected):
                raise ValueError("The prediction is not that of a batch which is doubled at the entrance.")
        except Exception as error:  # whatever a network does with tensors that do not fit
            raise ValueError(
                f"rdrop_duplicate_at: the batch cannot be doubled before {', '.join(at)}. {error} Name the beginning "
                "of a block: inside a residual connection, or where forward itself combines what lies before with "
                "what lies behind, a row of one would meet the views of the other."
            ) from error
        share = counter.get_total_flops() / self._work if self._work else 1.0
        return Split(tuple(at), dict(places), share)

    def latest(self, calls: Sequence[Call]) -> Split | None:
        """The split before the last of some calls, or before the nearest submodule around it where one can be."""
        called = {name for name, _ in calls}
        parts = calls[-1][0].split(".") if calls else []
        for end in range(len(parts), 0, -1):
            if (name := ".".join(parts[:end])) in called:
                try:
                    return self.split([name])
                except ValueError:
                    continue
        return None

    def _shapes(self, inputs: Any) -> tuple[dict[Call, dict[Path, torch.Size]], Any, int]:
        shapes = {}

        def change(call: Call, arguments: Any) -> Any:
            shapes[call] = {path: tensor.shape for path, tensor in _tensors(arguments)}
            return arguments

        with _before_calls(self._modules, change), FlopCounterMode(display=False) as counter:
            prediction = self._predict(inputs)
        return shapes, prediction, counter.get_total_flops()

    def _sort(self, call: Call, arguments: Any) -> tuple[list[Path], bool]:
        """The tensors that carry the batch and are not doubled, and whether others are."""
        once, twice = self._once.get(call), self._twice.get(call)
        tensors = dict(_tensors(arguments))
        if once is None or twice is None or not once.keys() == twice.keys() == tensors.keys():
            raise ValueError(f"How {call[0]} is called depends on the number of rows.")
        single, doubled = [], False
        for path, tensor in tensors.items():
            if once[path] == twice[path]:
                continue  # no batch in it
            doubled = doubled or tensor.shape == twice[path]
            if tensor.shape == once[path]:
                if twice[path] != (once[path][0] * self._count, *once[path][1:]):
                    raise ValueError(f"{call[0]} gets a batch that is not its first dimension, {tuple(tensor.shape)}.")
                single.append(path)
        return single, doubled


class _Doubling:
    """K copies of tensors, each made once in a pass, however many submodules get it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any, paths: Collection[Path]) -> Any:
        """The same nesting, with the tensors at these places doubled, as far as there are any."""
        if isinstance(value, Tensor):
            key = id(value), value._version  # it may be written to between two calls
            if key not in self._copies:
                self._copies[key] = value, torch.cat([value] * self._count)
            return self._copies[key][1]
        below = defaultdict(list)
        for first, *rest in paths:
            below[first].append(tuple(rest))
        parts = views.parts_of(value) or {}
        changed = {key: self(parts[key], inner) for key, inner in below.items() if key in parts}
        return views.with_parts(value, parts | changed) if changed else value


@contextmanager
def _before_calls(modules: Mapping[str, nn.Module], change: Callable[[Call, Any], Any]) -> Iterator[None]:
    """For a while: ``change`` makes the arguments (args, kwargs) with which these submodules are called."""
    numbers: Counter[str] = Counter()

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            numbers[name] += 1
            return change((name, numbers[name] - 1), (args, kwargs))

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_random(
    network: nn.Module, predict: Predict, inputs: Any, device: torch.device, on_all_ranks: Callable[[bool], bool]
) -> tuple[list[Call], int | None]:
    """The calls of a pass, and the number of the first whose arguments random numbers change; None if none does.

    It is seen where two passes differ. But they may agree by chance, and LayerDrop draws a number even if it drops
    nothing: so passes are added until it is the first call before which any number has been drawn.
    """

    def one_pass() -> tuple[list[tuple[Call, list[str]]], list[bool]]:
        seen, drawn, start = [], [], _random_state(device)

        def look(call: Call, arguments: Any) -> Any:
            seen.append((call, [_sum(tensor) for _, tensor in _tensors(arguments)]))
            drawn.append(not all(map(torch.equal, start, _random_state(device))))
            return arguments

        with _before_calls(submodules.named(network), look):
            prediction = predict(inputs)
        look(("", 0), prediction)
        return seen, drawn

    first, drawn = one_pass()
    random: int | None = None
    for _ in range(_REDRAWS if True in drawn else 0):
        pairs = enumerate(zip_longest(first, one_pass()[0]))
        differing = next((number for number, (one, other) in pairs if one != other), None)
        random = min((number for number in (random, differing) if number is not None), default=None)
        if on_all_ranks(random == drawn.index(True)):
            break
    return [call for call, _ in first], random


def _random_state(device: torch.device) -> list[Tensor]:
    others = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *others]


def _sum(tensor: Tensor) -> str:
    """A number that is another one for another tensor; as text, in which NaN is itself."""
    return str(tensor.sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64).item())


def _same(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if found.dtype in (torch.float16, torch.bfloat16):
        # the rows before the split are rounded in a batch of another size, and layers enlarge it
        return bool((found - expected).nan_to_num().float().norm() <= 0.05 * expected.nan_to_num().float().norm())
    return guard.same(found, expected)


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in (views.parts_of(value) or {}).items():
        yield from _tensors(part, (*path, key))


def _named(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The submodules whose names, or the ends of whose names, are these."""
    names = list(submodules.named(network))
    found = []
    for pattern in patterns:
        parts = pattern.split(".")
        ends = {name: name.split(".")[-len(parts) :] for name in names if name.count(".") >= len(parts) - 1}
        fitting = [name for name, end in ends.items() if all(map(fnmatchcase, end, parts))]
        if pattern in names:
            fitting = [pattern]
        if not fitting:
            raise submodules.unknown("rdrop_duplicate_at", pattern, network, names)
        if len(fitting) > 1 and not any(sign in pattern for sign in "*?["):
            raise ValueError(
                f"rdrop_duplicate_at={pattern!r} could be {', '.join(fitting)}: give more of the name, or a list of "
                "names if the batch is to be doubled in each of them."
            )
        found += fitting
    return found
