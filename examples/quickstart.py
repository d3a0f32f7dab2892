"""An ordinary LightningModule, and the three lines that add R-Drop: python examples/quickstart.py"""

import pytorch_lightning as pl
import torch
from fasttext import FastText
from reviews import Reviews

from lightning_rdrop import AlphaScheduler, RDropMixin


class Sentiment(RDropMixin, pl.LightningModule):  # before: class Sentiment(pl.LightningModule)
    def __init__(self, learning_rate: float = 1e-3, **kwargs):
        super().__init__(**kwargs)  # before: super().__init__()
        self.learning_rate = learning_rate
        self.network = FastText()

    def forward(self, input_ids):
        return self.network(input_ids)

    # before: def training_step(self, batch, batch_idx): ..., which the mixin now provides

    def validation_step(self, batch, batch_idx):
        predicted = self(batch["input_ids"]).argmax(-1)
        self.log("val/accuracy", (predicted == batch["labels"]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


if __name__ == "__main__":
    pl.seed_everything(1)
    trainer = pl.Trainer(max_epochs=3, logger=False, callbacks=[AlphaScheduler(ramp=0.2)])  # before: no callback
    trainer.fit(Sentiment(rdrop_alpha=4.0), Reviews())
