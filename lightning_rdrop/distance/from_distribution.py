"""Any distribution of torch: its likelihood, and the KL of torch's registry."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.terms import Average


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
        return Average.of(-distribution.log_prob(target))

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        p, q = self._made(first), self._made(second)
        return Average.of((self._kl(p, q) + self._kl(q, p)) / 2)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        return Average.of(self._kl(self._made(first), self._made(second)))

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
