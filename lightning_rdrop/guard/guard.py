"""The guard of a fit: checks its first batch, and reports what later batches recorded whenever the Trainer logs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_rdrop._compat import has_sharded_weights, is_readable, passes_synchronize
from lightning_rdrop._lightning import on_all_ranks, searches_learning_rate, trainer_of
from lightning_rdrop.data_views import Views, first_view
from lightning_rdrop.distance import Distance
from lightning_rdrop.guard.agreement import diagnose
from lightning_rdrop.guard.equal_watch import KEPT, EqualWatch
from lightning_rdrop.guard.explanation import ALIKE_IN_DATA, explain, explain_dead, explain_negligible
from lightning_rdrop.guard.first_batch import in_evaluation, missing_decoder_inputs
from lightning_rdrop.guard.nan_watch import NanWatch
from lightning_rdrop.guard.negligible_watch import STEPS, NegligibleWatch
from lightning_rdrop.guard.rows import row_dependence
from lightning_rdrop.guard.single_example import single_values
from lightning_rdrop.guard.switches import Switches
from lightning_rdrop.guard.target_watch import TargetWatch
from lightning_rdrop.guard.unused_criterion import unused_criterion
from lightning_rdrop.views import first_tensor

Redraw = Callable[[], Any]
"""Predicts the same inputs again."""

_EVERY = 50
"""Steps between two reports without a Trainer; the Trainer's default for logging."""
_Seen = set[tuple[str, tuple[bool, ...]]]
"""Parts of a batch, and the modes in which they were seen; some modules alternate between two."""
_PARTS = {"labeled": "", "unlabeled": " of the unlabeled part"}


class Guarded(Protocol):
    """What the guard requires of a module."""

    rdrop_guard: Literal["error", "warn", "off"]

    def rdrop_check(self, predictions: Any, inputs: Any, target: Any, part: str) -> str | None:
        """What is wrong with the first batch, or None."""


