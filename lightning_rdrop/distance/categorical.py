"""One of C classes: cross-entropy and symmetric KL."""

from __future__ import annotations

from torch import Tensor

from lightning_rdrop import views
from lightning_rdrop.cross_entropy import Head, checked_terms
from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import one_tensor
from lightning_rdrop.divergence import kl, symmetric_kl
from lightning_rdrop.labels import Labels
from lightning_rdrop.terms import Average, Terms


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

    measures = (*Distance.measures, "divergence")
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
        labels = Labels(ignore_index, label_smoothing, weight)
        self.class_dim = class_dim
        self.ignore_index = labels.ignore_index
        self.label_smoothing = labels.label_smoothing
        self.register_buffer("weight", labels.weight, persistent=False)

    @property
    def labels(self) -> Labels:
        """What the cross-entropy is told."""
        return Labels(self.ignore_index, self.label_smoothing, self.weight)

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        if not self.counts_indices(prediction, target):
            target = target.movedim(self.class_dim, 1)
        return self.labels.average(prediction.movedim(self.class_dim, 1), target)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self._counted(self.divergence(first, second), first, target)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self._counted(kl(first, second, self.class_dim), first, target)

    def check(self, prediction: Tensor, target: Tensor) -> None:
        if self.counts_indices(prediction, target):
            classes = prediction.shape[self.class_dim]
            wrong = target[(target != self.ignore_index) & ((target < 0) | (target >= classes))]
            if len(wrong):
                raise ValueError(
                    f"The target holds the class {int(wrong[0])}, and the prediction has the {classes} classes 0 to "
                    f"{classes - 1}. Give the head more classes, or mark rows that do not count with "
                    f"ignore_index={self.ignore_index}."
                )

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """What :meth:`between` sums: a divergence for each row, (N, ...)."""
        return symmetric_kl(first, second, self.class_dim)

    def terms(self, predictions: Tensor, target: Tensor, alpha: float | Tensor, head: Head | None = None) -> Terms:
        """The same loss, its gradient made on the way forward; with a ``head``, the logits are never held."""
        if head is not None:
            if self.class_dim != -1:
                raise TypeError(
                    f"A fused head needs the distance Categorical(class_dim=-1), got class_dim={self.class_dim}."
                )
            if not self.counts_indices(head.like_logits(predictions[0]), target):
                raise ValueError("A fused head takes class indices: probabilities would be as large as the logits.")
            return checked_terms(predictions.flatten(1, -2), head, target.flatten(), alpha, self.labels)
        first = views.view(predictions, 0)
        indices = self.counts_indices(first, target)
        dim = self.class_dim
        logits = predictions.movedim(dim if dim < 0 else dim + 1, -1).flatten(1, -2)
        flat = target.flatten() if indices else target.movedim(dim, -1).flatten(0, -2)
        terms = checked_terms(logits, None, flat, alpha, self.labels)
        terms.prediction = first
        return terms

    def _counted(self, rows: Tensor, prediction: Tensor, target: Tensor | None) -> Average:
        if target is None or not self.counts_indices(prediction, target):
            return Average.of(rows)
        counted = target != self.ignore_index
        return Average(rows.where(counted, 0).sum(), counted.sum().to(rows))

    def counts_indices(self, prediction: Tensor, target: Tensor) -> bool:
        """Whether the target holds class indices rather than probabilities, after a look at both shapes."""
        one_tensor(self, prediction)
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
