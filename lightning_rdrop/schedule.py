r"""How a quantity rises: pure functions from progress in [0, 1] to a factor in [0, 1].

Every shape ends at 1. They are deterministic and know nothing of training, so a resumed run takes the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = Callable[[float], float]


def constant(progress: float) -> float:
    """1 from the start.

    Example:
        >>> constant(0.0)
        1.0
    """
    return 1.0


def linear(progress: float) -> float:
    """t: a straight line from 0 to 1.

    Example:
        >>> linear(0.25)
        0.25
    """
    return progress


def sigmoid(progress: float) -> float:
    r""":math:`\exp(-5 (1 - t)^2)`: from 0.0067 slowly, then quickly, then slowly to 1.

    Source: Laine and Aila, Temporal Ensembling, 2017 (arXiv 1610.02242), where it ramps up a consistency term.

    Example:
        >>> round(sigmoid(0.5), 4)  # exp(-1.25)
        0.2865
    """
    return math.exp(-5.0 * (1.0 - progress) ** 2)


def cosine(progress: float) -> float:
    r""":math:`(1 - \cos \pi t) / 2`: half a wave from 0 to 1.

    Source: Loshchilov and Hutter, SGDR, 2017 (arXiv 1608.03983), read upwards.

    Example:
        >>> round(cosine(0.5), 4)
        0.5
    """
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def cyclical(progress: float) -> float:
    r""":math:`\min(1, 2t)`, one cycle: it rises during the first half and stays at 1 during the second.

    :class:`~lightning_rdrop.AlphaScheduler` starts it anew again and again.

    Source: Fu et al., Cyclical Annealing Schedule, 2019 (arXiv 1903.10145), with R = 0.5.

    Example:
        >>> cyclical(0.25), cyclical(0.75)
        (0.5, 1.0)
    """
    return min(1.0, 2.0 * progress)


SHAPES: dict[str, Shape] = {shape.__name__: shape for shape in (constant, linear, sigmoid, cosine, cyclical)}
"""The shapes by name."""