class Guard:
    """Finds what would make training silently wrong, and raises or warns according to the module's ``rdrop_guard``.

    Its state belongs to one fit: :meth:`begin` resets it. Values are compared on the first batch, and again after a
    submodule has changed its mode or a dropout probability has changed from or to 0, once in each such state, or after
    alpha has risen from 0; this waits for the device. Freezing or unfreezing a part starts another search for dead
    dropout. Other batches are only recorded on the device, and read whenever the Trainer logs (every 50 steps without a
    Trainer), at the end of an epoch, and before records are lost.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Reset the state of an earlier fit."""
        self._drawn = self._batch_ended = self._must_differ = False
        self._warned: set[str] = set()
        self._read_inputs: set[str] = set()
        self._alone: set[str] = set()
        self._parted: set[str] = set()
        self._single: _Seen = set()
        self._checked: _Seen = set()
        self._compared: _Seen = set()
        self._searched: set[tuple[bool, ...]] = set()
        self._nan: dict[str, NanWatch] = {}
        self._equal = EqualWatch()
        self._negligible = NegligibleWatch()
        self._targets = TargetWatch()

    def look_for_criterion(self, module: Guarded, distance: Distance) -> None:
        """Warn if the module keeps a loss with settings that the distance in use does not have."""
        if module.rdrop_guard != "off":
            self._warn(unused_criterion(cast(nn.Module, module), distance))

    def check_inputs(self, module: Guarded, inputs: Any, *, part: str) -> None:
        """Check before the first pass over a part of the batch that no input of the network is missing.

        Args:
            module: the LightningModule that is trained.
            inputs: inputs of B examples, or :class:`~lightning_rdrop.Views` of them.
            part: the part of the batch.

        Raises:
            ValueError: decoder inputs are missing, and ``rdrop_guard="error"``.
        """
        if module.rdrop_guard != "off" and part not in self._read_inputs:
            self._read_inputs.add(part)
            self.complain(module, missing_decoder_inputs(cast(nn.Module, module), first_view(inputs)))

    def check_rows(
        self, module: Guarded, predict: Callable[[Any], Any], inputs: Any, examples: int, *, part: str
    ) -> None:
        """Check before a joint pass, on the first batch with several examples, that each row is predicted by itself.

        Each rank checks by itself. Only if ranks share the weights, so that all must run the same passes, the very
        first batch is checked, whatever its size.

        Args:
            module: the LightningModule that is trained.
            predict: returns the prediction (N, ...) for some inputs.
            inputs: inputs of B examples.
            examples: B.
            part: the part of the batch.

        Raises:
            ValueError: the rows of a duplicated batch depend on each other, and ``rdrop_guard="error"``.
        """
        network = cast(nn.Module, module)
        if module.rdrop_guard == "off" or part in self._parted:
            return
        if examples < 2 and (part in self._alone or not has_sharded_weights(network)):
            self._alone.add(part)
            return
        self._parted.add(part)
        inputs = first_view(inputs)
        self.complain(module, row_dependence(network, predict, inputs, examples, first_tensor(inputs).device))

    def single_example(
        self,
        module: Guarded,
        predict: Callable[[Any], Any],
        inputs: Any,
        examples: int,
        switches: Switches,
        *,
        part: str,
    ) -> None:
        """Check before a joint pass that no BatchNorm takes its statistics over copies of a single example.

        It is checked on the first batch of one example, which may be the last of an epoch, and after the modes change.

        Args:
            module, predict, inputs, examples, part: as in :meth:`check_rows`.
            switches: the switches of the module.

        Raises:
            ValueError: a BatchNorm gets a single value per channel, and ``rdrop_guard="error"``.
        """
        network = cast(nn.Module, module)
        copies = examples == 1 and not isinstance(inputs, Views) and not any(map(is_lazy, network.parameters()))
        if module.rdrop_guard == "off" or not copies or (seen := (part, switches.random())) in self._single:
            return
        self._single.add(seen)
        if not passes_synchronize(network):
            self.complain(module, single_values(network, predict, inputs, first_tensor(inputs).device))

    def watch(
        self,
        module: Guarded,
        predictions: Any,
        redraw: Redraw,
        inputs: Any,
        target: Any,
        part: str,
        switches: Switches,
        *,
        must_differ: bool,
        counted: Any = None,
    ) -> None:
        """Check or record one batch.

        Args:
            module: the LightningModule that is trained.
            predictions: its K views, (K, N, ...).
            redraw: predicts the same inputs again.
            inputs: inputs of the batch, or :class:`~lightning_rdrop.Views` of them.
            target: their target, or None.
            part: the part of the batch; each part has its own first batch.
            switches: the switches of the module; checks that depend on them are repeated after they change.
            must_differ: whether equal views are an error.
            counted: the rows in which NaN is an error; see :meth:`NanWatch.look`.

        Raises:
            ValueError: a check failed, and ``rdrop_guard="error"``.
        """
        self._drawn = True
        if module.rdrop_guard == "off":
            return
        nan = self._nan.setdefault(part, NanWatch(_PARTS.get(part, f" of the part {part!r}")))
        every = getattr(trainer_of(module), "log_every_n_steps", _EVERY)
        read = nan.batches % min(every or KEPT, KEPT) == 0
        nan.look(predictions, counted)
        self._equal.look(predictions)
        self._must_differ = must_differ
        network = cast(nn.Module, module)
        if read:
            self._read(module)
        modes, reason = switches.random(), None
        seen, state = (part, modes), (*modes, *switches.trained())
        if seen not in self._checked:
            self._checked.add(seen)
            if reason := in_evaluation(trainer_of(module)):
                self._compared.add(seen)
                self._searched.add(state)
                self.complain(module, reason)
                return
            self.complain(module, module.rdrop_check(predictions, first_view(inputs), target, part))
        given = isinstance(inputs, Views)  # these differ even without dropout
        # alpha may rise from 0 later
        if must_differ and seen not in self._compared and self._all_have(network, part):
            self._compared.add(seen)
            reason = diagnose(network, redraw, predictions, partial(on_all_ranks, network))
            self.complain(module, reason and (ALIKE_IN_DATA if given else "") + reason)
        if must_differ and not given and state not in self._searched:
            self._searched.add(state)  # all states seen, as some modules freeze a part in every other step
            if reason is None:
                self._warn(explain_dead(network))  # dropout in the head hides that it is off in the backbone

    def skip_part(self, module: Guarded, part: str, switches: Switches, *, must_differ: bool) -> None:
        """Replace :meth:`watch` if a part of the batch is empty on this rank.

        The other ranks may be about to compare their views, which all ranks have to decide together: this postpones it
        to the next step in which each of them has examples.
        """
        compares = must_differ and (part, switches.random()) not in self._compared
        if compares and module.rdrop_guard != "off" and not in_evaluation(trainer_of(module)):
            self._all_have(cast(nn.Module, module), part, False)

    def _all_have(self, network: nn.Module, part: str, examples: bool = True) -> bool:
        """Whether a part has examples on every rank; the labeled part always has."""
        return part == "labeled" or on_all_ranks(network, examples)

    def note(self, kl: Tensor, ce: Tensor | None = None) -> None:
        """Keep the terms of a step, to detect views that become equal or differ too little.

        Args:
            kl: kl, or another distance that is 0 if the views are equal.
            ce: the task loss, compared to which kl should not be negligible; None if it may be.
        """
        self._equal.note(kl)
        if ce is not None:
            self._negligible.note(kl, ce)

    def note_target(self, module: Guarded, invalid: Tensor | None) -> None:
        """Keep whether a target has an invalid value, according to :meth:`~lightning_rdrop.Distance.has_invalid`.

        On the CPU it is reported at once, before the loss fails on a class that does not exist.

        Raises:
            ValueError: the target is invalid and on the CPU, and ``rdrop_guard="error"``.
        """
        self._targets.note(invalid)
        if invalid is not None and is_readable(invalid) and invalid:
            self.complain(module, self._targets.reason())

    def batch_ends(self, module: Guarded) -> None:
        """Warn after the first training batch if it drew no views, because another ``training_step`` replaces ours."""
        hidden = not (self._drawn or self._batch_ended) and module.rdrop_guard != "off"
        self._batch_ended = True
        if hidden:
            warnings.warn(
                f"{type(module).__name__} has its own training_step, which overrides the mixin's and never calls "
                "rdrop_step: it trains without R-Drop. Delete it, or begin it with terms = self.rdrop_step(batch).",
                stacklevel=2,
            )

    def epoch_ends(self, module: Guarded) -> None:
        """Report what was recorded since the last log: short trainings may not log again after the first batch.

        Raises:
            ValueError: a check failed, and ``rdrop_guard="error"``.
        """
        if module.rdrop_guard != "off":
            self._read(module)

    def complain(self, module: Guarded, reason: str | None) -> None:
        """Raise, or warn once, if there is a reason."""
        if reason is not None and module.rdrop_guard == "error":
            raise ValueError(reason)
        self._warn(reason)

    def _warn(self, reason: str | None) -> None:
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(reason, stacklevel=5)

    def _read(self, module: Guarded) -> None:
        """Report what the watches have recorded; waits for the device."""
        if searches_learning_rate(trainer_of(module)):
            return
        network = cast(nn.Module, module)
        self.complain(module, self._targets.reason())  # first: NaN in a target soon spreads to everything else
        for nan in self._nan.values():
            self.complain(module, nan.reason())
        if self._must_differ and self._equal.became_equal():
            self.complain(module, explain(network))
        if self._must_differ and (share := self._negligible.share()) is not None:
            warnings.warn(explain_negligible(network, share, STEPS), stacklevel=4)
