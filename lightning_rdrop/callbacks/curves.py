"""Plot the curves of a training at its end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_rdrop._lightning import Callback, is_dry_run
from lightning_rdrop.optimizer_steps import planned_steps, steps_made
from lightning_rdrop.plots import History, curves, read_csv

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class Curves(Callback):
    """Plots a training at its end: ce, kl, alpha, the validation metric, and the gap if the monitor measured it.

    The plot is saved in the folder of the ``CSVLogger`` and shows what it logged. Without a ``CSVLogger``, the callback
    records what is logged, at the same steps, and saves the plot in the Trainer's folder. A ``TensorBoardLogger`` also
    gets it as a figure.

    Configurations that produce no plot are rejected, or cause a warning, before training. After training, a plot that
    fails is only a warning, so that a finished training never fails because of it.

    Args:
        filename: of the PNG, relative to that folder or absolute; missing folders are created.
        panels: see :func:`lightning_rdrop.plots.curves`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """

    def __init__(self, filename: str = "curves.png", panels: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.filename = filename
        self.panels = panels
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._steps = 0
        self._of_steps: set[str] = set()
        self._of_validation: set[str] = set()
        self._before_epoch: dict[str, Tensor] = {}
        self._before_validation: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reject before training what would fail after it."""
        self._reset()
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError("Curves plots with matplotlib: pip install matplotlib, or train without Curves.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the training ends before the first log; its length is known only now."""
        steps, every = planned_steps(trainer), trainer.log_every_n_steps  # type: ignore[attr-defined]  # of a connector
        if self.panels is None and steps is not None and not 0 < every <= steps and not is_dry_run(trainer):
            warnings.warn(
                f"Curves will find no train/ce, train/kl or train/alpha: the Trainer logs every {every} steps, but "
                f"makes only {steps}. Use Trainer(log_every_n_steps=1), or another value up to {steps}.",
                stacklevel=2,
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was logged before the epoch."""
        self._before_epoch = dict(trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record what was logged, at the steps at which the loggers do."""
        # manual optimization counts batches, and this one is counted after the hook
        steps = steps_made(trainer, pl_module) + (not pl_module.automatic_optimization)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its connector
        has_stepped, self._steps = steps != self._steps, steps
        due = has_stepped and every and steps % every == 0
        if due or trainer.is_last_batch or not self._of_steps:  # not in each step: reading them waits for the device
            metrics = _new(trainer.callback_metrics, self._before_epoch)
            metrics = {name: value for name, value in metrics.items() if name not in self._of_validation}
            self._of_steps |= set(metrics)
            if due:
                self._record(metrics)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was logged before the validation."""
        self._before_validation = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of a validation."""
        if not trainer.sanity_checking:
            metrics = _new(trainer.callback_metrics, self._before_validation)
            self._of_validation |= set(metrics)
            self._record(metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the means of an epoch."""
        metrics = _new(trainer.callback_metrics, self._before_epoch)
        others = self._of_steps | self._of_validation
        self._record({name: value for name, value in metrics.items() if name not in others})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot once everything is logged, including the metrics of the last epoch."""
        if is_dry_run(trainer):
            return
        folder = trainer.log_dir or trainer.default_root_dir  # a collective call
        if not trainer.is_global_zero:
            return
        try:
            logger = _logger(trainer, "CSVLogger")
            history: History = self._history
            if logger is not None:
                logger.save()
                folder = logger.log_dir
                history = read_csv(Path(folder) / "metrics.csv")
            path = Path(folder) / self.filename
            figure = curves({"the training": history}, self.panels)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
            tensorboard = _logger(trainer, "TensorBoardLogger")
            if tensorboard is not None:
                tensorboard.experiment.add_figure("curves", figure, trainer.global_step)
        except Exception as error:  # a finished training must not fail because of its plot
            warnings.warn(f"Curves could not plot. {type(error).__name__}: {error}", stacklevel=2)
        else:
            print(f"curves: {path}")

    def _reset(self) -> None:
        self._history = {}
        self._steps = 0
        self._of_steps, self._of_validation = set(), set()
        self._before_epoch, self._before_validation = {}, {}

    def _record(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._history.setdefault(name, []).append((max(self._steps - 1, 0), float(value)))


def _new(metrics: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics logged since; those of all others are the same tensors as before."""
    return {name: value for name, value in metrics.items() if before.get(name) is not value}


def _logger(trainer: Trainer, name: str) -> Any:
    """The first logger whose class has this name, in either distribution of Lightning."""
    return next((logger for logger in trainer.loggers if type(logger).__name__ == name), None)
