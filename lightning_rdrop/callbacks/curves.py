"""Training curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rdrop._lightning import Callback
from lightning_rdrop.plots import curves

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class Curves(Callback):
    """Plots ce, kl, alpha and the validation accuracy after training, next to the ``metrics.csv`` of a ``CSVLogger``.

    Args:
        filename: of the PNG, relative to the logger's folder or absolute.
        panels: see :func:`lightning_rdrop.plots.curves`.

    Raises:
        ValueError: the Trainer has no ``CSVLogger``.
    """

    def __init__(self, filename: str = "curves.png", panels: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.filename = filename
        self.panels = panels

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a Trainer without a CSVLogger before training, not after it."""
        self._csv_logger(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw once everything is logged, the metrics of the last epoch included."""
        logger = self._csv_logger(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        logger.save()
        path = Path(logger.log_dir) / self.filename
        curves(Path(logger.log_dir) / "metrics.csv", self.panels).savefig(path, dpi=150)
        print(f"curves: {path}")

    @staticmethod
    def _csv_logger(trainer: Trainer) -> Any:
        for logger in trainer.loggers:
            if type(logger).__name__ == "CSVLogger":  # of either distribution
                return logger
            if type(logger).__name__ == "DummyLogger":  # fast_dev_run replaces all loggers by it
                return None
        raise ValueError("Curves plots what a CSVLogger wrote: add one, Trainer(logger=CSVLogger('logs')).")
