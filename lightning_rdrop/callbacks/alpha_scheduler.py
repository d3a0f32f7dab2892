"""Alpha as a function of training progress."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lightning_rdrop._lightning import is_dry_run
from lightning_rdrop.arguments import duration, non_negative
from lightning_rdrop.callbacks._module_value import ModuleValue
from lightning_rdrop.optimizer_steps import planned_steps, steps_made
from lightning_rdrop.schedule import SHAPES, cyclical

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class AlphaScheduler(ModuleValue):
    r"""Raises the module's ``rdrop_alpha`` from 0 to its peak.

    .. math:: \alpha(s) = \text{peak} \cdot \text{shape}\left(\min\left(1, \frac{s - \text{delay}}{\text{ramp}}\right)
        \right), \qquad \alpha(s) = 0 \text{ while } s < \text{delay}

    with s the number of optimizer steps so far. In manual optimization s counts batches, since the Trainer's
    ``global_step`` counts the steps of every optimizer. A cyclical shape starts over every ``ramp`` steps instead of
    staying at its end. After training, the module's own alpha is restored.

    Alpha depends only on s, so an interrupted run resumes with bitwise equal alphas, on any number of processes. Shares
    refer to the length of the training planned at its start, which checkpoints store: alpha does not jump when a run
    resumes with more processes or epochs, or in a second ``fit`` of the same Trainer.

    If the training is too short to reach the peak, a warning says so: before training if its length is known, or after
    it, for example if early stopping or a time limit ended it during the rise. Another warning says that the peak is 0
    because ``rdrop_alpha`` is.

    Args:
        shape: ``"constant"``, ``"linear"``, ``"sigmoid"``, ``"cosine"``, ``"cyclical"`` (see
            :mod:`lightning_rdrop.schedule`), or any function from progress in [0, 1] to a factor in [0, 1].
        ramp: the length of the rise: an int counts optimizer steps, a float in [0, 1] is a share of training.
        delay: how long alpha stays 0 before the rise, in the same units.
        peak: alpha at the end of the rise; ``None`` takes the module's ``rdrop_alpha``.

    Raises:
        ValueError: an argument out of range, a shape that leaves [0, 1], or a share of a training of unknown length.
        TypeError: a duration that is not a number, or a module without ``RDropMixin`` or with ``SimCSEMixin``.

    Example:
        >>> scheduler = AlphaScheduler("linear", ramp=100, delay=50, peak=4.0)
        >>> [scheduler.value_at(step) for step in (0, 50, 100, 150, 1000)]
        [0.0, 0.0, 2.0, 4.0, 4.0]
        >>> AlphaScheduler(ramp=0.1)  # with a Trainer: the first tenth of the training
        AlphaScheduler(shape='sigmoid', ramp=0.1, delay=0, peak=None)
    """

    def __init__(
        self,
        shape: Literal["constant", "linear", "sigmoid", "cosine", "cyclical"] | Callable[[float], float] = "sigmoid",
        *,
        ramp: int | float = 0.1,
        delay: int | float = 0,
        peak: float | None = None,
    ) -> None:
        super().__init__()
        if not callable(shape) and shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, or a function of progress, got {shape!r}.")
        self.shape = shape
        self.ramp = duration("ramp", ramp)
        self.delay = duration("delay", delay)
        self.peak = None if peak is None else non_negative("peak", peak)
        self._training_steps: int | None = None

    def value_at(self, step: int) -> float:
        """The scheduled value after ``step`` optimizer steps. Shares and ``peak=None`` need a training in progress."""
        delay, ramp = self._in_steps("delay", self.delay), self._in_steps("ramp", self.ramp)
        shape = self.shape if callable(self.shape) else SHAPES[self.shape]
        if shape is cyclical and 0 < ramp <= 1:
            raise ValueError(
                f"ramp={self.ramp} is {ramp:g} optimizer steps, so every step would start a new cycle and "
                f"{self.attribute} would stay 0. Use a ramp of at least two steps for a cyclical shape."
            )
        if step < delay:
            return 0.0
        elapsed = (step - delay) / ramp if ramp else 1.0
        progress = elapsed % 1.0 if shape is cyclical and ramp else min(1.0, elapsed)
        factor = float(shape(progress))
        if not 0.0 <= factor <= 1.0:
            raise ValueError(
                f"shape {self.shape!r} returned {factor} at progress {progress}: a shape must map [0, 1] to [0, 1]. "
                f"Set the maximum of {self.attribute} with peak."
            )
        if self._peak is None:
            raise ValueError(
                f"peak is None, but no module is being trained whose {self.attribute} could be the peak. Pass peak."
            )
        return self._peak * factor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the length of another Trainer's training, before a checkpoint is loaded."""
        if stage == "fit" and not trainer.global_step:
            self._training_steps = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Determine the length of the training for shares, unless a checkpoint gave it."""
        if self._training_steps is not None:
            return  # the warning was given at the start of the training
        self._training_steps = planned_steps(trainer)
        if not _warns(trainer):
            return
        if self.peak is None and self.own_value == 0:
            warnings.warn(
                f"{self!r} has no effect: its peak is the module's {self.attribute}, which is 0. Pass peak, set "
                f"{self.attribute}, or train without this callback.",
                stacklevel=2,
            )
        elif self._training_steps and self._misses_its_peak(self._training_steps):
            self._warn(
                f"never reaches its peak: {self.attribute} rises until step {self._end_of_rise():g}, but the training "
                f"has {self._training_steps} steps",
                self._training_steps,
                "Set delay and ramp to shares of training with a sum of at most 1, such as ramp=0.1, or to fewer "
                "steps.",
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the value for this step."""
        setattr(pl_module, self.attribute, self.value_at(steps_made(trainer, pl_module)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the training ended during the rise, unless its planned length was already too short."""
        steps, planned = steps_made(trainer, pl_module), self._training_steps
        warned = planned and self._misses_its_peak(planned)
        if _warns(trainer) and steps and not warned and self._misses_its_peak(steps):
            plan = f", planned to have {planned} steps," if planned else ""
            self._warn(
                f"did not reach its peak: {self.attribute} rises until step {self._end_of_rise():g}, but the training"
                f"{plan} ended after {steps} steps",
                steps,
                "Set delay and ramp to numbers of optimizer steps (int) whose sum is below that of the training, such "
                f"as ramp={max(1, steps // 10)}.",
            )

    def state_dict(self) -> dict[str, Any]:
        """The length of the training, to which the shares of a resumed run refer."""
        return {"training_steps": self._training_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the length of the resumed training."""
        self._training_steps = state_dict["training_steps"]

    @property
    def _peak(self) -> float | None:
        return self.own_value if self.peak is None else self.peak

    def _end_of_rise(self) -> float:
        return self._in_steps("delay", self.delay) + self._in_steps("ramp", self.ramp)

    def _misses_its_peak(self, steps: int) -> bool:
        """Whether a training of this many steps ends during the rise."""
        if self._peak is None or self._end_of_rise() <= steps + 1e-6:
            return False
        # a ramp over the whole training reaches its peak one step after the last
        return self.value_at(steps) < self._peak * (1 - 1e-6)

    def _warn(self, what: str, steps: int, remedy: str) -> None:
        warnings.warn(
            f"{self!r} {what}; in the last step it is {self.value_at(steps - 1):.3g} instead of {self._peak:g}. "
            f"{remedy}",
            stacklevel=3,
        )

    def _in_steps(self, name: str, duration: int | float) -> float:
        if isinstance(duration, int):
            return duration
        if self._training_steps is None:
            raise ValueError(
                f"{name}={duration} is a share of training, whose length is unknown here: the data loader or the "
                "Trainer has no end, or max_steps ends it in manual optimization, where a batch may make any number "
                f"of optimizer steps. Pass {name} as an int, a number of optimizer steps (batches in manual "
                "optimization), or set the Trainer's max_steps (in manual optimization max_epochs, without max_steps)."
            )
        return duration * self._training_steps

    def __repr__(self) -> str:
        arguments = f"shape={self.shape!r}, ramp={self.ramp}, delay={self.delay}, peak={self.peak}"
        return f"{type(self).__name__}({arguments})"


def _warns(trainer: Trainer) -> bool:
    """Whether this rank issues warnings; not in a dry run."""
    return trainer.is_global_zero and not is_dry_run(trainer)
