"""Training curves as a picture."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rdrop._lightning import Callback
from lightning_rdrop.callbacks._training_length import planned_steps
from lightning_rdrop.plots import curves

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class Curves(Callback):
    """Plots ce, kl, alpha and the validation accuracy after training, next to the ``metrics.csv`` of a ``CSVLogger``.

    What would leave nothing to plot is found before training. After it, a picture that cannot be made is a warning: a
    finished training never fails for it.

    Args:
        filename: of the PNG, relative to the logger's folder or absolute.
        panels: see :func:`lightning_rdrop.plots.curves`.

    Raises:
        ValueError: the Trainer has no ``CSVLogger``.
        ModuleNotFoundError: matplotlib is not installed.
    """

    def __init__(self, filename: str = "curves.png", panels: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.filename = filename
        self.panels = panels

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before training what would fail after it."""
        self._csv_logger(trainer)
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError("Curves plots with matplotlib: pip install matplotlib, or train without Curves.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a training that ends before the first log; how long it is, is known from here on."""
        steps, every = planned_steps(trainer), trainer.log_every_n_steps  # type: ignore[attr-defined]  # of a connector
        if self.panels is None and steps is not None and not 0 < every <= steps and self._csv_logger(trainer):
            warnings.warn(
                f"Curves will find no train/ce, train/kl or train/alpha: the Trainer logs every {every} steps and "
                f"makes {steps}. Write Trainer(log_every_n_steps=1), or another number that is no larger.",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot once everything is logged, the metrics of the last epoch included."""
        logger = self._csv_logger(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        try:
            logger.save()
            path = Path(logger.log_dir) / self.filename
            curves(Path(logger.log_dir) / "metrics.csv", self.panels).savefig(path, dpi=150)
        except Exception as error:  # whatever it is, the training is worth more than its picture
            warnings.warn(f"Curves made no picture. {type(error).__name__}: {error}", stacklevel=2)
        else:
            print(f"curves: {path}")

    @staticmethod
    def _csv_logger(trainer: Trainer) -> Any:
        for logger in trainer.loggers:
            if type(logger).__name__ == "CSVLogger":  # of either distribution
                return logger
            if type(logger).__name__ == "DummyLogger":  # fast_dev_run replaces all loggers by it
                return None
        raise ValueError("Curves plots what a CSVLogger wrote: add one, Trainer(logger=CSVLogger('logs')).")
