"""The weight of unlabelled examples as a function of training progress."""

from __future__ import annotations

from typing import ClassVar

from lightning_rdrop.callbacks.alpha_scheduler import AlphaScheduler


class UnlabeledWeightScheduler(AlphaScheduler):
    """Raises the module's ``rdrop_unlabeled_weight`` from 0 to its peak, as ``AlphaScheduler`` does with alpha.

    Early predictions are poor, and agreement on them is worth little. While the weight is exactly 0, during ``delay``
    and in the first step of a linear ramp, unlabelled examples are not run through the network.

    Args:
        shape, ramp, delay, peak: as for :class:`~lightning_rdrop.AlphaScheduler`; ``peak=None`` is the module's own
            weight.

    Example:
        >>> UnlabeledWeightScheduler("linear", ramp=100, peak=1.0).value_at(50)
        0.5
    """

    attribute: ClassVar[str] = "rdrop_unlabeled_weight"
