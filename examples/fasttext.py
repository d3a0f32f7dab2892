"""A small text classifier to train from scratch."""

from torch import Tensor, nn


class FastText(nn.Module):
    """Mean embedding of the n-grams (Joulin et al. 2016, arXiv 1607.01759), then a hidden layer with dropout.

    Args:
        buckets: number of n-gram embeddings; 0 is padding.
        num_classes: C of the logits (N, C).
        width: of the embeddings and of the hidden layer.
        dropout: probability, before and after the hidden layer.
    """

    def __init__(self, buckets: int = 20_000, num_classes: int = 2, width: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(buckets, width, mode="mean", padding_idx=0)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, num_classes)
        )
        nn.init.normal_(self.embedding.weight, std=0.5)  # the mean of 100 has a tenth of this std

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))
