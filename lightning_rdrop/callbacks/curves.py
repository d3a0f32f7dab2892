"""The picture of a training, when it is over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rdrop._lightning import Callback
from lightning_rdrop.plots import curves

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class Curves(Callback):
    """Draws ce, kl, alpha and the validation accuracy over the steps, beside the ``metrics.csv`` of the ``CSVLogger``.

    Args:
        filename: of the PNG, in the logger's folder, or an absolute path.
        panels: see :func:`lightning_rdrop.plots.curves`.

    Raises:
        ValueError: the Trainer has no ``CSVLogger``.
    """

    def __init__(self, filename: str = "curves.png", panels: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.filename = filename
        self.panels = panels

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._csv_logger(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
            if type(logger).__name__ == "DummyLogger":  # fast_dev_run puts it in the place of all others
                return None
        raise ValueError("Curves draws what a CSVLogger wrote: add one, Trainer(logger=CSVLogger('logs')).")
