"""Compare variants of a config over several seeds, each run a separate `fit`, in a table with intervals."""

from lightning_rdrop.compare.command import compare

__all__ = ["compare"]
