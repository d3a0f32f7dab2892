"""Fashion-MNIST from a folder with the published files, and a small network for it."""

import gzip
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from examples.few_labels import FewLabels

FILES = {"train": "train", "test": "t10k"}


class CNN(nn.Sequential):
    """Two convolutions and two linear layers, with dropout after each but the last; returns logits (N, classes)."""

    def __init__(self, classes: int = 10, width: int = 32, dropout: float = 0.3) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout),
            nn.Flatten(), nn.Linear(2 * width * 49, 4 * width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(4 * width, classes),
        )  # fmt: skip


class FashionMNIST(FewLabels):
    """70,000 images of clothes in ten classes, 28 x 28: 58,000 for training, 2,000 for validation, 10,000 for test.

    Args:
        folder: contains ``train-images-idx3-ubyte.gz`` and so on; Debian's package ``dataset-fashion-mnist`` installs
            them in ``/usr/share/datasets/fashion-mnist``.
        few_labels: the arguments of :class:`FewLabels`.
    """

    def __init__(self, folder: str, **few_labels) -> None:
        super().__init__(**few_labels)
        self.folder = Path(folder)

    def parts(self, generator: Generator) -> tuple[Dataset, Dataset, Dataset]:
        images = TensorDataset(*self.table("train"))
        order = torch.randperm(len(images), generator=generator).tolist()
        return Subset(images, order[:-2_000]), Subset(images, order[-2_000:]), TensorDataset(*self.table("test"))

    def table(self, split: str) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 28, 28), centered at 0, and classes (N,)."""

        def read(kind: str, header: int) -> Tensor:
            raw = gzip.decompress((self.folder / f"{FILES[split]}-{kind}-ubyte.gz").read_bytes())
            return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8)

        images, labels = read("images-idx3", header=16), read("labels-idx1", header=8)
        return (images.view(-1, 1, 28, 28).float() - 73) / 90, labels.long()  # mean and deviation of the pixels
