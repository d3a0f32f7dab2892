"""A LightningDataModule for folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_rdrop.data.classes import distinct, some
from lightning_rdrop.extras import require


class ImageFolderDataModule(pl.LightningDataModule):
    """Batches of images and their classes, from folders ``train/CLASS/*.png``, ``val/CLASS/...`` and ``test/...``.

    torchvision's ``ImageFolder`` reads the images, and timm's transforms convert them to tensors, with augmentation in
    training. Both views of an example are copies of one augmented image.

    Args:
        folder: contains ``train``, and ``val`` and ``test`` if needed.
        architecture: the timm model whose image size, interpolation, mean and standard deviation are used; ``None`` is
            224 and those of ImageNet.
        transforms: arguments of ``timm.data.create_transform`` that override these: ``{input_size: [3, 384, 384]}``.
        augmentation: more such arguments for training, such as ``{auto_augment: rand-m9-mstd0.5, re_prob: 0.25}``.
        labels: the class names in index order; ``None`` takes those of a checkpoint, or the sorted folders of
            ``train``.
        batch_size: B, the number of images in a batch, before R-Drop duplicates them.
        num_workers: worker processes of each data loader.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: a folder that is not a class; a split that does not exist.

    Shapes:
        images (B, 3, H, W) and class indices (B,).
    """

    def __init__(
        self,
        folder: str,
        architecture: str | None = None,
        *,
        transforms: dict[str, Any] | None = None,
        augmentation: dict[str, Any] | None = None,
        labels: list[str] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.architecture = architecture
        self.transforms = transforms or {}
        self.augmentation = augmentation or {}
        self.labels = None if labels is None else distinct(labels)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.known_labels()

    def known_labels(self) -> list[str]:
        """The class names in index order; if none are known yet, the sorted folders of ``train``."""
        if self.labels is None:
            self.labels = sorted(path.name for path in self.split("train").iterdir() if path.is_dir())
        return self.labels

    def split(self, name: str) -> Path:
        """The folder of ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            ValueError: it does not exist.
        """
        path = self.folder / name
        if not path.is_dir():
            raise ValueError(f"There is no folder {path}. Put the images of each class into a folder {name}/CLASS.")
        return path

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", training=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("val") if (self.folder / "val").is_dir() else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def check_test(self) -> None:
        """Raise now what a test would raise for its folder, unless a subclass gets its images elsewhere."""
        if not any(is_overridden(hook, self, ImageFolderDataModule) for hook in ("prepare_data", "test_dataloader")):
            self.test_dataloader()

    def transform(self, *, training: bool) -> Any:
        """Hook: the transform from an image to a tensor."""
        timm = require("timm", "vision", "ImageFolderDataModule")
        size = {"input_size": (3, 224, 224)}
        known = size if self.architecture is None else timm.get_pretrained_cfg(self.architecture).to_dict()
        config = timm.data.resolve_data_config(pretrained_cfg=known) | self.transforms
        return timm.data.create_transform(**config, is_training=training, **(self.augmentation if training else {}))

    def _loader(self, split: str, *, training: bool = False) -> DataLoader[Any]:
        folder, labels = self.split(split), self.known_labels()
        datasets = require("torchvision", "vision", "ImageFolderDataModule").datasets
        images = datasets.ImageFolder(str(folder), self.transform(training=training))
        if unknown := [name for name in images.classes if name not in labels]:
            raise ValueError(f"{folder / unknown[0]} is not one of the {len(labels)} classes {some(labels)}.")
        images.target_transform = [labels.index(name) for name in images.classes].__getitem__  # a class may be missing
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=training,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
