"""The curves of a training, drawn at its end."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_rdrop._lightning import Callback
from lightning_rdrop.callbacks._training_length import planned_steps
from lightning_rdrop.plots import History, curves, read_csv

if TYPE_CHECKING:
    from lightning_rdrop._lightning import LightningModule, Trainer


class Curves(Callback):
    """Plots a training at its end: ce, kl, alpha, the validation metric, and the gap where the monitor measured it.

    The picture lies in the folder of the ``CSVLogger``, and shows what that wrote. Without one the callback keeps what
    was logged, at the same steps, and the picture lies in the Trainer's folder. A ``TensorBoardLogger`` gets it as a
    figure as well.

    What would leave nothing to plot is found before training. After it, a picture that cannot be made is a warning: a
    finished training never fails for it.

    Args:
        filename: of the PNG, relative to that folder or absolute.
        panels: see :func:`lightning_rdrop.plots.curves`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """

    def __init__(self, filename: str = "curves.png", panels: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.filename = filename
        self.panels = panels
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._seen: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before training what would fail after it."""
        self._history, self._seen = {}, {}
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError("Curves plots with matplotlib: pip install matplotlib, or train without Curves.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a training that ends before the first log; how long it is, is known from here on."""
        steps, every = planned_steps(trainer), trainer.log_every_n_steps  # type: ignore[attr-defined]  # of a connector
        if self.panels is None and steps is not None and not 0 < every <= steps and not _is_dry(trainer):
            warnings.warn(
                f"Curves will find no train/ce, train/kl or train/alpha: the Trainer logs every {every} steps and "
                f"makes {steps}. Write Trainer(log_every_n_steps=1), or another number that is no larger.",
                stacklevel=2,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what was logged, where loggers do."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # its connector sets it
        if every and trainer.global_step % every == 0:
            self._keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the means of an epoch."""
        self._keep(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of a validation."""
        if not trainer.sanity_checking:
            self._keep(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot once everything is logged, the metrics of the last epoch included."""
        if _is_dry(trainer):
            return
        folder = trainer.log_dir or trainer.default_root_dir  # asks all ranks
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
            figure.savefig(path, dpi=150)
            tensorboard = _logger(trainer, "TensorBoardLogger")
            if tensorboard is not None:
                tensorboard.experiment.add_figure("curves", figure, trainer.global_step)
        except Exception as error:  # whatever it is, the training is worth more than its picture
            warnings.warn(f"Curves made no picture. {type(error).__name__}: {error}", stacklevel=2)
        else:
            print(f"curves: {path}")

    def _keep(self, trainer: Trainer) -> None:
        """Add what was logged since the last time: the Trainer makes a new tensor for each value, and keeps the old."""
        metrics = dict(trainer.callback_metrics)
        step = max(trainer.global_step - 1, 0)  # as loggers count
        for name, value in metrics.items():
            if self._seen.get(name) is not value:
                self._history.setdefault(name, []).append((step, float(value)))
        self._seen = metrics


def _logger(trainer: Trainer, name: str) -> Any:
    """The first logger of a class, of either distribution."""
    return next((logger for logger in trainer.loggers if type(logger).__name__ == name), None)


def _is_dry(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # its connector sets it
