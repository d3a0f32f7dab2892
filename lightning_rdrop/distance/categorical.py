"""Classification: cross-entropy and symmetric KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_rdrop import arguments, views
from lightning_rdrop.cross_entropy import Head, checked_terms
from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import ROUNDING, one_tensor, softmaxed
from lightning_rdrop.divergence import kl, log_probabilities, symmetric_kl
from lightning_rdrop.labels import Labels, RowWeights, blank_rows
from lightning_rdrop.terms import Average, Terms, fitted


class Categorical(Distance):
    r"""Classification: cross-entropy to the target, symmetric KL between two predictions.

    .. math::
        D(y, f) = -\log p_f(y), \qquad D(f', f) = KL(p_{f'} \| p_f)

    Args:
        class_dim: the dimension of the C classes in the prediction of one view, (N, ..., C) by default; 1 for images
            (N, C, H, W). It is never inferred.
        ignore_index: rows with this target are ignored in both terms; so are rows of class probabilities that are all
            0 or all ``ignore_index``.
        label_smoothing: in [0, 1), in the cross-entropy only.
        weight: shape (C,), tensor or list: one weight per class, in the cross-entropy only. It moves with the module,
            but is neither cast to half precision nor part of the state dict.

    Shapes:
        prediction (N, ..., C) logits; target (N, ...) of class indices, or (N, ..., C) of class probabilities.

    Raises:
        ValueError: fewer than two classes, shapes that do not match, an argument out of range.

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

    def __init__(
        self,
        *,
        class_dim: int = -1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        weight: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        labels = Labels(ignore_index, label_smoothing, arguments.weights("weight", weight))
        self.class_dim = class_dim
        self.ignore_index = labels.ignore_index
        self.label_smoothing = labels.label_smoothing
        self.weight = labels.weight

    @property
    def labels(self) -> Labels:
        """The arguments of the cross-entropy."""
        return Labels(self.ignore_index, self.label_smoothing, self.weight)

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        counted = self.counted(prediction, target)
        target = self._classes_first(self.checked(prediction, target))
        logits = blank_rows(prediction.movedim(self.class_dim, 1), counted)
        return self.labels.average(logits, target, counted)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self._over_rows(self.divergence, first, second, target)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self._over_rows(partial(kl, dim=self.class_dim), first, second, target)

    def counted(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.labels.counted(self._classes_first(self.checked(prediction, target)))

    def log_probabilities(self, prediction: Tensor) -> Tensor:
        return log_probabilities(prediction.movedim(self.class_dim, -1))

    def target_class(self, prediction: Tensor, target: Tensor) -> Tensor:
        target = self.checked(prediction, target)
        return target.argmax(self.class_dim) if target.is_floating_point() else target

    def model_average(self, predictions: Tensor) -> Tensor:
        """The logarithms of the mean probabilities."""
        dim = self.class_dim if self.class_dim < 0 else self.class_dim + 1
        return log_probabilities(predictions, dim).logsumexp(0) - math.log(len(predictions))

    def expectation(self, prediction: Tensor) -> Tensor:
        return log_probabilities(prediction, self.class_dim).exp()

    def invalid_mask(self, prediction: Tensor, target: Tensor) -> Tensor:
        counted = self.counted(prediction, target)
        target = self._classes_first(self.checked(prediction, target))
        if target.is_floating_point():
            sums = target.sum(1, dtype=torch.promote_types(target.dtype, torch.float32))
            wrong = (target < 0).any(1) | ~((sums - 1).abs() <= ROUNDING)
        else:
            wrong = (target < 0) | (target >= prediction.shape[self.class_dim])
        return wrong & counted

    def check(self, prediction: Tensor, target: Tensor) -> None:
        wrong = self.invalid_mask(prediction, target)
        if not wrong.any():
            return
        if target.is_floating_point():
            row = target.movedim(self.class_dim, -1)[wrong][0]
            raise ValueError(
                f"A row of the target contains {row.tolist()[:10]}, which are not probabilities: they must be >= 0 and "
                f"sum to 1, got the sum {float(row.sum()):.4g}. For multi-label targets use the Bernoulli distance. To "
                f"ignore a row, set it to all 0 or all {self.ignore_index}."
            )
        classes = prediction.shape[self.class_dim]
        raise ValueError(
            f"The target contains the class {int(target[wrong][0])}, but the prediction has {classes} classes, 0 to "
            f"{classes - 1}. Give the head more classes, or mark rows to ignore with "
            f"ignore_index={self.ignore_index}."
        )

    def prediction_warning(self, prediction: Tensor) -> str | None:
        return softmaxed(self, prediction, self.class_dim)

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """The divergence of each row, (N, ...), summed by :meth:`between`."""
        return symmetric_kl(first, second, self.class_dim)

    def weighted_terms(
        self, predictions: Tensor, target: Tensor, alpha: float | Tensor, head: Head | None, weights: RowWeights
    ) -> Terms:
        """Same loss, with its gradient computed in the forward pass; a ``head`` never stores the full logits."""
        if head is not None:
            if self.class_dim != -1:
                raise TypeError(
                    f"A fused head needs the distance Categorical(class_dim=-1), got class_dim={self.class_dim}."
                )
            target = self.checked(head.like_logits(predictions[0]), target)
            if target.is_floating_point():
                raise ValueError(
                    "A fused head takes class indices: class probabilities would be as large as the logits."
                )
            weights = _flat(weights, target.shape)
            return checked_terms(predictions.flatten(1, -2), head, target.flatten(), alpha, self.labels, weights)
        first = views.view(predictions, 0)
        target = self.checked(first, target)
        dim = self.class_dim
        logits = predictions.movedim(dim if dim < 0 else dim + 1, -1).flatten(1, -2)
        if target.is_floating_point():
            target = target.movedim(dim, -1)
            weights, target = _flat(weights, target.shape[:-1]), target.flatten(0, -2)
        else:
            weights, target = _flat(weights, target.shape), target.flatten()
        terms = checked_terms(logits, None, target, alpha, self.labels, weights)
        terms.prediction = first
        return terms

    def checked(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Check the target and return it, with class indices as int64 to avoid overflow in comparisons.

        Args:
            prediction: shape (N, ..., C), or with the classes in ``class_dim``.
            target: shape (N, ...) of class indices, or the shape of the prediction with class probabilities.

        Raises:
            TypeError: the prediction or the target is not a tensor.
            ValueError: the shapes do not match, or there are fewer than two classes.
        """
        one_tensor(self, prediction)
        arguments.tensor("target", target)
        shape = list(prediction.shape)
        if not 1 <= (self.class_dim if self.class_dim >= 0 else self.class_dim + len(shape)) < len(shape):
            raise ValueError(
                f"class_dim={self.class_dim} cannot be the class dimension of a prediction of shape {tuple(shape)}, "
                "whose dimension 0 is the batch. Pass Categorical(class_dim=...), or omit class_dim to use the last "
                "dimension." + (" For regression pass rdrop_distance=Gaussian()." if prediction.dim() == 1 else "")
            )
        classes = shape.pop(self.class_dim)
        if classes < 2:
            raise ValueError(
                f"Categorical needs at least 2 classes, but dimension class_dim={self.class_dim} of the prediction "
                f"{tuple(prediction.shape)} has {classes}: with one class the loss is always 0. For binary "
                "classification with a single logit use the Bernoulli distance, for regression Gaussian. If the "
                "classes are in another dimension, pass Categorical(class_dim=...)."
            )
        if target.shape == prediction.shape and target.is_floating_point():
            return target
        if list(target.shape) == shape and not (target.is_floating_point() or target.is_complex()):
            return target.long()
        raise ValueError(
            f"Categorical got a prediction of shape {tuple(prediction.shape)} (classes in dimension "
            f"{self.class_dim}) and a target of shape {tuple(target.shape)}, {target.dtype}. It takes class indices "
            f"(integers) of shape {tuple(shape)}, or class probabilities (floats) of the prediction's shape; nothing "
            "broadcasts here."
        )

    def _classes_first(self, target: Tensor) -> Tensor:
        """Move the classes of probabilities to dimension 1, where torch expects them."""
        return target.movedim(self.class_dim, 1) if target.is_floating_point() else target

    def _over_rows(
        self, measure: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, target: Tensor | None
    ) -> Average:
        if target is None:
            return Average.of(measure(first, second))
        counted = self.counted(first, target)
        first, second = (blank_rows(view, counted, self.class_dim) for view in (first, second))
        return Average.of(measure(first, second), counted)


def _flat(weights: RowWeights, shape: torch.Size) -> RowWeights:
    """Expand the weights to one per row and flatten them."""
    ce, kl = (
        None if weight is None else fitted(weight, shape).expand(shape).flatten() for weight in (weights.ce, weights.kl)
    )
    return weights._replace(ce=ce, kl=kl)
