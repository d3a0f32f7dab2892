"""The guard of a training: from the start of a fit, over its first batch, to every log."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn

from lightning_rdrop._compat import is_readable
from lightning_rdrop._lightning import on_all_ranks, searches_learning_rate, trainer_of
from lightning_rdrop.data_views import Views, first_view
from lightning_rdrop.guard.agreement import diagnose
from lightning_rdrop.guard.equal_watch import KEPT, EqualWatch
from lightning_rdrop.guard.explanation import ALIKE_IN_DATA, explain, explain_dead, explain_negligible
from lightning_rdrop.guard.first_batch import in_evaluation
from lightning_rdrop.guard.nan_watch import NanWatch
from lightning_rdrop.guard.negligible_watch import STEPS, NegligibleWatch
from lightning_rdrop.guard.rows import rows_meet, shares_weights
from lightning_rdrop.guard.switches import Switches
from lightning_rdrop.guard.target_watch import TargetWatch
from lightning_rdrop.nesting import tensors_of

Redraw = Callable[[], Any]
"""Predicts the same inputs again."""

_EVERY = 50
"""So many steps lie between two looks where there is no Trainer; it is the Trainer's default."""
_PARTS = {"labeled": "", "unlabeled": " of the unlabelled part"}


class Guarded(Protocol):
    """What the guard asks of a module."""

    rdrop_guard: Literal["error", "warn", "off"]

    def rdrop_check(self, predictions: Any, inputs: Any, target: Any, part: str) -> str | None:
        """What is wrong with a first batch."""


