"""Plot a metric over a grid of two settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(
    values: Mapping[tuple[str, ...], float], axes: tuple[str, ...], title: str, chosen: tuple[str, ...] | None = None
) -> Figure:
    """Plot a number for each pair of two settings, such as alpha and dropout.

    Args:
        values: the numbers by pair of settings; missing pairs stay blank.
        axes: the names of the settings: vertical, then horizontal.
        title: describes the numbers.
        chosen: the pair to frame.

    Example:
        >>> figure = heat_map({("1", "0.1"): 0.8, ("4", "0.1"): 0.9}, ("alpha", "p"), "accuracy", ("4", "0.1"))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.8', '0.9']
    """
    from matplotlib.figure import Figure  # optional dependency
    from matplotlib.patches import Rectangle

    upwards, right = ([*dict.fromkeys(pair[axis] for pair in values)] for axis in (0, 1))
    cells = [[values.get((one, other), float("nan")) for other in right] for one in upwards]
    figure = Figure(figsize=(2.5 + 0.8 * len(right), 1.5 + 0.5 * len(upwards)), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(cells, origin="lower", aspect="auto", cmap="viridis")
    middle = sum(image.get_clim()) / 2
    for (one, other), value in values.items():
        x, y = right.index(other), upwards.index(one)
        panel.text(x, y, f"{value:.4g}", ha="center", va="center", color="white" if value < middle else "black")
        if (one, other) == chosen:
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    panel.set(title=title, ylabel=axes[0], xlabel=axes[1])
    panel.set_yticks(range(len(upwards)), upwards)
    panel.set_xticks(range(len(right)), right)
    return figure
