"""A progress bar that shows alpha, ce and kl in a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar


class NarrowProgressBar(TQDMProgressBar):
    """Lightning's text progress bar with less decoration, and short names for the metrics.

    Example:
        >>> shortened({"v_num": 0, "train/ce": 0.5, "val/accuracy": 0.9, "train/loss": 1.0, "val/loss": 2.0})
        {'ce': 0.5, 'accuracy': 0.9, 'loss': 1.0, 'val/loss': 2.0}
    """

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return bar

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return shortened(super().get_metrics(trainer, pl_module))


def shortened(metrics: dict[str, Any]) -> dict[str, Any]:
    """Drop the logger's version, and the stage from names that stay unique without it."""
    short: dict[str, Any] = {}
    for name, value in metrics.items():
        end = name.removeprefix("train/").removeprefix("val/")
        if name != "v_num":
            short[name if end in short else end] = value
    return short
