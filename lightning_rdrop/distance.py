"""D of the general form: what measures a prediction against a target, and two predictions against each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.nn import functional as F

from lightning_rdrop.cross_entropy import Labels
from lightning_rdrop.divergence import at_least_float32, jensen_shannon, kl, symmetric_bernoulli_kl, symmetric_kl
from lightning_rdrop.terms import Average


class Distance(nn.Module):
    r"""A measure D of a prediction f against a target y, and of two predictions against each other.

    R-Drop for any task: :math:`\text{mean } D(y, f) + \alpha \cdot \tfrac12 \text{ mean } \tfrac12 [D(f_2, f_1) +
    D(f_1, f_2)]`. A subclass says what the two measures are; :class:`~lightning_rdrop.RDropLoss` takes the means and
    is the only place that halves.

    Source: Su Jianlin, spaces.ac.cn/archives/8496.
    """

    term_names: tuple[str, str] = ("ce", "kl")
    """The names under which the two terms are logged."""

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        """D(target, prediction), summed over the rows that count, with their weight.

        Args:
            prediction: shape (N, ...).
            target: shape (N, ...).
        """
        raise NotImplementedError

    def check(self, prediction: Tensor, target: Tensor) -> None:
        """Look at the values of a first batch, which synchronises the device; shapes are looked at in every step.

        Raises:
            ValueError: a value out of its range.
        """

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        """1/2 [D(second, first) + D(first, second)], summed over the rows that count, with their number.

        Args:
            first: shape (N, ...), the prediction of one view.
            second: same shape, that of another.
            target: tells which rows count; without it all do.
        """
        raise NotImplementedError

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        """D(first, second) in this one direction, for what holds ``first`` fixed; as ``between``, unless overridden.

        Args:
            first, second, target: as for :meth:`between`.
        """
        return self.between(first, second, target)


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

    @property
    def labels(self) -> Labels:
        """What counts, and how much."""
        return Labels(self.ignore_index, self.label_smoothing, self.weight)

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        if not self.counts_indices(prediction, target):
            target = target.movedim(self.class_dim, 1)
        return self.labels.average(prediction.movedim(self.class_dim, 1), target)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self._counted(self._divergence(first, second), first, target)

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

    def _divergence(self, first: Tensor, second: Tensor) -> Tensor:
        return symmetric_kl(first, second, self.class_dim)

    def _counted(self, rows: Tensor, prediction: Tensor, target: Tensor | None) -> Average:
        if target is None or not self.counts_indices(prediction, target):
            return _all_count(rows)
        counted = target != self.ignore_index
        return Average(rows.where(counted, 0).sum(), counted.sum().to(rows))

    def counts_indices(self, prediction: Tensor, target: Tensor) -> bool:
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


class JensenShannon(Categorical):
    r"""One of C classes, with the Jensen-Shannon divergence between two predictions: bounded by ln 2.

    .. math:: D(y, f) = -\log p_f(y), \qquad \tfrac12 [D(f', f) + D(f, f')] = JS(p_{f'}, p_f)

    Args:
        class_dim, ignore_index, label_smoothing, weight: as for :class:`Categorical`.

    Example:
        >>> from torch import tensor
        >>> JensenShannon().between(tensor([[0.9, 0.1]]).log(), tensor([[0.1, 0.9]]).log()).mean
        tensor(0.3681)
    """

    term_names = ("ce", "js")

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self.between(first, second, target)

    def _divergence(self, first: Tensor, second: Tensor) -> Tensor:
        return jensen_shannon(first, second, self.class_dim)


class Bernoulli(Distance):
    r"""Several labels, each there or not: binary cross-entropy, and the full symmetric KL, (1 - p) part included.

    .. math::
        D(y, f) = -y \log p - (1 - y) \log (1 - p), \qquad
        D(f', f) = p' \log \frac{p'}{p} + (1 - p') \log \frac{1 - p'}{1 - p}

    Both are means over rows and labels, with p the sigmoid of the logits.

    Args:
        pos_weight: shape (L,), the weight of the positive answers to each label, in the cross-entropy only. Kept out
            of checkpoints.

    Shapes:
        prediction (N, ..., L) logits; target (N, ..., L), 0 or 1 or a probability.

    Example:
        >>> from torch import tensor
        >>> distance = Bernoulli()
        >>> distance.to_target(tensor([[0.0, 3.0]]), tensor([[1, 1]])).mean  # (ln 2 + ln(1 + exp(-3))) / 2
        tensor(0.3709)
        >>> distance.between(tensor([[0.0]]), tensor([[3.0]]).log()).mean  # p = 1/2 and 3/4: ln 3 / 8
        tensor(0.1373)
    """

    term_names = ("bce", "kl")
    pos_weight: Tensor | None

    def __init__(self, *, pos_weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        prediction, target = _alike(self, prediction, target)
        weight = None if self.pos_weight is None else self.pos_weight.to(prediction)
        elements = F.binary_cross_entropy_with_logits(prediction, target, pos_weight=weight, reduction="none")
        return _all_count(elements)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return _all_count(symmetric_bernoulli_kl(first, second))

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        p, q = (torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1) for z in map(at_least_float32, (first, second)))
        return _all_count(kl(p, q))

    def check(self, prediction: Tensor, target: Tensor) -> None:
        if len(wrong := target[~((target >= 0) & (target <= 1))]):
            raise ValueError(f"The target holds {float(wrong[0])}; a label of Bernoulli is 0, 1 or a probability.")


class Gaussian(Distance):
    r"""A number: squared error, or the likelihood of a normal distribution whose variance is predicted too.

    .. math::
        D(y, f) = (y - f)^2, \qquad D(f', f) = (f' - f)^2

    or, with predicted mean :math:`\mu` and log-variance :math:`s`,

    .. math::
        D(y, f) = \tfrac12 \left[ \log 2\pi + s + (y - \mu)^2 e^{-s} \right], \qquad
        D(f', f) = KL(\mathcal N(\mu', e^{s'}) \| \mathcal N(\mu, e^s))

    Args:
        log_variance: whether the last dimension of the prediction is (mean, log-variance).

    Shapes:
        prediction and target (N, ...); with ``log_variance`` the prediction is (N, ..., 2).

    Example:
        >>> from torch import tensor
        >>> distance = Gaussian()
        >>> distance.to_target(tensor([1.0, 2.0]), tensor([1.0, 4.0])).mean
        tensor(2.)
        >>> distance.between(tensor([1.0]), tensor([3.0])).mean  # RDropLoss halves it
        tensor(4.)
    """

    def __init__(self, *, log_variance: bool = False) -> None:
        super().__init__()
        self.log_variance = log_variance
        self.term_names = ("nll", "kl") if log_variance else ("mse", "kl")

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        if not self.log_variance:
            prediction, target = _alike(self, prediction, target)
            return _all_count((prediction - target).square())
        mean, spread = self._moments(prediction)
        mean, target = _alike(self, mean, target)
        return _all_count((math.log(2 * math.pi) + spread + (target - mean).square() * spread.neg().exp()) / 2)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        first, second = _alike(self, first, second)
        if not self.log_variance:
            return _all_count((first - second).square())
        (mean, spread), (other_mean, other_spread) = self._moments(first), self._moments(second)
        precision = spread.neg().exp() + other_spread.neg().exp()
        # (cosh x - 1) / 2 = sinh^2(x / 2) keeps its digits where the spreads are nearly equal
        return _all_count(((spread - other_spread) / 2).sinh().square() + (mean - other_mean).square() * precision / 4)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        if not self.log_variance:
            return self.between(first, second, target)
        first, second = _alike(self, first, second)
        (mean, spread), (other_mean, other_spread) = self._moments(first), self._moments(second)
        gap = spread - other_spread
        return _all_count((torch.expm1(gap) - gap + (mean - other_mean).square() * other_spread.neg().exp()) / 2)

    def _moments(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        if prediction.shape[-1:] != (2,):
            raise ValueError(
                f"Gaussian(log_variance=True) takes a prediction (N, ..., 2) of means and log-variances, got "
                f"{tuple(prediction.shape)}."
            )
        mean, spread = at_least_float32(prediction).unbind(-1)
        return mean, spread


class Cosine(Distance):
    r"""A direction, such as an embedding: one minus the cosine.

    .. math:: D(y, f) = 1 - \cos(y, f) = \tfrac12 \left\| \frac{y}{\|y\|} - \frac{f}{\|f\|} \right\|^2

    Shapes:
        prediction and target (N, ..., D).

    Example:
        >>> from torch import tensor
        >>> Cosine().between(tensor([[1.0, 0.0]]), tensor([[1.0, 1.0]])).mean  # 1 - 1 / sqrt 2
        tensor(0.2929)
    """

    term_names = ("cosine", "consistency")

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        prediction, target = _alike(self, prediction, target)
        # the difference of directions, unlike the cosine, keeps its digits where they are nearly the same
        gap = F.normalize(prediction, dim=-1) - F.normalize(target, dim=-1)
        return _all_count(gap.square().sum(-1) / 2)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return self.to_target(first, second)


class FromDistribution(Distance):
    r"""Any distribution that torch knows: negative log-likelihood, and the symmetric KL of its registry.

    .. math:: D(y, f) = -\log p_f(y), \qquad D(f', f) = KL(p_{f'} \| p_f)

    Args:
        make: turns a prediction into a ``torch.distributions.Distribution``; each element of its batch is a row.

    Shapes:
        prediction (N, ...), what ``make`` takes; target: batch shape + event shape of the distribution.

    Example:
        >>> from torch import tensor
        >>> from torch.distributions import Poisson
        >>> distance = FromDistribution(lambda prediction: Poisson(prediction.exp()))
        >>> distance.to_target(tensor([0.0, 0.0]), tensor([1.0, 2.0])).mean  # 1, and 1 + ln 2
        tensor(1.3466)
    """

    term_names = ("nll", "kl")

    def __init__(self, make: Callable[[Tensor], Distribution]) -> None:
        super().__init__()
        self.make = make

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        distribution = self._made(prediction)
        expected = distribution.batch_shape + distribution.event_shape
        if target.shape != expected:
            raise ValueError(
                f"FromDistribution made {distribution} of the prediction {tuple(prediction.shape)}, whose values have "
                f"the shape {tuple(expected)}, and got a target {tuple(target.shape)}; nothing broadcasts here."
            )
        return _all_count(-distribution.log_prob(target))

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        p, q = self._made(first), self._made(second)
        return _all_count((self._kl(p, q) + self._kl(q, p)) / 2)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return _all_count(self._kl(self._made(first), self._made(second)))

    def _kl(self, p: Distribution, q: Distribution) -> Tensor:
        try:
            return kl_divergence(p, q)
        except NotImplementedError as error:
            raise TypeError(
                f"torch knows no KL divergence between two {type(p).__name__}: register one with "
                "torch.distributions.register_kl, or use another distance."
            ) from error

    def _made(self, prediction: Tensor) -> Distribution:
        distribution = self.make(at_least_float32(prediction))
        if not isinstance(distribution, Distribution):
            raise TypeError(f"make must return a torch.distributions.Distribution, got {distribution!r}.")
        return distribution


def _all_count(rows: Tensor) -> Average:
    return Average(rows.sum(), rows.new_tensor(rows.numel()))


def _alike(distance: Distance, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the prediction's dtype, float32 or better, after a look at their shapes."""
    if prediction.shape != target.shape or not prediction.is_floating_point():
        raise ValueError(
            f"{type(distance).__name__} compares a prediction of floats with a target of its own shape, got "
            f"{tuple(prediction.shape)}, {prediction.dtype}, and {tuple(target.shape)}; nothing broadcasts here. "
            "Bring both to one shape, for instance with prediction.squeeze(-1) in forward."
        )
    prediction = at_least_float32(prediction)
    return prediction, target.to(prediction.dtype)
