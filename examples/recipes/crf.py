"""A linear-chain CRF as a custom Distance: its transitions are parameters, trained and saved with the module."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import Average, Distance
from lightning_rdrop.modules import Classifier


class CRF(Distance):  # scores (N, T, C), tags (N, T), padded at the end with -100; both terms in nats per sentence
    def __init__(self, tags):
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(tags, tags))

    def log_partition(self, scores, tags=None):  # over all taggings: the forward algorithm
        total = scores[:, 0]
        for t in range(1, scores.shape[1]):
            step = (total.unsqueeze(2) + self.transitions).logsumexp(1) + scores[:, t]
            total = step if tags is None else step.where(tags[:, t, None] >= 0, total)
        return total.logsumexp(1)

    def to_target(self, scores, tags):  # -log p(tags)
        real, label = tags >= 0, tags.clamp(min=0)
        emitted = (scores.gather(2, label.unsqueeze(2)).squeeze(2) * real).sum(1)
        moved = (self.transitions[label[:, :-1], label[:, 1:]] * real[:, 1:]).sum(1)
        return Average.of(self.log_partition(scores, tags) - emitted - moved)

    def between(self, first, second, tags=None):  # KL both ways = <p - q, first - second>, of the marginals of each tag
        p, q = (torch.func.grad(lambda x: self.log_partition(x, tags).sum())(view) for view in (first, second))
        return Average.of(((p - q) * (first - second)).sum((1, 2)) / 2)


if __name__ == "__main__":
    words, lengths = torch.randint(50, (64, 8)), torch.randint(3, 9, (64, 1))
    data = TensorDataset(words, (words % 5).where(torch.arange(8) < lengths, -100))
    network = nn.Sequential(nn.Embedding(50, 32), nn.Dropout(0.3), nn.Linear(32, 5))
    pl.Trainer(max_epochs=5).fit(Classifier(network, 5, rdrop_distance=CRF(5)), DataLoader(data, 16))
