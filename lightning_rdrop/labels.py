"""The arguments of cross-entropy other than logits and target: classes, and which rows count for how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop import _compat, arguments
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.terms import Average


@dataclass(frozen=True)
class Labels:
    """The arguments of ``F.cross_entropy`` other than logits and target.

    Args:
        ignore_index: rows with this target do not count; nor do rows of class probabilities that are all 0 or all
            ``ignore_index``.
        label_smoothing: in [0, 1).
        weight: shape (C,), one weight per class.

    Raises:
        TypeError: a weight that is not a tensor.
        ValueError: a label smoothing out of range, or a weight that requires a gradient.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        if self.weight is not None and arguments.tensor("The class weight", self.weight).requires_grad:
            raise ValueError("The class weight requires a gradient, which cross-entropy does not compute: detach() it.")

    def check(self, classes: int) -> None:
        """Check that there is one class weight per class.

        Raises:
            ValueError: there are more or fewer.
        """
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"The class weight must have the shape ({classes},), got {tuple(self.weight.shape)}.")

    def counted(self, target: Tensor) -> Tensor:
        """Mask (N, ...) of the rows that count, for class indices (N, ...) or class probabilities (N, C, ...).

        A row of probabilities that are all 0 or all ``ignore_index`` does not count.
        """
        if not target.is_floating_point():
            return target != self.ignore_index
        return ~((target == 0).all(1) | equals(target, self.ignore_index).all(1))

    def average(self, logits: Tensor, target: Tensor, counted: Tensor) -> Average:
        """The cross-entropy of logits (N, C, ...), 0 in rows that do not count, to indices or probabilities.

        Example:
            >>> labels, target = Labels(), torch.tensor([0, -100])
            >>> counted = labels.counted(target)
            >>> labels.average(blank_rows(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), counted), target, counted)  # ln 2
            Average(total=tensor(0.6931), weight=tensor(1.))
        """
        logits = at_least_float32(logits)
        weight = None if self.weight is None else moved(self.weight, logits.device, logits.dtype)
        probabilities = target.is_floating_point()
        values = F.cross_entropy(
            logits,
            target.to(logits) if probabilities else target.where(counted, self.ignore_index),
            weight=weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if probabilities or weight is None:  # with probabilities, F.cross_entropy divides by the number of rows
            return Average.of(values, counted)
        return Average.over(values, weight[target.where(counted, 0)].where(counted, 0))


def blank_rows(logits: Tensor, counted: Tensor, dim: int = 1) -> Tensor:
    """Set the logits to 0 in rows that do not count, so that no inf or NaN from there reaches a gradient.

    Args:
        logits: shape (N, C, ...).
        counted: shape (N, ...), which rows count.
        dim: the dimension of the classes.
    """
    if _compat.is_readable(counted) and counted.all():
        return logits
    return logits.masked_fill(~counted.unsqueeze(dim), 0)


class RowWeights(NamedTuple):
    """The weight of each row in each term; None is 1.

    Args:
        ce: shape (N,), or None.
        kl: shape (N,), or None.
        everywhere: whether kl covers all rows, whatever their target is.
    """

    ce: Tensor | None = None
    kl: Tensor | None = None
    everywhere: bool = False

    @property
    def given(self) -> bool:
        """Whether rows may have other weights than 1, or count in one term only."""
        return self.everywhere or self.ce is not None or self.kl is not None

    @property
    def learned(self) -> bool:
        """Whether a weight requires a gradient."""
        return any(weight is not None and weight.requires_grad for weight in (self.ce, self.kl))


UNIT_WEIGHTS = RowWeights()
"""Weight 1 in both terms for every row that counts."""


def equals(target: Tensor, value: float) -> Tensor:
    """Mask of the targets that are this value, rounded as data in float32 and a cast to the target's dtype round it.

    ``precision="bf16-true"`` makes -1000 of -999, and ``"64-true"`` keeps the rounding of float32. NaN matches NaN.

    Example:
        >>> equals(torch.tensor([-999.0, 1.0]).bfloat16(), -999.0)
        tensor([ True, False])
    """
    if math.isnan(value):
        return target.isnan()
    rounded = torch.tensor(value, dtype=torch.float32, device="cpu")  # a scalar there is compared without a copy
    if target.is_floating_point():
        rounded = rounded.to(target.dtype)
    return (target == rounded) | (target == float(value))  # an int would wrap around: -1 to 255 in uint8


def moved(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move class weights to the device of a prediction without waiting for it; ``FSDPStrategy`` leaves them on the CPU.

    A copy in the other direction has to be waited for, or the CPU would read it too early.

    Example:
        >>> moved(torch.tensor([1, 2]), torch.device("cpu"), torch.float64)
        tensor([1., 2.], dtype=torch.float64)
    """
    return weight.to(device, dtype, non_blocking=weight.is_cpu)
