"""Duplicate a batch in the middle of a forward pass, so that everything before the first dropout runs once."""

from lightning_rdrop.late_duplication.duplicate_at import Split
from lightning_rdrop.late_duplication.find_split import LateDuplication, find_split

__all__ = ["LateDuplication", "Split", "find_split"]
