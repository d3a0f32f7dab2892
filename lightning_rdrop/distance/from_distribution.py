"""Any torch distribution: its likelihood, and the KL from torch's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from lightning_rdrop import arguments
from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import same_shape
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.terms import Average


class FromDistribution(Distance):
    r"""Any torch distribution: negative log-likelihood, and the symmetric KL from torch's registry.

    .. math:: D(y, f) = -\log p_f(y), \qquad D(f', f) = KL(p_{f'} \| p_f)

    Args:
        make: turns a prediction into a ``torch.distributions.Distribution``; each element of its batch is a row.
        ignore_value: examples whose whole target has this value, such as NaN, are removed before ``make`` is called
            and ignored in both terms. To count the others, each step waits for the device.

    Torch's own checks of a distribution also wait for it in each step, unless ``make`` passes ``validate_args=False``.

    Shapes:
        prediction (N, ...), what ``make`` takes; target: batch shape + event shape of the distribution.

    Raises:
        TypeError: ``make`` does not return a distribution, or torch has no KL divergence for it.
        ValueError: the shape of the target does not match the distribution.

    Example:
        >>> from torch import tensor
        >>> from torch.distributions import Poisson
        >>> distance = FromDistribution(lambda prediction: Poisson(prediction.exp()))
        >>> distance.to_target(tensor([0.0, 0.0]), tensor([1.0, 2.0])).mean  # 1, and 1 + ln 2
        tensor(1.3466)
    """

    term_names = ("nll", "kl")

    def __init__(self, make: Callable[[Tensor], Distribution], *, ignore_value: float | None = None) -> None:
        super().__init__()
        self.make = make
        self.ignore_value = ignore_value

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        distribution, target, counted = self._known(prediction, target)
        return _over(-distribution.log_prob(target), counted)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        p, q, counted = self._both(first, second, target)
        return _over((self._kl(p, q) + self._kl(q, p)) / 2, counted)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        p, q, counted = self._both(first, second, target)
        return _over(self._kl(p, q), counted)

    def counted(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        known = super().counted(prediction, target)
        return None if known is None else known.reshape(len(known), -1).any(1)

    def expectation(self, prediction: Tensor) -> Tensor:
        mean: Tensor = self._made(prediction).mean
        return mean

    def invalid_mask(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mask of the values outside the support of the distribution, among the examples that count."""
        distribution, target, _ = self._known(prediction.detach(), target)
        try:
            constraint: Any = distribution.support
        except NotImplementedError:
            return ~target.isfinite()
        wrong: Tensor = ~constraint.check(target)
        return wrong

    def check(self, prediction: Tensor, target: Tensor) -> None:
        wrong = self.invalid_mask(prediction, target)
        if wrong.any():
            distribution, target, _ = self._known(prediction, target)
            raise ValueError(
                f"The target contains {target[wrong][0].tolist()}, outside the support of {distribution}. Remove such "
                "examples, or ignore unknown targets with FromDistribution(make, ignore_value=float('nan'))."
            )

    def _both(
        self, first: Tensor, second: Tensor, target: Tensor | None
    ) -> tuple[Distribution, Distribution, Tensor | None]:
        """The distributions of the examples that count, and the mask of these examples."""
        first, second = same_shape(self, first, second)
        counted = None if target is None else self.counted(first, target)
        if counted is not None:
            first, second = first[counted], second[counted]
        return self._made(first), self._made(second), counted

    def _known(self, prediction: Tensor, target: Tensor) -> tuple[Distribution, Tensor, Tensor | None]:
        """The distribution and target of the examples that count, and the mask of these examples."""
        counted = self.counted(prediction, arguments.tensor("target", target))
        if counted is not None and len(counted) == len(prediction):
            prediction, target = prediction[counted], target[counted]
        distribution = self._made(prediction)
        expected = distribution.batch_shape + distribution.event_shape
        if target.shape != expected:
            raise ValueError(
                f"FromDistribution made {distribution} from a prediction {tuple(prediction.shape)}, which needs a "
                f"target of shape {tuple(expected)}, got {tuple(target.shape)}; nothing broadcasts here."
            )
        return distribution, target, counted

    def _kl(self, p: Distribution, q: Distribution) -> Tensor:
        try:
            return kl_divergence(p, q)
        except NotImplementedError as error:
            raise TypeError(
                f"torch has no KL divergence between two {type(p).__name__}: register one with "
                "torch.distributions.register_kl, or use another distance."
            ) from error

    def _made(self, prediction: Tensor) -> Distribution:
        distribution = self.make(at_least_float32(prediction))
        if not isinstance(distribution, Distribution):
            raise TypeError(f"make must return a torch.distributions.Distribution, got {distribution!r}.")
        return distribution


def _over(values: Tensor, counted: Tensor | None) -> Average:
    """The average over the examples that count, with a row for the others too, as row weights need it."""
    if counted is None or values.dim() == 0:
        return Average.of(values)
    rows = values.new_zeros(len(counted), *values.shape[1:]).index_put((counted,), values)
    return Average.of(rows, counted.view(-1, *[1] * (rows.dim() - 1)).expand_as(rows))
