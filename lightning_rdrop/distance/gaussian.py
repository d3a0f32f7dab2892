"""Regression: squared error, or a normal distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rdrop.distance.distance import Distance
from lightning_rdrop.distance.shapes import blank, counted_between, same_shape
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.terms import Average


class Gaussian(Distance):
    r"""Regression: squared error, or the likelihood of a normal distribution whose variance is predicted too.

    .. math::
        D(y, f) = (y - f)^2, \qquad D(f', f) = (f' - f)^2

    or, with predicted mean :math:`\mu` and log-variance :math:`s`,

    .. math::
        D(y, f) = \tfrac12 \left[ \log 2\pi + s + (y - \mu)^2 e^{-s} \right], \qquad
        D(f', f) = KL(\mathcal N(\mu', e^{s'}) \| \mathcal N(\mu, e^s))

    Args:
        log_variance: whether the last dimension of the prediction is (mean, log-variance).
        ignore_value: targets with this value, such as NaN, are unknown and ignored in both terms.

    Shapes:
        prediction and target (N, ...); with ``log_variance`` the prediction is (N, ..., 2).

    Example:
        >>> from torch import tensor
        >>> distance = Gaussian()
        >>> distance.to_target(tensor([1.0, 2.0]), tensor([1.0, 4.0])).mean
        tensor(2.)
        >>> distance.between(tensor([1.0]), tensor([3.0])).mean  # RDropLoss halves it
        tensor(4.)
        >>> Gaussian(ignore_value=math.nan).to_target(tensor([1.0, 2.0]), tensor([math.nan, 4.0])).mean
        tensor(4.)
    """

    def __init__(self, *, log_variance: bool = False, ignore_value: float | None = None) -> None:
        super().__init__()
        self.log_variance = log_variance
        self.ignore_value = ignore_value
        self.term_names = ("nll", "kl") if log_variance else ("mse", "kl")

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        mean, value = same_shape(self, self._mean(prediction), target)
        counted = self.counted(prediction, target)
        mean, value = blank(counted, mean, value)
        error = (value - mean).square()
        if self.log_variance:
            (log_var,) = blank(counted, at_least_float32(prediction)[..., 1])
            error = (math.log(2 * math.pi) + log_var + error * log_var.neg().exp()) / 2
        return Average.of(error, counted)

    def between(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        first, second, counted = self._blank(first, second, target)
        if not self.log_variance:
            return Average.of((first - second).square(), counted)
        (mean, log_var), (other_mean, other_log_var) = first.unbind(-1), second.unbind(-1)
        precision = log_var.neg().exp() + other_log_var.neg().exp()
        # sinh^2(x / 2) is (cosh x - 1) / 2, but accurate for nearly equal variances
        divergence = ((log_var - other_log_var) / 2).sinh().square() + (mean - other_mean).square() * precision / 4
        return Average.of(divergence, counted)

    def directed(self, first: Tensor, second: Tensor, target: Tensor | None = None) -> Average:
        if not self.log_variance:
            return self.between(first, second, target)
        first, second, counted = self._blank(first, second, target)
        (mean, log_var), (other_mean, other_log_var) = first.unbind(-1), second.unbind(-1)
        gap = log_var - other_log_var
        divergence = (torch.expm1(gap) - gap + (mean - other_mean).square() * other_log_var.neg().exp()) / 2
        return Average.of(divergence, counted)

    def model_average(self, predictions: Tensor) -> Tensor:
        r"""The mean of the predictions; with predicted variances, the normal distribution with the same moments.

        .. math:: \bar\mu = \operatorname{mean} \mu_k, \qquad
            \bar\sigma^2 = \operatorname{mean} e^{s_k} + \operatorname{mean} (\mu_k - \bar\mu)^2
        """
        predictions = at_least_float32(predictions)
        if not self.log_variance:
            return predictions.mean(0)
        mean = self._mean(predictions)
        variance = predictions[..., 1].exp().mean(0) + mean.var(0, correction=0)
        return torch.stack([mean.mean(0), variance.log()], -1)

    def expectation(self, prediction: Tensor) -> Tensor:
        return at_least_float32(self._mean(prediction))

    def invalid_mask(self, prediction: Tensor, target: Tensor) -> Tensor:
        wrong = ~target.isfinite()
        counted = self.counted(prediction, target)
        return wrong if counted is None else wrong & counted

    def check(self, prediction: Tensor, target: Tensor) -> None:
        same_shape(self, self._mean(prediction), target)
        if len(wrong := target[self.invalid_mask(prediction, target)]):
            raise ValueError(
                f"The target contains {float(wrong[0])}; Gaussian takes finite numbers. Remove such examples, or "
                "ignore unknown values with Gaussian(ignore_value=float('nan'))."
            )

    def _mean(self, prediction: Tensor) -> Tensor:
        if not self.log_variance:
            return prediction
        if prediction.shape[-1:] != (2,):
            raise ValueError(
                f"Gaussian(log_variance=True) takes a prediction (N, ..., 2) of means and log-variances, got "
                f"{tuple(prediction.shape)}."
            )
        return prediction[..., 0]

    def _blank(self, first: Tensor, second: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both views, set to 0 where rows do not count, and the mask of those that do."""
        first, second = same_shape(self, first, second)
        counted = counted_between(self, self._mean(first), target)
        mask = counted.unsqueeze(-1) if self.log_variance and counted is not None else counted
        first, second = blank(mask, first, second)
        return first, second, counted
