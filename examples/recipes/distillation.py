"""Distillation: the student learns from labels and from a teacher's soft targets, and is consistent with itself."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import Categorical, RDropMixin, Together


class Student(RDropMixin, pl.LightningModule):
    def __init__(self, network, teacher, temperature=2.0, share=0.5, **kwargs):
        # (1 - share) ce + share T^2 ce_soft (Hinton et al. 2015, whose KL has the same gradient), and kl of the logits
        weights = {"hard": 1 - share, "soft": share * temperature**2}
        alphas = {"hard": 1 / (1 - share), "soft": 0.0}
        distances = {"hard": Categorical(), "soft": Categorical()}
        super().__init__(rdrop_distance=Together(distances, weights=weights, alphas=alphas), **kwargs)
        self.network, self.temperature = network, temperature
        self.teacher = teacher.eval().requires_grad_(False)  # fit leaves it in eval mode

    def forward(self, x):
        logits = self.network(x)
        return {"hard": logits, "soft": logits / self.temperature}

    def rdrop_unpack(self, batch):
        x, labels = batch
        with torch.no_grad():  # once for all views
            return x, {"hard": labels, "soft": (self.teacher(x) / self.temperature).softmax(-1)}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.network.parameters(), lr=1e-2)


if __name__ == "__main__":
    teacher = nn.Linear(8, 3)  # in practice, a larger pretrained network
    x = torch.randn(64, 8)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    data = DataLoader(TensorDataset(x, teacher(x).argmax(-1)), 16, shuffle=True)
    pl.Trainer(max_epochs=5).fit(Student(network, teacher), data)
