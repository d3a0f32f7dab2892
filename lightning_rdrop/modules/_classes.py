"""What modules for classes share: the data tell how many there are, and a checkpoint what they are called."""

from __future__ import annotations

from typing import Any, ClassVar

from torchmetrics import MetricCollection

from lightning_rdrop._lightning import trainer_of
from lightning_rdrop.data.classes import KnowsClasses, some
from lightning_rdrop.modules.task import Task


class ClassTask(Task):
    """A task with classes, whose number and names are those of the data, such as a
    :class:`~lightning_rdrop.data.TextDataModule`.

    Checkpoints have the names, so that neither test nor prediction needs a training table.

    Raises:
        ValueError: the number is neither given nor known from the data; or it differs between module, data and
            checkpoint, as may the names.
    """

    count_argument: ClassVar[str] = "num_classes"
    """The argument that is their number; None until the data tell."""

    def metrics_of(self, count: int) -> MetricCollection:
        """Hook: what validation and test measure with that many classes."""
        raise NotImplementedError

    def set_count(self, count: int) -> None:
        """Take the number of classes, as if it had been given."""
        setattr(self, self.count_argument, count)
        self.hparams[self.count_argument] = count
        self.set_metrics(self.metrics_of(count))

    classes: list[str] | None = None
    """The names of the classes in the order of their indices, if the data tell."""

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        count = getattr(self, self.count_argument)
        if isinstance(data, KnowsClasses):
            # only a training needs them at once; else they may come from a checkpoint
            names = data.known_labels() if stage == "fit" or (count is None and self.classes is None) else data.labels
            if names is None:
                data.labels = self.classes
            else:
                self._take(names, "the data have")
        if getattr(self, self.count_argument) is None:
            raise ValueError(
                f"{type(self).__name__} does not know how many classes there are: give {self.count_argument}=..., or "
                "the data by a TextDataModule or an ImageFolderDataModule."
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
            raise ValueError(f"{self.count_argument} is {count}, and the checkpoint was trained for {there} classes.")

    def _take(self, names: list[str], source: str) -> None:
        count = getattr(self, self.count_argument)
        if count is None:
            self.set_count(len(names))
        elif count != len(names):
            raise ValueError(f"{self.count_argument} is {count}, and {source} {len(names)} classes {some(names)}.")
        if self.classes is not None and self.classes != names:
            raise ValueError(f"The model has the classes {some(self.classes)}, and {source} {some(names)}.")
        self.classes = names
