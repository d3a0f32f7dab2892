"""Virtual adversarial training: predictions that are robust to small perturbations of the input."""

from __future__ import annotations

from typing import Any

import torch

from lightning_rdrop.arguments import non_negative, positive, whole
from lightning_rdrop.distance import measured
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.regularizers.perturbation import Passes, unit
from lightning_rdrop.regularizers.regularizer import Regularizer
from lightning_rdrop.terms import Average


class VAT(Regularizer):
    r"""Virtual adversarial training: how far the worst small perturbation of the embeddings moves the prediction.

    .. math::
        \text{vat} = \operatorname{mean}_n D(\hat f, f(e + \epsilon d)), \qquad
        d_i = \operatorname*{arg\,max}_{\|d_i\|_2 = 1} D(\hat f, f(e + \epsilon d))

    with :math:`\hat f` the unperturbed prediction, held constant, and D the distance's ``directed``: for
    :class:`~lightning_rdrop.Categorical` the KL divergence :math:`KL(\hat p \| p)`. The direction is found by power
    iteration from a random start, :math:`d \leftarrow \overline{\nabla_r D(\hat f, f(e + r))|_{r = \xi d}}`, and is
    to second order the first eigenvector of the Fisher information. It takes 2 + iterations forward and 1 + iterations
    backward passes. No label is needed: with ``rdrop_views=1`` and unlabeled data this is VAT as published.

    Args:
        weight, at: see :class:`~lightning_rdrop.Regularizer`.
        epsilon: the norm of the perturbation of an example, >= 0, over non-padding positions and dimensions together.
            Published: 8 for CIFAR-10, 2.5 for SVHN, 5 for normalized embeddings of a text.
        xi: the norm at which the gradient is taken, > 0. If too small, rounding errors dominate; if too large, it is
            no longer the gradient at the example. ``None`` is 0.01, or 1 in half precision. Published: 1e-6 for images
            (lost to rounding in float32), 0.1 for texts.
        iterations: of the power iteration, >= 1.

    Raises:
        ValueError: an argument out of range.

    Source: Miyato et al. 2018, arXiv 1704.03976, algorithm 1; for texts 2017, arXiv 1605.07725.

    Example:
        >>> VAT(epsilon=2.0).uses_target
        False
    """

    name = "vat"
    uses_target = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        epsilon: float = 1.0,
        xi: float | None = None,
        iterations: int = 1,
        at: str | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at)
        self.epsilon = non_negative("epsilon", epsilon)
        self.xi = (
            None if xi is None else positive("xi", xi, ", or None for a value by precision: at 0 the gradient is 0")
        )
        self.iterations = whole("iterations", iterations)

    def forward(self, module: Hooks, inputs: Any, target: Any = None) -> Average:
        passes, distance = Passes(module, inputs, self.at), module.rdrop_distance
        with torch.no_grad():
            clean, zero = passes.predict()
        half = zero.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(zero.device.type)
        xi = self.xi or (1.0 if half else 0.01)
        direction = unit(torch.randn_like(zero) * passes.counted)
        for _ in range(self.iterations):
            prediction, small = passes.predict((xi * direction).requires_grad_())
            (gradient,) = torch.autograd.grad(measured(distance.directed, clean, prediction, target).total, small)
            direction = unit(gradient)
        prediction, _ = passes.predict(self.epsilon * direction)
        return measured(distance.directed, clean, prediction, target)
