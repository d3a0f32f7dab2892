"""D of the general form: what measures a prediction against a target, and two predictions against each other."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rdrop.divergence import at_least_float32, symmetric_kl
from lightning_rdrop.terms import Average


class Distance(nn.Module):
    r"""A measure D of a prediction f against a target y, and of two predictions against each other.

    R-Drop for any task: :math:`\text{mean } D(y, f) + \alpha \cdot \tfrac12 \text{ mean } \tfrac12 [D(f_2, f_1) +
    D(f_1, f_2)]`. A subclass says what the two measures are; :class:`~lightning_rdrop.RDropLoss` takes the means and
    is the only place that halves.

    Source: Su Jianlin, spaces.ac.cn/archives/8496.
    """

    term_names: ClassVar[tuple[str, str]] = ("ce", "kl")
    """The names under which the two terms are logged."""

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        """D(target, prediction), summed over the rows that count, with their weight.

        Args:
            prediction: shape (N, ...).
            target: shape (N, ...).
        """
        raise NotImplementedError

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        """1/2 [D(second, first) + D(first, second)], summed over the rows that count, with their number.

        Args:
            first: shape (N, ...), the prediction of one view.
            second: same shape, that of another.
            target: tells which rows count; without it all do.
        """
        raise NotImplementedError


class Categorical(Distance):
    r"""One of C classes: cross-entropy to the target, symmetric KL between two predictions.

    .. math::
        D(y, f) = -\log p_f(y), \qquad D(f', f) = KL(p_{f'} \| p_f)

    Args:
        class_dim: the dimension of the C classes in a prediction of one view, (N, ..., C) by default; 1 for images
            (N, C, H, W). It is never guessed.
        ignore_index: a row with this target counts in neither term.
        label_smoothing: in [0, 1), in the cross-entropy only.
        weight: shape (C,), one weight a class, in the cross-entropy only. Kept out of checkpoints, so that they have
            the keys of the same model without R-Drop.

    Shapes:
        prediction (N, ..., C) logits; target (N, ...) of class indices, or (N, ..., C) of class probabilities.

    Raises:
        ValueError: fewer than two classes, shapes that do not match, an argument out of its range.

    Example:
        >>> from torch import tensor
        >>> first, second = tensor([[0.5, 0.2, 0.3]]).log(), tensor([[0.5, 0.3, 0.2]]).log()
        >>> distance = Categorical()
        >>> distance.to_target(first, tensor([0])).mean  # ln 2
        tensor(0.6931)
        >>> distance.between(first, second).mean
        tensor(0.0405)
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        class_dim: int = -1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight, persistent=False)

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        prediction = at_least_float32(prediction)
        indices = self._counts_indices(prediction, target)
        total = F.cross_entropy(
            prediction.movedim(self.class_dim, 1),
            target if indices else target.to(prediction).movedim(self.class_dim, 1),
            weight=None if self.weight is None else self.weight.to(prediction),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        if not indices:  # F.cross_entropy divides a sum over class probabilities by the plain number of rows
            return Average(total, total.new_tensor(target.numel() // target.shape[self.class_dim]))
        counted = target != self.ignore_index
        if self.weight is None:
            return Average(total, counted.sum().to(total))
        return Average(total, self.weight.to(total)[target.where(counted, 0)].where(counted, 0).sum())

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        rows = symmetric_kl(first, second, self.class_dim)
        if target is None or not self._counts_indices(first, target):
            return Average(rows.sum(), rows.new_tensor(rows.numel()))
        counted = target != self.ignore_index
        return Average(rows.where(counted, 0).sum(), counted.sum().to(rows))

    def _counts_indices(self, prediction: Tensor, target: Tensor) -> bool:
        """Whether the target holds class indices rather than probabilities, after a look at both shapes."""
        shape = list(prediction.shape)
        classes = shape.pop(self.class_dim)
        if classes < 2:
            raise ValueError(
                f"Categorical needs at least 2 classes, but dimension class_dim={self.class_dim} of the prediction "
                f"{tuple(prediction.shape)} has {classes}: with one class the loss is always 0. For yes or no from a "
                "single logit use the Bernoulli distance; if the classes lie elsewhere, say Categorical(class_dim=...)."
            )
        if target.shape == prediction.shape and target.is_floating_point():
            return False
        if list(target.shape) == shape and not target.is_floating_point():
            return True
        raise ValueError(
            f"Categorical got a prediction of shape {tuple(prediction.shape)} (classes in dimension "
            f"{self.class_dim}) and a target of shape {tuple(target.shape)}, {target.dtype}. It takes class indices "
            f"(integers) of shape {tuple(shape)}, or class probabilities (floats) of the prediction's shape; nothing "
            "broadcasts here."
        )
