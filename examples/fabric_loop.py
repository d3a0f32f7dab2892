"""R-Drop in your own training loop, with Lightning Fabric: python -m examples.fabric_loop --devices 2"""

import argparse

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import RDropMixin, schedule


class Classifier(RDropMixin, pl.LightningModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3))

    def forward(self, x):
        return self.network(x)


def train(fabric, epochs=5, peak=4.0):
    fabric.seed_everything(0)
    x = torch.randn(256, 8)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), 16, shuffle=True))
    module = Classifier()
    module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), 1e-2))
    module.mark_forward_method("rdrop_step")  # it runs the network, so DDP and FSDP must see it as a forward
    for epoch in range(epochs):
        module.rdrop_alpha = peak * schedule.sigmoid((epoch + 1) / epochs)
        for batch in loader:
            terms = module.rdrop_step(batch)
            fabric.backward(terms.loss)
            optimizer.step()
            optimizer.zero_grad()
        fabric.print(f"epoch {epoch}: ce {terms.ce:.3f}, kl {terms.kl:.4f}")
    return module, terms


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    fabric = Fabric(devices=parser.parse_args().devices, strategy="ddp")
    fabric.launch()
    train(fabric)
