"""A number: squared error, or a normal distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import alike
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.terms import Average


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
            prediction, target = alike(self, prediction, target)
            return Average.of((prediction - target).square())
        mean, spread = self._moments(prediction)
        mean, target = alike(self, mean, target)
        return Average.of((math.log(2 * math.pi) + spread + (target - mean).square() * spread.neg().exp()) / 2)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        first, second = alike(self, first, second)
        if not self.log_variance:
            return Average.of((first - second).square())
        (mean, spread), (other_mean, other_spread) = self._moments(first), self._moments(second)
        precision = spread.neg().exp() + other_spread.neg().exp()
        # (cosh x - 1) / 2 = sinh^2(x / 2) keeps its digits where the spreads are nearly equal
        return Average.of(((spread - other_spread) / 2).sinh().square() + (mean - other_mean).square() * precision / 4)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        if not self.log_variance:
            return self.between(first, second, target)
        first, second = alike(self, first, second)
        (mean, spread), (other_mean, other_spread) = self._moments(first), self._moments(second)
        gap = spread - other_spread
        return Average.of((torch.expm1(gap) - gap + (mean - other_mean).square() * other_spread.neg().exp()) / 2)

    def _moments(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        if prediction.shape[-1:] != (2,):
            raise ValueError(
                f"Gaussian(log_variance=True) takes a prediction (N, ..., 2) of means and log-variances, got "
                f"{tuple(prediction.shape)}."
            )
        mean, spread = at_least_float32(prediction).unbind(-1)
        return mean, spread
