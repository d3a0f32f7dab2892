"""Speech recognition with CTC: the prediction is a pair, the logits and their numbers of valid frames."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_rdrop import CTC, RDropMixin


class Recognizer(RDropMixin, pl.LightningModule):
    def __init__(self, features=8, tokens=5):
        super().__init__(rdrop_distance=CTC(blank=0), rdrop_alpha=1.0)
        self.encoder = nn.LSTM(features, 32, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, tokens))

    def forward(self, frames, lengths):  # matched to the batch by name; both are doubled, so each view has its own
        packed = pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.encoder(packed)[0], batch_first=True, total_length=frames.shape[1])
        return self.head(hidden), lengths

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def utterances(number=64):
    tokens = torch.randint(1, 5, (number, 3))
    frames = torch.eye(8)[tokens].repeat_interleave(4, 1) * torch.tensor([1.0, 1, 1, 0]).repeat(3)[:, None]
    lengths = 4 * torch.randint(1, 4, (number,))
    tokens[torch.arange(3) >= lengths[:, None] // 4] = -100  # padding; or use (tokens, lengths) as the target
    return [{"frames": x, "lengths": n, "labels": y} for x, n, y in zip(frames, lengths, tokens, strict=True)]


if __name__ == "__main__":
    trainer = pl.Trainer(max_epochs=5)
    trainer.fit(Recognizer(), DataLoader(utterances(), 16, shuffle=True))
    print(trainer.callback_metrics)  # train/ctc in nats per token, train/kl in nats per frame
