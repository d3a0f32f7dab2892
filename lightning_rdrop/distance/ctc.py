"""Unaligned token sequences: connectionist temporal classification, and the KL of its frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop.arguments import whole
from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import softmaxed
from lightning_rdrop.divergence import kl, log_probabilities, symmetric_kl
from lightning_rdrop.labels import blank_rows
from lightning_rdrop.terms import Average


class CTC(Distance):
    r"""Unaligned token sequences, as in speech recognition: the CTC loss, and the KL of the frames.

    .. math::
        D(y, f) = -\frac{1}{|y|} \log \sum_{\pi \to y} \prod_{t \le T} p_f(\pi_t \mid t), \qquad
        D(f', f) = \operatorname*{mean}_{t \le T} KL(p_{f'}(\cdot \mid t) \| p_f(\cdot \mid t))

    where :math:`\pi` runs over the alignments of the tokens y with the T frames of an example. ce is the mean of the
    first over the examples, as ``F.ctc_loss(..., reduction="mean")``, in nats per token; kl is the mean over the
    frames of all examples, without padding.

    The consistency is that of CR-CTC: frame by frame, with the blank as a class like any other. It differs in two
    points, to follow the conventions of this package. It is a mean over frames instead of a sum over the frames of an
    utterance: with u frames per token, alpha is 2u times the paper's, 0.4u for its 0.2. And the gradient flows through
    both predictions, not only through the one that is not the target; the value is the same. Augmentation that makes
    the views differ, such as SpecAugment with more time masking than usual, belongs to the data.

    Args:
        blank: class index of the blank.
        ignore_index: padding value of tokens that come without lengths.
        zero_infinity: whether an example without an alignment, because it has more tokens (plus one between two equal
            ones) than frames, counts with a loss of 0, as in ``F.ctc_loss``, instead of raising an error.

    Shapes:
        prediction a pair of logits (N, T, C) and integer lengths (N,); or logits alone, all of whose frames count.
        target a pair of tokens (N, S) and lengths (N,); or tokens alone, padded at the end with ``ignore_index``.

    Raises:
        TypeError: lengths that are not integers, since half precision would round them.
        ValueError: shapes that do not match; on the first batch also a token that is not a class or is the blank,
            lengths beyond the tensor, or an example without an alignment.

    Source: Graves et al. 2006; the consistency of Yao et al. 2024, CR-CTC, arXiv 2410.05101.

    Example:
        >>> from torch import tensor
        >>> half = (torch.zeros(1, 2, 2), tensor([2]))  # two frames of blank or a, each with probability 1/2
        >>> CTC().to_target(half, (tensor([[1]]), tensor([1]))).mean  # aa, a_ and _a: -ln 3/4
        tensor(0.2877)
        >>> other = (tensor([[[0.5, 0.5], [0.75, 0.25]]]).log(), tensor([2]))
        >>> CTC().between(half, other).mean  # 0 and ln 3 / 8
        tensor(0.0687)
    """

    term_names = ("ctc", "kl")

    def __init__(self, blank: int = 0, *, ignore_index: int = -100, zero_infinity: bool = False) -> None:
        super().__init__()
        self.blank = whole("blank", blank, 0, ", the index of a class")
        self.ignore_index = ignore_index
        self.zero_infinity = zero_infinity

    def to_target(self, prediction: Any, target: Any) -> Average:
        logits, frames = self._logits(prediction)
        tokens, lengths = self._tokens(target, len(logits))
        log_probs = log_probabilities(blank_rows(logits, _within(frames, logits.shape[1]), -1))
        losses = F.ctc_loss(
            log_probs.transpose(0, 1),
            tokens.where(_within(lengths, tokens.shape[1]), 0),
            frames,
            lengths,
            blank=self.blank,
            reduction="none",
            zero_infinity=self.zero_infinity,
        )
        return Average.of(losses / lengths.clamp(min=1))

    def between(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._over_frames(symmetric_kl, first, second)

    def directed(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._over_frames(kl, first, second)

    def invalid_mask(self, prediction: Any, target: Any) -> Tensor:
        """Mask (N,) of the invalid examples."""
        return torch.stack([wrong for wrong, _ in self._faults(prediction, target)]).any(0)

    def check(self, prediction: Any, target: Any) -> None:
        for wrong, what in self._faults(prediction, target):
            if wrong.any():
                raise ValueError(f"Example {int(wrong.nonzero()[0])} of the batch {what}")

    def prediction_warning(self, prediction: Any) -> str | None:
        return softmaxed(self, self._logits(prediction)[0], -1)

    def _faults(self, prediction: Any, target: Any) -> list[tuple[Tensor, str]]:
        """Each possible fault, as a mask (N,) of the examples that have it and its description."""
        logits, frames = self._logits(prediction)
        tokens, lengths = self._tokens(target, len(logits))
        most, classes = logits.shape[1:]
        within = _within(lengths, tokens.shape[1])
        no_token = (tokens < 0) | (tokens >= classes) | (tokens == self.blank)
        repeated = (tokens[:, 1:] == tokens[:, :-1]) & within[:, 1:]
        needed = lengths + repeated.sum(1)
        faults = [
            ((frames < 0) | (frames > most), f"has a length outside 0 to {most}, the number of frames in the logits."),
            (
                (lengths < 0) | (lengths > tokens.shape[1]),
                f"has a target length outside 0 to {tokens.shape[1]}, the number of tokens in the target.",
            ),
            (
                (no_token & within).any(1),
                f"has a target token that is the blank, {self.blank}, or not one of the {classes} classes, 0 to "
                f"{classes - 1}. Put padding after the tokens, as {self.ignore_index} or beyond the lengths.",
            ),
        ]
        if not self.zero_infinity:
            what = (
                "has more tokens than frames, counting one more between two equal tokens: no alignment exists, and the "
                "loss is infinite. Remove such examples, downsample less in the network, or count them with a loss of "
                "0: CTC(zero_infinity=True)."
            )
            faults.append((needed > frames, what))
        return faults

    def _over_frames(self, measure: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Average:
        (logits, frames), (others, other_frames) = self._logits(first), self._logits(second)
        counted = _within(torch.minimum(frames, other_frames), logits.shape[1])
        return Average.of(measure(blank_rows(logits, counted, -1), blank_rows(others, counted, -1)), counted)

    def _logits(self, prediction: Any) -> tuple[Tensor, Tensor]:
        """Logits (N, T, C), and the number of frames of each example, (N,)."""
        logits, lengths = _pair("prediction", prediction)
        if logits.dim() != 3 or not logits.is_floating_point() or logits.shape[2] <= max(1, self.blank):
            raise ValueError(
                f"CTC takes logits (N, T, C), floats with at least 2 classes, including the blank, {self.blank}, got "
                f"{tuple(logits.shape)}, {logits.dtype}."
            )
        if lengths is None:
            lengths = torch.full(logits.shape[:1], logits.shape[1], device=logits.device)
        return logits, _checked("prediction", lengths, len(logits))

    def _tokens(self, target: Any, examples: int) -> tuple[Tensor, Tensor]:
        """Tokens (N, S), and the number of tokens of each example, (N,)."""
        tokens, lengths = _pair("target", target)
        if tokens.dim() != 2 or len(tokens) != examples or tokens.is_floating_point():
            raise ValueError(
                f"CTC takes tokens (N, S), integers, for the {examples} examples of the prediction, got "
                f"{tuple(tokens.shape)}, {tokens.dtype}."
            )
        if lengths is None:
            lengths = (tokens != self.ignore_index).sum(1)
        return tokens.long(), _checked("target", lengths, examples)


def _pair(name: str, value: Any) -> tuple[Tensor, Any]:
    """A tensor, and its lengths or None."""
    tensor, lengths = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, None)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"The {name} is a {type(value).__name__}, but CTC takes a tensor, or a pair of a tensor and its lengths: "
            f"return it from {'rdrop_predict' if name == 'prediction' else 'rdrop_unpack'}."
        )
    return tensor, lengths


def _checked(name: str, lengths: Any, examples: int) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"The lengths of the {name} must be a tensor of integers (N,), got {found}.")
    if lengths.shape != (examples,):
        raise ValueError(
            f"The lengths of the {name} must have the shape (N,) = ({examples},), got {tuple(lengths.shape)}."
        )
    return lengths.long()


def _within(lengths: Tensor, most: int) -> Tensor:
    """Mask (N, most) of the positions within the lengths."""
    return torch.arange(most, device=lengths.device) < lengths.unsqueeze(1)
