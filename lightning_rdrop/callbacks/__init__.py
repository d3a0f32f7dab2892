"""Callbacks that change or observe R-Drop during training."""

from lightning_rdrop.callbacks.adaptive_alpha import AdaptiveAlpha
from lightning_rdrop.callbacks.alpha_scheduler import AlphaScheduler
from lightning_rdrop.callbacks.consistency_monitor import ConsistencyMonitor
from lightning_rdrop.callbacks.curves import Curves
from lightning_rdrop.callbacks.dropout_probability import DropoutProbability
from lightning_rdrop.callbacks.exact_accumulation import ExactAccumulation
from lightning_rdrop.callbacks.unlabeled_weight_scheduler import UnlabeledWeightScheduler

__all__ = [
    "AdaptiveAlpha",
    "AlphaScheduler",
    "ConsistencyMonitor",
    "Curves",
    "DropoutProbability",
    "ExactAccumulation",
    "UnlabeledWeightScheduler",
]
