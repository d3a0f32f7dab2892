r"""The shapes of a schedule: pure functions from progress t in [0, 1] to a factor in [0, 1].

Every shape ends at 1. A shape depends only on t, so a resumed run gets the same values.
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
    r""":math:`\exp(-5 (1 - t)^2)`: from 0.0067 to 1 in an S-curve.

    Source: Laine and Aila, Temporal Ensembling, 2017 (arXiv 1610.02242), who ramp up a consistency term with it.

    Example:
        >>> round(sigmoid(0.5), 4)  # exp(-1.25)
        0.2865
    """
    return math.exp(-5.0 * (1.0 - progress) ** 2)


def cosine(progress: float) -> float:
    r""":math:`(1 - \cos \pi t) / 2`: half a cosine wave from 0 to 1.

    Source: Loshchilov and Hutter, SGDR, 2017 (arXiv 1608.03983), reversed.

    Example:
        >>> round(cosine(0.5), 4)
        0.5
    """
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def cyclical(progress: float) -> float:
    r""":math:`\min(1, 2t)`: one cycle, which rises in the first half and stays at 1 in the second.

    :class:`~lightning_rdrop.AlphaScheduler` repeats it.

    Source: Fu et al., Cyclical Annealing Schedule, 2019 (arXiv 1903.10145), with R = 0.5.

    Example:
        >>> cyclical(0.25), cyclical(0.75)
        (0.5, 1.0)
    """
    return min(1.0, 2.0 * progress)


SHAPES: dict[str, Shape] = {shape.__name__: shape for shape in (constant, linear, sigmoid, cosine, cyclical)}
"""The shapes by name."""
