"""Shared by the classification modules: the classes come from the data or from a checkpoint."""

from __future__ import annotations

from typing import Any, ClassVar

from torchmetrics import MetricCollection

from lightning_rdrop._lightning import trainer_of
from lightning_rdrop.data.classes import KnowsClasses, some
from lightning_rdrop.modules.task import Task


class ClassTask(Task):
    """A task with classes, whose number and names come from the data, such as a
    :class:`~lightning_rdrop.data.TextDataModule`.

    Checkpoints store the names, so that test and prediction need no training table.

    Raises:
        ValueError: the number of classes is neither given nor known from the data; or number or names differ between
            module, data and checkpoint.
    """

    count_argument: ClassVar[str] = "num_classes"
    """Name of the argument with the number of classes, which is None until the data provide it."""

    def metrics_of(self, count: int) -> MetricCollection:
        """Hook: the metrics of validation and test for this number of classes."""
        raise NotImplementedError

    def set_count(self, count: int) -> None:
        """Set the number of classes, as if passed to the constructor."""
        setattr(self, self.count_argument, count)
        self.hparams[self.count_argument] = count
        self.set_metrics(self.metrics_of(count))

    classes: list[str] | None = None
    """Class names in index order; None if unknown."""

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        count = getattr(self, self.count_argument)
        if isinstance(data, KnowsClasses):
            # only training needs them now; otherwise a checkpoint may have them
            names = data.known_labels() if stage == "fit" or (count is None and self.classes is None) else data.labels
            if names is None:
                data.labels = self.classes
            else:
                self._take(names, "the data have")
        if getattr(self, self.count_argument) is None:
            raise ValueError(
                f"{type(self).__name__} does not know the number of classes. Pass {self.count_argument}=..., or use a "
                "TextDataModule or an ImageFolderDataModule."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.classes is not None:
            checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        there = checkpoint.get("hyper_parameters", {}).get(self.count_argument)
        names = checkpoint.get("classes")
        count = getattr(self, self.count_argument)
        if names is not None:
            self._take(names, "the checkpoint was trained for")
            data = getattr(trainer_of(self), "datamodule", None)
            if isinstance(data, KnowsClasses):
                data.labels = names
        elif None not in (there, count) and there != count:
            raise ValueError(f"{self.count_argument} is {count}, but the checkpoint was trained for {there} classes.")

    def _take(self, names: list[str], source: str) -> None:
        count = getattr(self, self.count_argument)
        if count is None:
            self.set_count(len(names))
        elif count != len(names):
            raise ValueError(f"{self.count_argument} is {count}, but {source} {len(names)} classes {some(names)}.")
        if self.classes is not None and self.classes != names:
            raise ValueError(f"The model has the classes {some(self.classes)}, but {source} {some(names)}.")
        self.classes = names
