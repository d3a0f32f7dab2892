"""What would make a training silently wrong: looked for on its first batch, and wherever a log is due."""

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
