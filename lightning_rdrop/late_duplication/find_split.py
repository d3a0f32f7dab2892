"""Find where a batch can be duplicated late, on the first batch of each structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_rdrop import submodules
from lightning_rdrop._compat import has_sharded_weights, is_compiled
from lightning_rdrop.data_views import Views
from lightning_rdrop.late_duplication.duplicate_at import KeyPath, Predict, Split, UnforeseenError
from lightning_rdrop.late_duplication.first_random import first_random
from lightning_rdrop.late_duplication.trial import Trial
from lightning_rdrop.nesting import tensors_of
from lightning_rdrop.probe import random_states, without_side_effects
from lightning_rdrop.views import batch_size, duplicate, first_tensor

_NOTHING_SAVED = 0.995
"""Shares of the FLOPs above this are 100% when rounded."""


class LateDuplication:
    """The splits of a module, each found on the first inputs of a structure in the modes of the module.

    Args:
        at: a submodule, by its dotted name or the end of it; several; or a glob. ``"auto"`` is the latest point before
            which nothing is random.

    Raises:
        ValueError: ``at`` is empty or not made of names.
    """

    def __init__(self, at: str | Sequence[str]) -> None:
        if not at or not all(isinstance(name, str) for name in at):
            raise ValueError(
                f"rdrop_duplicate_at must be the name of a submodule, a list of names, 'auto' or None, got {at!r}."
            )
        self.at = at
        self._splits: dict[tuple[tuple[bool, ...], tuple[KeyPath, ...]], Split | None] = {}
        self._modes: tuple[bool, ...] = ()

    def split(
        self,
        network: nn.Module,
        predict: Predict,
        inputs: Any,
        views: int,
        modes: tuple[bool, ...],
        on_all_ranks: Callable[[bool], bool] = bool,
    ) -> tuple[Split | None, bool]:
        """The split for inputs of this structure, searched if it is not known yet.

        Args:
            network, predict, inputs, views, on_all_ranks: see :func:`find_split`.
            modes: the state that switches randomness in the network, each with its own splits.

        Returns:
            The split, or None if the inputs are to be duplicated; and whether it is new.

        Raises:
            ValueError: the views come with the data, so that no submodule can run once for all.
        """
        if isinstance(inputs, Views):
            raise ValueError(
                f"rdrop_duplicate_at={self.at!r} runs everything before it once for all views, but the Views of this "
                "batch differ from the first layer on. Train without rdrop_duplicate_at."
            )
        self._modes = modes  # a part that was switched off may be random now
        key = self._key(inputs)
        new = key not in self._splits
        if new:
            self._splits[key] = find_split(network, predict, inputs, views, self.at, on_all_ranks)
        return self._splits[key], new

    def predict(self, network: nn.Module, predict: Predict, inputs: Any, views: int) -> Any:
        """Predict with the known split, and update it if submodules are called differently in this batch.

        The calls may depend on values: attention gets no mask if nothing is padded, for example. Then the split is
        searched again, and the batch is predicted once more, under the same dropout masks.

        Args:
            network, predict, inputs, views: see :meth:`Split.predict`.

        Raises:
            ValueError: the batch cannot be duplicated there; or the calls differ and the ranks share the weights, so
                that they would have to run the same passes.
        """
        key = self._key(inputs)
        split = self._splits[key]
        assert split is not None
        put_back = random_states(first_tensor(inputs).device)
        try:
            return split.predict(network, predict, inputs, views)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a network may raise anything if B rows are combined with K * B
            if has_sharded_weights(network):
                if not isinstance(error, UnforeseenError):
                    raise
                raise ValueError(
                    f"rdrop_duplicate_at: {error} If ranks share the weights, no rank can make the test passes alone: "
                    "make sure that the first batch has every tensor that later ones have, such as a mask, or train "
                    "without rdrop_duplicate_at."
                ) from None
            put_back()
            # on this rank alone: the others may never see such a batch
            found = find_split(network, predict, inputs, views, self.at)
            if found is not None and found.at == split.at:
                found = split.with_places_of(found)
            if found == split:
                raise  # the error is the network's own
            self._splits[key] = found
        return predict(duplicate(inputs, views)) if found is None else found.predict(network, predict, inputs, views)

    def _key(self, inputs: Any) -> tuple[tuple[bool, ...], tuple[KeyPath, ...]]:
        return self._modes, tuple(path for path, _ in tensors_of(inputs))


def find_split(
    network: nn.Module,
    predict: Predict,
    inputs: Any,
    views: int,
    at: str | Sequence[str],
    on_all_ranks: Callable[[bool], bool] = bool,
) -> Split | None:
    """Duplicate a batch late with dropout off, and compare the prediction with that for duplicated inputs.

    The arguments that carry the batch are found by one pass over B rows and one over K * B rows: they are the tensors
    that grow K-fold. Sizes are never compared with B. A last pass, in the modes of training, checks that forward calls
    its submodules there as it does with dropout off.

    Args:
        network: the module whose submodules ``at`` names.
        predict: returns the prediction (N, ...) for some inputs.
        inputs: inputs of B examples.
        views: K.
        at: see :class:`LateDuplication`.
        on_all_ranks: as for :func:`lightning_rdrop.guard.diagnose`.

    Returns:
        The split; None for ``"auto"`` if nothing is random, if the first submodule already is, or if everything before
        it takes no work, such as an embedding.

    Raises:
        ValueError: a submodule does not exist, or the batch cannot be duplicated before it.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        >>> print(find_split(network, network, torch.ones(5, 4), 2, "auto"))
        The batch is duplicated before 1; a forward pass takes 67% of the FLOPs.
    """
    _refuse_hidden_calls(network)
    patterns = [at] if isinstance(at, str) else at
    chosen = None if at == "auto" else submodules.matching("rdrop_duplicate_at", network, patterns)
    if batch_size(inputs) == 1:  # tensors with one row would silently broadcast against those with two
        inputs = duplicate(inputs, 2)
    device = first_tensor(inputs).device
    with without_side_effects(network, device):
        calls, random = first_random(network, predict, inputs, device, on_all_ranks)
        if chosen is None:
            found = None if random is None else Trial(network, predict, inputs, views).latest(calls[:random])
            return None if found is None or found.share > _NOTHING_SAVED else found
        split = Trial(network, predict, inputs, views).split(chosen)
    reached = min((index for index, (name, _) in enumerate(calls) if name in chosen), default=0)
    shared = calls[random - 1][0] if random is not None and 0 < random <= reached else None
    return replace(split, shared=shared)


def _refuse_hidden_calls(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"rdrop_duplicate_at: {name} recomputes its activations in the backward pass, where nothing is "
                "duplicated. Train without gradient checkpointing, or without rdrop_duplicate_at."
            )
        if is_compiled(module):
            raise ValueError(
                f"rdrop_duplicate_at: {name} is compiled, which hides the calls of its submodules. Train without "
                "torch.compile, or without rdrop_duplicate_at."
            )