class Guard:
    """Finds what would make a training silently wrong, and says it as the module's ``rdrop_guard`` says.

    It lives as long as a fit: :meth:`begin` forgets all that was found before. Values are looked at on the first batch,
    and again when a submodule has changed its mode, a dropout has been switched on or off by its p, or alpha has risen
    from 0, which waits for the device. A part that is frozen or unfrozen is searched for dead dropout. Every other
    batch is only noted there, and read where a log is due (every 50 steps without a Trainer), at the end of an epoch,
    and before so much is noted that some of it would be forgotten.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the verdicts of an earlier fit."""
        self._drawn = self._batch_ended = self._must_differ = False
        self._warned: set[str] = set()
        self._alone: set[str] = set()
        self._parted: set[str] = set()
        self._checked: dict[str, list[bool]] = {}
        self._compared: dict[str, list[bool]] = {}
        self._searched: set[tuple[bool, ...]] = set()
        self._nan: dict[str, NanWatch] = {}
        self._equal = EqualWatch()
        self._negligible = NegligibleWatch()
        self._targets = TargetWatch()

    def part_rows(
        self, module: Guarded, predict: Callable[[Any], Any], inputs: Any, examples: int, *, part: str
    ) -> None:
        """On the first batch of several examples, before a joint pass: does each row have a prediction of its own?

        It takes no decision of all ranks, each of which looks for itself. Only where they share the weights, and so
        must make the same passes, it is the first batch that is looked at, whatever it holds.

        Args:
            module: the LightningModule that is trained.
            predict: the prediction (N, ...) for some inputs.
            inputs: those of B examples.
            examples: B.
            part: the part of the batch that this is.

        Raises:
            ValueError: the rows of a doubled batch depend on each other, where ``rdrop_guard="error"``.
        """
        network = cast(nn.Module, module)
        if module.rdrop_guard == "off" or part in self._parted:
            return
        if examples < 2 and (part in self._alone or not shares_weights(network)):
            self._alone.add(part)
            return
        self._parted.add(part)
        inputs = first_view(inputs)
        device = next(tensor.device for _, tensor in tensors_of(inputs) if tensor.dim())
        self.complain(module, rows_meet(network, predict, inputs, examples, device))

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
    ) -> None:
        """Look at one batch.

        Args:
            module: the LightningModule that is trained.
            predictions: its K views, (K, N, ...).
            redraw: predicts the same inputs again.
            inputs: those of the batch, or :class:`~lightning_rdrop.Views` of them.
            target: theirs, or None.
            part: the part of the batch that this is; each has a first batch of its own.
            switches: those of the module; what they decide is looked at again where they have changed.
            must_differ: whether equal views are a fault.

        Raises:
            ValueError: what was found, where ``rdrop_guard="error"``.
        """
        self._drawn = True
        if module.rdrop_guard == "off":
            return
        nan = self._nan.setdefault(part, NanWatch(_PARTS.get(part, f" of the part {part!r}")))
        every = getattr(trainer_of(module), "log_every_n_steps", _EVERY)
        read = nan.batches % min(every or KEPT, KEPT) == 0
        nan.look(predictions)
        self._equal.look(predictions)
        self._must_differ = must_differ
        network = cast(nn.Module, module)
        if read:
            self._read(module)
        modes, reason = switches.random(), None
        state = (*modes, *switches.trained())
        if modes != self._checked.get(part):
            self._checked[part] = modes
            if reason := in_evaluation(trainer_of(module)):
                self._compared[part] = modes
                self._searched.add(state)
                self.complain(module, reason)
                return
            self.complain(module, module.rdrop_check(predictions, first_view(inputs), target, part))
        given = isinstance(inputs, Views)  # which differ with dropout or without it
        # an alpha may rise from 0 later
        if must_differ and modes != self._compared.get(part) and self._all_have(network, part):
            self._compared[part] = modes
            reason = diagnose(network, redraw, predictions, partial(on_all_ranks, network))
            self.complain(module, reason and (ALIKE_IN_DATA if given else "") + reason)
        if must_differ and not given and state not in self._searched:
            self._searched.add(state)  # of all, as some freeze a part in every other step
            if reason is None:
                self._warn(explain_dead(network))  # a live head hides a dead backbone

    def pass_by(self, module: Guarded, part: str, switches: Switches, *, must_differ: bool) -> None:
        """In the place of :meth:`watch`, where a part of the batch is empty on this rank.

        The others may be about to compare their views, for which all ranks have to decide together: it is put off to
        the next step in which each of them has examples.
        """
        compares = must_differ and switches.random() != self._compared.get(part)
        if compares and module.rdrop_guard != "off" and not in_evaluation(trainer_of(module)):
            self._all_have(cast(nn.Module, module), part, False)

    def _all_have(self, network: nn.Module, part: str, examples: bool = True) -> bool:
        """Whether a part has examples on every rank; the labelled one always has."""
        return part == "labeled" or on_all_ranks(network, examples)

    def note(self, kl: Tensor, ce: Tensor | None = None) -> None:
        """Keep the terms of a step, in which views are seen that become equal, or differ too little.

        Args:
            kl: or another distance of the views, which is 0 where they are equal.
            ce: beside which kl should not be negligible; None where it may be.
        """
        self._equal.note(kl)
        if ce is not None:
            self._negligible.note(kl, ce)

    def note_target(self, module: Guarded, invalid: Tensor | None) -> None:
        """Keep whether a target held an impossible value, as :meth:`~lightning_rdrop.Distance.invalid` says.

        On the CPU nothing needs to be waited for, and the loss would fail with a class that does not exist.

        Raises:
            ValueError: it did, on the CPU, where ``rdrop_guard="error"``.
        """
        self._targets.note(invalid)
        if invalid is not None and is_readable(invalid) and invalid:
            self.complain(module, self._targets.reason())

    def batch_ends(self, module: Guarded) -> None:
        """Say, after the first training batch, that it drew no views: a ``training_step`` hides that of the mixin."""
        hidden = not (self._drawn or self._batch_ended) and module.rdrop_guard != "off"
        self._batch_ended = True
        if hidden:
            warnings.warn(
                f"{type(module).__name__} has a training_step of its own, which hides the mixin's, and never calls "
                "rdrop_step: it trains without R-Drop. Delete it, or begin it with terms = self.rdrop_step(batch).",
                stacklevel=2,
            )

    def epoch_ends(self, module: Guarded) -> None:
        """Read what was noted since the last log: in a short training none is due after the first batch.

        Raises:
            ValueError: what was found, where ``rdrop_guard="error"``.
        """
        if module.rdrop_guard != "off" and not searches_learning_rate(trainer_of(module)):
            self._read(module)

    def complain(self, module: Guarded, reason: str | None) -> None:
        """Raise, or warn once, where there is a reason."""
        if reason is not None and module.rdrop_guard == "error":
            raise ValueError(reason)
        self._warn(reason)

    def _warn(self, reason: str | None) -> None:
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(reason, stacklevel=5)

    def _read(self, module: Guarded) -> None:
        """Say what the watches have noted; waits for the device."""
        network = cast(nn.Module, module)
        self.complain(module, self._targets.reason())  # first: NaN in a target soon is NaN everywhere
        for nan in self._nan.values():
            self.complain(module, nan.reason())
        if self._must_differ and self._equal.died():
            self.complain(module, explain(network))
        if self._must_differ and (share := self._negligible.share()) is not None:
            warnings.warn(explain_negligible(network, share, STEPS), stacklevel=4)
