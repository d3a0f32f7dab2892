"""Both terms and their gradient in one pass over the logits, or over hidden states without storing the logits."""

from lightning_rdrop._fused.compiled import compiled_loss
from lightning_rdrop._fused.function import fused, without_autocast
from lightning_rdrop._fused.traced import traced

__all__ = ["compiled_loss", "fused", "traced", "without_autocast"]
