"""Several variants of a config over several seeds, each a `fit` of its own, and a table with intervals."""

from lightning_rdrop.compare.command import compare

__all__ = ["compare"]
