"""Multi-label classification: binary cross-entropy and the KL of Bernoulli distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop import arguments
from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import blank, counted_between, same_shape
from lightning_rdrop.divergence import at_least_float32, kl, symmetric_bernoulli_kl
from lightning_rdrop.labels import moved
from lightning_rdrop.terms import Average

_RESHAPING = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Select",
    "Slice",
    "Split",
    "Unbind",
    "Stack",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Permute",
    "ToCopy",
    "Clone",
)
"""Name prefixes of autograd nodes that do not change values."""


class Bernoulli(Distance):
    r"""Multi-label classification: binary cross-entropy, and the full symmetric KL, including the (1 - p) part.

    .. math::
        D(y, f) = -y \log p - (1 - y) \log (1 - p), \qquad
        D(f', f) = p' \log \frac{p'}{p} + (1 - p') \log \frac{1 - p'}{1 - p}

    Both terms are means over rows and labels; p is the sigmoid of the logits.

    Args:
        pos_weight: shape (L,), tensor or list: the weight of the positive class of each label, in the cross-entropy
            only. It moves with the module, but is neither cast to half precision nor part of the state dict.
        ignore_value: labels with this value, such as -1 or NaN, are unknown and ignored in both terms.

    Shapes:
        prediction (N, ..., L) logits; target (N, ..., L), 0, 1 or a probability.

    Raises:
        ValueError: shapes that do not match, a negative ``pos_weight``, or an ``ignore_value`` that is a probability.

    Example:
        >>> from torch import tensor
        >>> distance = Bernoulli()
        >>> distance.to_target(tensor([[0.0, 3.0]]), tensor([[1, 1]])).mean  # (ln 2 + ln(1 + exp(-3))) / 2
        tensor(0.3709)
        >>> distance.between(tensor([[0.0]]), tensor([[3.0]]).log()).mean  # p = 1/2 and 3/4: ln 3 / 8
        tensor(0.1373)
        >>> Bernoulli(ignore_value=-1).to_target(tensor([[0.0, 3.0]]), tensor([[1, -1]])).mean  # ln 2
        tensor(0.6931)
    """

    term_names = ("bce", "kl")

    def __init__(
        self, *, pos_weight: Tensor | Sequence[float] | None = None, ignore_value: float | None = None
    ) -> None:
        super().__init__()
        if ignore_value is not None and 0 <= ignore_value <= 1:
            raise ValueError(
                f"ignore_value must lie outside [0, 1], the range of labels, for example -1, got {ignore_value}."
            )
        self.ignore_value = ignore_value
        weight = arguments.weights("pos_weight", pos_weight)
        if weight is not None and not (weight >= 0).all():
            raise ValueError(f"pos_weight must not be negative or NaN, got {weight.tolist()}.")
        self.pos_weight = weight

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        logits, labels = same_shape(self, prediction, target)
        counted = self.counted(prediction, target)
        logits, labels = blank(counted, logits, labels)
        weight = self._weight(logits)
        elements = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="none")
        return Average.of(elements, counted)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        counted = counted_between(self, first, target)
        return Average.of(symmetric_bernoulli_kl(*blank(counted, first, second)), counted)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        counted = counted_between(self, first, target)
        p, q = map(self.log_probabilities, blank(counted, first, second))
        return Average.of(kl(p, q), counted)

    def log_probabilities(self, prediction: Tensor) -> Tensor:
        """Log-probabilities of 0 and 1 for each label, (N, ..., L, 2)."""
        logits = at_least_float32(prediction)
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)

    def target_class(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (same_shape(self, prediction, target)[1] > 0.5).long()

    def model_average(self, predictions: Tensor) -> Tensor:
        """The logits of the mean probabilities."""
        log_zero, log_one = self.log_probabilities(predictions).logsumexp(0).unbind(-1)
        return log_one - log_zero

    def expectation(self, prediction: Tensor) -> Tensor:
        return at_least_float32(prediction).sigmoid()

    def invalid_mask(self, prediction: Tensor, target: Tensor) -> Tensor:
        wrong = ~((target >= 0) & (target <= 1))
        counted = self.counted(prediction, target)
        return wrong if counted is None else wrong & counted

    def check(self, prediction: Tensor, target: Tensor) -> None:
        same_shape(self, prediction, target)
        self._weight(prediction)
        if len(wrong := target[self.invalid_mask(prediction, target)]):
            raise ValueError(
                f"The target contains {float(wrong[0])}; a label of Bernoulli is 0, 1 or a probability. Ignore unknown "
                f"labels with Bernoulli(ignore_value=...)."
            )

    def prediction_warning(self, prediction: Tensor) -> str | None:
        """Recognize a sigmoid by its autograd node, since logits may also lie between 0 and 1."""
        node = prediction.grad_fn
        while node is not None and node.name().startswith(_RESHAPING):
            node = node.next_functions[0][0]
        if node is None or not node.name().startswith("Sigmoid"):
            return None
        return (
            "The prediction is the output of a sigmoid, but Bernoulli takes logits and applies the sigmoid itself. "
            "Return the logits from forward, or override rdrop_predict."
        )

    def _weight(self, prediction: Tensor) -> Tensor | None:
        weight = self.pos_weight
        if weight is None:
            return None
        labels = prediction.shape[1:]
        fits = weight.dim() <= len(labels) and all(
            size in (1, expected) for size, expected in zip(reversed(weight.shape), reversed(labels), strict=False)
        )
        if not fits and weight.numel() > 1:
            raise ValueError(
                f"pos_weight must have the shape {tuple(labels)}, one weight per label, got {tuple(weight.shape)} for "
                f"a prediction of shape {tuple(prediction.shape)}."
            )
        return moved(weight, prediction.device, prediction.dtype)
