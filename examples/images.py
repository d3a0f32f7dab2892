"""Fashion-MNIST from a folder with the files as published, and a small network for it."""

import gzip
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

FILES = {"train": "train", "test": "t10k"}


class CNN(nn.Sequential):
    """Two convolutions and two linear layers, with dropout behind each but the last; returns logits (N, classes)."""

    def __init__(self, classes: int = 10, width: int = 32, dropout: float = 0.3) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout),
            nn.Flatten(), nn.Linear(2 * width * 49, 4 * width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(4 * width, classes),
        )  # fmt: skip


class FashionMNIST(pl.LightningDataModule):
    """70,000 images of clothes in ten classes, 28 x 28: 50,000 for training, 10,000 each for validation and test.

    Args:
        folder: holds ``train-images-idx3-ubyte.gz`` and so on; Debian's package ``dataset-fashion-mnist`` puts them
            under ``/usr/share/datasets/fashion-mnist``.
        train_size: the number of training images.
        draw: seed of the choice among them, and of the split into training and validation.
        batch_size: images in a batch.
        unlabeled_batch_size: those of the other training images, without their labels, beside each batch; 0 is none.
    """

    def __init__(
        self,
        folder: str,
        train_size: int = 50_000,
        draw: int = 0,
        batch_size: int = 64,
        unlabeled_batch_size: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.train_size = train_size
        self.draw = draw
        self.batch_size = batch_size
        self.unlabeled_batch_size = unlabeled_batch_size

    def setup(self, stage: str) -> None:
        images = TensorDataset(*self.table("train"))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.draw)).tolist()
        self.val = Subset(images, order[-10_000:])
        self.train = Subset(images, order[:-10_000][: self.train_size])
        self.unlabeled = Subset(images.tensors[0], order[:-10_000][self.train_size :])
        self.test = TensorDataset(*self.table("test"))

    def table(self, split: str) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 28, 28) around 0, and classes (N,)."""
        images, labels = (
            torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8)
            for header in (16, 8)
            for path in [self.folder / f"{FILES[split]}-{'images-idx3' if header == 16 else 'labels-idx1'}-ubyte.gz"]
        )
        return (images.view(-1, 1, 28, 28).float() - 73) / 90, labels.long()  # mean and deviation of the pixels

    def train_dataloader(self) -> DataLoader | CombinedLoader:
        labeled = DataLoader(self.train, self.batch_size, shuffle=True)
        if not self.unlabeled_batch_size:
            return labeled
        unlabeled = DataLoader(self.unlabeled, self.unlabeled_batch_size, shuffle=True)
        return CombinedLoader({"labeled": labeled, "unlabeled": unlabeled}, "min_size")  # an epoch of the labelled ones

    def val_dataloader(self) -> DataLoader:
        return self._in_order(self.val)

    def test_dataloader(self) -> DataLoader:
        return self._in_order(self.test)

    def _in_order(self, images: Dataset) -> DataLoader:
        return DataLoader(images, 500)
