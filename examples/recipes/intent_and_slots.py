"""An intent for each sentence and a slot for each of its words: two predictions, each with its own distance."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_rdrop import Categorical, RDropMixin, Together


class Assistant(RDropMixin, pl.LightningModule):
    def __init__(self, words=50, intents=3, slots=5):
        # a larger alpha for the slots; without factors, pass rdrop_distance={"intent": Categorical(), ...}
        distances = {"intent": Categorical(label_smoothing=0.1), "slots": Categorical()}
        super().__init__(rdrop_distance=Together(distances, weights={"slots": 0.5}, alphas={"slots": 2.0}))
        self.embedding = nn.Sequential(nn.Embedding(words, 32), nn.Dropout(0.3))
        self.encoder = nn.GRU(32, 16, batch_first=True, bidirectional=True)
        self.intent, self.slots = nn.Linear(32, intents), nn.Linear(32, slots)

    def forward(self, x):
        hidden, _ = self.encoder(self.embedding(x))
        return {"intent": self.intent(hidden.mean(1)), "slots": self.slots(hidden)}  # the names of the distances

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def sentences(number=64):
    words = torch.randint(50, (number, 8))
    slots = words % 5
    slots[:, 6:] = -100  # padding is ignored in both terms
    return [(x, {"intent": x[0] % 3, "slots": y}) for x, y in zip(words, slots, strict=True)]


if __name__ == "__main__":
    trainer = pl.Trainer(max_epochs=5)
    trainer.fit(Assistant(), DataLoader(sentences(), 16, shuffle=True))
    print(trainer.callback_metrics)  # train/intent_ce, train/intent_kl, train/slots_ce, ... and their weighted sums
