"""Plot the results of several variants by seed, and their differences to one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def paired_differences(
    values: dict[str, list[float]],
    intervals: dict[str, tuple[float, float]],
    metric: str,
    reference: str,
) -> Figure:
    """Plot the results of each variant by seed, and the paired differences to the reference.

    Args:
        values: the results of the seeds, by variant.
        intervals: the mean of the paired differences and half the width of its interval, by variant; the latter may be
            NaN.
        metric: name of the metric.
        reference: name of the variant that the others are compared with.
    """
    from matplotlib.figure import Figure  # optional dependency

    figure = Figure(figsize=(9, 1.2 + 0.35 * len(values)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for height, (name, points) in enumerate(values.items()):
        left.plot(points, [height] * len(points), "o", color="tab:blue", alpha=0.35, markersize=4)
        left.plot(sum(points) / len(points), height, "|", color="black", markersize=14)
        if name in intervals:
            center, margin = intervals[name]
            color = "tab:blue" if abs(center) > margin else "tab:gray"  # gray if not significant
            right.errorbar(center, height, xerr=margin, fmt="o", color=color, capsize=3)
    right.axvline(0, color="black", linewidth=0.8)
    left.set(title=f"{metric}, each seed and the mean", yticks=range(len(values)), yticklabels=values)
    left.invert_yaxis()
    right.set(title=f"difference to {reference}, 95% interval")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
        axes.locator_params(axis="x", nbins=5)  # more numbers would overlap
    return figure
