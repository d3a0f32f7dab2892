"""Data in which only some training rows have a label."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Subset


class FewLabels(pl.LightningDataModule):
    """Pairs (x, y) for training, validation and test; the first training rows are the labeled ones.

    Args:
        batch_size: rows in a training batch.
        train_size: the number of labeled training rows; None is all.
        draw: seed of the split, and so of which training rows are labeled.
        unlabeled_batch_size: unlabeled rows added to each batch; 0 is none.
    """

    def __init__(
        self, batch_size: int = 32, train_size: int | None = None, draw: int = 0, unlabeled_batch_size: int = 0
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train_size = train_size
        self.draw = draw
        self.unlabeled_batch_size = unlabeled_batch_size

    def parts(self, generator: Generator) -> tuple[Dataset, Dataset, Dataset]:
        """Training rows in random order, validation rows and test rows."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        train, self.val, self.test = self.parts(torch.Generator().manual_seed(self.draw))
        cut = len(train) if self.train_size is None else self.train_size
        self.train, self.unlabeled = Subset(train, range(cut)), Subset(train, range(cut, len(train)))

    def train_dataloader(self) -> DataLoader | CombinedLoader:
        labeled = DataLoader(self.train, self.batch_size, shuffle=True)
        if not self.unlabeled_batch_size:
            return labeled
        unlabeled = DataLoader(self.unlabeled, self.unlabeled_batch_size, shuffle=True, collate_fn=without_labels)
        # an epoch of the labeled rows, or of the unlabeled ones if these are fewer batches
        return CombinedLoader({"labeled": labeled, "unlabeled": unlabeled}, "min_size")

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 500)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 500)


def without_labels(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([x for x, _ in rows])
