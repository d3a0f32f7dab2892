"""An LSTM over packed reviews. A PackedSequence cannot be doubled, so each view has its own forward pass."""

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from examples.reviews import Reviews


class PackedReviews(Reviews):
    """The reviews as packed sequences of hashed characters."""

    def encode(self, texts: list[str], pairs: list[str] | None) -> dict[str, PackedSequence]:
        ids = super().encode(texts, pairs)["input_ids"]
        sequences = [row[: min(len(text), self.max_length)] for row, text in zip(ids, texts, strict=True)]
        return {"packed": pack_sequence(sequences, enforce_sorted=False)}


class PackedLSTM(nn.Module):
    """Two layers with dropout between them; the head reads the mean of the states."""

    def __init__(self, buckets: int = 20_000, num_classes: int = 2, width: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=dropout)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, packed: PackedSequence) -> Tensor:
        embedded = packed._replace(data=self.embedding(packed.data))
        states, lengths = nn.utils.rnn.pad_packed_sequence(self.lstm(embedded)[0])
        return self.head(states.sum(0) / lengths.unsqueeze(-1).to(states))
