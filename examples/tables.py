"""Numeric tables that ship with scikit-learn, and a small network for them."""

import torch
from sklearn import datasets
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset, TensorDataset, random_split

from examples.few_labels import FewLabels


class MLP(nn.Sequential):
    """One hidden layer with dropout; returns (N, outputs), or (N,) for a single output."""

    def __init__(self, inputs: int, outputs: int, width: int = 64, dropout: float = 0.2) -> None:
        super().__init__(nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, outputs))
        if outputs == 1:
            self.append(nn.Flatten(0))


class Table(FewLabels):
    """A table of numbers: 60% of its rows for training, 20% each for validation and test."""

    def table(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def parts(self, generator: Generator) -> tuple[Dataset, Dataset, Dataset]:
        return tuple(random_split(TensorDataset(*self.table()), [0.6, 0.2, 0.2], generator))


class Diabetes(Table):
    """442 patients with ten features each; the target is the standardized progression of the disease."""

    def table(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.tensor(column, dtype=torch.float32) for column in datasets.load_diabetes(return_X_y=True))
        return x / x.std(0), (y - y.mean()) / y.std()


class Digits(Table):
    """1,797 images of digits, 8 x 8, in ten classes."""

    def table(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.tensor(column) for column in datasets.load_digits(return_X_y=True))
        return x.float() / 8 - 1, y


class DigitProperties(Table):
    """1,797 images of digits, 8 x 8; the labels are whether the digit is even, prime, at least five, and has a loop."""

    def table(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.tensor(column) for column in datasets.load_digits(return_X_y=True))
        properties = ({0, 2, 4, 6, 8}, {2, 3, 5, 7}, {5, 6, 7, 8, 9}, {0, 6, 8, 9})
        labels = torch.stack([torch.isin(y, torch.tensor(sorted(digits))) for digits in properties], 1)
        return x.float() / 16, labels.float()
