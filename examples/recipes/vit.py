"""A timm network: set dropout and drop path at construction, and double the batch at the first dropout."""

import pytorch_lightning as pl
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import RDropMixin


class Images(RDropMixin, pl.LightningModule):
    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.network = network

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    sizes = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 2}  # tiny
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=2, proj_drop_rate=0.1, pos_drop_rate=0.1, drop_path_rate=0.1, **sizes
    )
    x = torch.randn(64, 1, 16, 16)
    data = DataLoader(TensorDataset(x, (x[:, 0, 0, 0] > 0).long()), 16, shuffle=True)
    module = Images(network, rdrop_duplicate_at="network.pos_drop", rdrop_alpha=0.5)  # patches are embedded once
    pl.Trainer(max_epochs=5).fit(module, data)
