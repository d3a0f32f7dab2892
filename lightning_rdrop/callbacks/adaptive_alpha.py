"""Alpha controlled by the kl."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rdrop._lightning import is_dry_run
from lightning_rdrop.arguments import non_negative, positive, whole
from lightning_rdrop.callbacks._module_value import ModuleValue
from lightning_rdrop.callbacks._require import require_rdrop
from lightning_rdrop.optimizer_steps import planned_steps, steps_made

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer
    from lightning_rdrop.mixin import RDropMixin


class AdaptiveAlpha(ModuleValue):
    r"""Raises the module's ``rdrop_alpha`` while kl is above a target, and lowers it while kl is below.

    .. math:: \alpha \leftarrow \alpha \left(1 + \operatorname{clip}\left(\frac{\text{kl}}{\text{target}} - 1,
        -0.2, 0.2\right) \min\left(1, \frac{\text{steps}}{\text{horizon}}\right)\right)

    every few steps, with kl the mean over the rows of these steps on all ranks. Alpha starts at the module's own value,
    which is restored after training, and stays between the bounds. It is the same on all ranks. An interrupted run
    resumes with bitwise equal alphas (on the same number of ranks), and a second ``fit`` of the same Trainer continues
    from the last alpha. The training step never waits for the device: kl is read when alpha changes, with one
    all-reduce of two numbers. Batches that the step skips are left out. If the training is too short for a single
    change, a warning says so; likewise with ``rdrop_views=1``, where alpha stays as it is.

    Args:
        target_kl: the desired kl, > 0, in nats per row, as logged by ``train/kl``. A good value is the kl in the middle
            of a training with a suitable fixed alpha.
        horizon: the number of steps in which alpha changes by at most a fifth, which is also the limit of a single
            change.
        every: the steps between two changes; ``None`` takes the Trainer's ``log_every_n_steps``.
        minimum, maximum: the bounds, 0 < minimum <= maximum.

    Raises:
        ValueError: an argument out of range; the module's alpha is not between the bounds; another callback sets it,
            such as :class:`AlphaScheduler`; or the training_step logs no kl (in manual optimization, which may skip
            batches, in none of the first 50).
        TypeError: a module without ``RDropMixin`` or with ``SimCSEMixin``.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Example:
        >>> adaptive = AdaptiveAlpha(target_kl=0.1, horizon=100)
        >>> round(adaptive.after(4.0, kl=0.11, steps=10), 6), round(adaptive.after(4.0, kl=0.5, steps=10), 6)
        (4.04, 4.08)
    """

    def __init__(
        self,
        target_kl: float,
        horizon: int,
        *,
        every: int | None = None,
        minimum: float = 0.01,
        maximum: float = 100.0,
    ) -> None:
        super().__init__()
        self.target_kl = float(positive("target_kl", target_kl))
        steps = ", a number of optimizer steps"
        self.horizon = whole("horizon", horizon, meaning=steps)
        self.every = None if every is None else whole("every", every, meaning=steps)
        self.minimum, self.maximum = non_negative("minimum", minimum), non_negative("maximum", maximum)
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(f"minimum={minimum} and maximum={maximum} must be 0 < minimum <= maximum.")
        self._alpha: float | None = None
        self._changed_at: int | None = None
        self._sums: Tensor | None = None
        self._saved_sums: list[list[float]] = []
        self._patience = math.inf

    def after(self, alpha: float, kl: float, steps: int) -> float:
        """Alpha after some steps with this mean kl; NaN leaves it unchanged."""
        error = 0.0 if math.isnan(kl) else max(-0.2, min(0.2, kl / self.target_kl - 1))
        return max(self.minimum, min(self.maximum, alpha * (1 + error * min(1.0, steps / self.horizon))))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of another Trainer's training, before a checkpoint is loaded."""
        if stage == "fit" and not trainer.global_step:
            self._alpha, self._changed_at, self._sums, self._saved_sums = None, None, None, []
            self._patience = 50  # batches of manual optimization, before the first kl

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the module's own alpha, unless a checkpoint or an earlier ``fit`` gave another."""
        super().on_fit_start(trainer, pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by its connector
            if other is not self and isinstance(other, ModuleValue) and other.attribute == self.attribute:
                raise ValueError(f"AdaptiveAlpha and {other!r} both set {self.attribute}. Remove one of them.")
        if self._alpha is None:
            self._alpha = float(self.own_value or 0.0)
        if not self.minimum <= self._alpha <= self.maximum:
            raise ValueError(
                f"rdrop_alpha={self._alpha:g} is not between minimum={self.minimum:g} and maximum={self.maximum:g} of "
                "AdaptiveAlpha, which starts from it. Change rdrop_alpha or the bounds."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, or restore the sums of a resumed training."""
        if self._changed_at is None:
            self._changed_at = steps_made(trainer, pl_module)
            if trainer.is_global_zero and not is_dry_run(trainer):
                self._warn_of_no_change(trainer, require_rdrop(self, pl_module), self._changed_at)
        if self._saved_sums:
            if len(self._saved_sums) != trainer.world_size:  # put all on one rank
                total = [sum(column) for column in zip(*self._saved_sums, strict=True)]
                self._saved_sums = [total, *[[0.0, 0.0]] * (trainer.world_size - 1)]
            sums, device = self._saved_sums[trainer.global_rank], pl_module.device
            self._sums = torch.tensor(sums, dtype=_precise(device), device=device)
            self._saved_sums = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Update alpha if it is due, and set it."""
        module = require_rdrop(self, pl_module)
        made = steps_made(trainer, pl_module)
        steps = made - (self._changed_at or 0)
        if steps >= self._steps_between_changes(trainer):
            if self._alpha is not None and self._sums is not None:
                sums: Any = trainer.strategy.reduce(self._sums, reduce_op="sum")
                total, rows = sums.tolist()
                self._alpha = self.after(self._alpha, total / rows if rows else math.nan, steps)
            self._changed_at, self._sums = made, None
        setattr(module, self.attribute, self._alpha)
        module.rdrop_kl = None  # drop the value of an earlier step

    def _steps_between_changes(self, trainer: Trainer) -> int:
        return self.every or trainer.log_every_n_steps or 50  # type: ignore[attr-defined]  # set by its connector

    def _warn_of_no_change(self, trainer: Trainer, module: RDropMixin, begin: int) -> None:
        planned, every = planned_steps(trainer), self._steps_between_changes(trainer)
        if module.rdrop_views == 1:
            warnings.warn(
                f"AdaptiveAlpha never changes alpha: {type(module).__name__} has rdrop_views=1, so there is no kl. Set "
                "rdrop_views=2, or train without this callback.",
                stacklevel=3,
            )
        elif planned is not None and planned - begin <= every:
            warnings.warn(
                f"AdaptiveAlpha never changes alpha: it does so every {every} steps, but the training has only "
                f"{planned - begin}. Pass a smaller AdaptiveAlpha(..., every=N); the default is "
                "Trainer(log_every_n_steps=...).",
                stacklevel=3,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the kl of the batch, on its device."""
        module = require_rdrop(self, pl_module)
        if module.automatic_optimization and not outputs:
            return  # training_step skipped the batch
        if module.rdrop_kl is None:
            self._patience -= 1
            if module.automatic_optimization or self._patience == 0:
                raise ValueError(
                    f"AdaptiveAlpha found no kl: the training_step of {type(pl_module).__name__} has to call "
                    "self.rdrop_log(terms)."
                )
            return
        self._patience = math.inf
        if module.rdrop_views == 1:
            return  # kl is 0, and alpha multiplies nothing
        kl = module.rdrop_kl.to(_precise(module.rdrop_kl.device))
        counted = module.rdrop_denominators.get("kl")
        rows = torch.ones_like(kl) if counted is None else counted.to(kl)
        sums = torch.stack([kl * rows, rows])
        self._sums = sums if self._sums is None else self._sums + sums

    def state_dict(self) -> dict[str, Any]:
        """The current alpha, and the step of its last change."""
        return {"alpha": self._alpha, "changed_at": self._changed_at, "sums": []}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the sums of all ranks: rank zero writes the checkpoint, but knows only its own."""
        if self._sums is not None:
            sums = trainer.strategy.all_gather(self._sums).reshape(-1, 2).tolist()
            checkpoint["callbacks"][self.state_key]["sums"] = sums

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self._patience = math.inf
        self._alpha, self._changed_at = state_dict["alpha"], state_dict["changed_at"]
        self._saved_sums = state_dict["sums"]


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
