"""The guard: find what would make training silently wrong, on the first batch and whenever the Trainer logs."""

from lightning_rdrop.guard.agreement import diagnose, same
from lightning_rdrop.guard.explanation import explain, explain_dead, explain_negligible
from lightning_rdrop.guard.guard import Guard, Redraw
from lightning_rdrop.guard.nan_watch import NanWatch
from lightning_rdrop.guard.switches import Switches

__all__ = [
    "Guard",
    "NanWatch",
    "Redraw",
    "Switches",
    "diagnose",
    "explain",
    "explain_dead",
    "explain_negligible",
    "same",
]
