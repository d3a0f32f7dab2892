"""Two random crops of each image instead of two copies, with mixup; the crops are by kornia."""

import pytorch_lightning as pl
import torch
from kornia.augmentation import AugmentationSequential, RandomHorizontalFlip, RandomResizedCrop
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import RDropMixin, Views


class TwoCrops(RDropMixin, pl.LightningModule):
    def __init__(self, classes=4):
        super().__init__(rdrop_alpha=1.0)
        self.classes = classes
        self.augment = AugmentationSequential(RandomResizedCrop((16, 16), scale=(0.6, 1.0)), RandomHorizontalFlip())
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.network = nn.Sequential(stem, nn.Dropout(0.1), nn.Linear(64, classes))  # dropout is optional here

    def forward(self, x):
        return self.network(x)

    def rdrop_unpack(self, batch):  # whole batches, on their device; a data set may return Views of its crops instead
        images, labels = batch
        share, other = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(images))
        first, second, target = self.augment(images), self.augment(images), F.one_hot(labels, self.classes).float()
        first, second, target = (share * x + (1 - share) * x[other] for x in (first, second, target))
        return Views(first, second), target  # one soft target for both

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    labels = torch.randint(4, (128,))
    images = torch.rand(128, 3, 20, 20) + torch.rand(4, 3, 1, 1)[labels]
    pl.Trainer(max_epochs=5).fit(TwoCrops(), DataLoader(TensorDataset(images, labels), 32, shuffle=True))
