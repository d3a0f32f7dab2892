"""Paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

_ROUNDING = 1e-5
"""Relative rounding error of a value in the table, which has six digits."""


@dataclass(frozen=True)
class Difference:
    """A variant minus the reference, over the same seeds.

    Args:
        mean: of the differences.
        margin: half the width of its 95% interval; NaN for one seed, or if all differences are equal.
        needed: the number of seeds that detects such a difference; None for no difference, or more than a million.
    """

    mean: float
    margin: float
    needed: int | None

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is above or below 0, else 0."""
        return (self.mean > self.margin) - (self.mean < -self.margin)


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    r"""The mean paired difference with its 95% interval by Student's t.

    .. math:: \bar d \pm t_{0.975,\,n-1}\, \frac{s_d}{\sqrt{n}}

    Differences that are equal up to rounding have no interval: a few may agree by chance, and an :math:`s_d` of 0 does
    not say how much the next one would differ.

    Args:
        values, reference: a value for each seed, in the same order.

    Example:
        >>> difference = paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # 2, 3 and 1; t is 4.303
        >>> difference.mean, round(difference.margin, 3)
        (2.0, 2.484)
    """
    from scipy import stats  # an extra

    differences = [value - other for value, other in zip(values, reference, strict=True)]
    seeds, center = len(differences), mean(differences)
    deviation = stdev(differences) if seeds > 1 and all(map(math.isfinite, differences)) else math.nan
    if not deviation > _ROUNDING * max(map(abs, [*values, *reference])):
        return Difference(center, math.nan, None)
    margin = float(stats.t.ppf(0.975, seeds - 1)) * deviation / math.sqrt(seeds)
    return Difference(center, margin, seeds_needed(abs(center) / deviation))


def seeds_needed(effect: float, power: float = 0.8) -> int | None:
    """The number of seeds with which a two-sided paired t-test at 5% detects a difference with this probability.

    Args:
        effect: the difference, in standard deviations of the paired differences.
        power: the probability.

    Returns:
        At least 2; None if there is no effect, or a million seeds are not enough.

    Example:
        >>> seeds_needed(0.5), seeds_needed(1.0), seeds_needed(0.0)  # as in power tables
        (34, 10, None)
    """
    if not effect > 0:
        return None
    few, many = 1, 2
    while _power(effect, many) < power:
        few, many = many, 2 * many
        if many > 1_000_000:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if _power(effect, middle) >= power else (middle, many)
    return many


def _power(effect: float, seeds: int) -> float:
    from scipy import stats  # an extra

    # the other tail is negligible, and NaN in scipy for large effects
    return float(stats.nct.sf(stats.t.ppf(0.975, seeds - 1), seeds - 1, effect * math.sqrt(seeds)))
