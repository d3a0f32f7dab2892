"""FGM: adversarial training on the embeddings."""

from __future__ import annotations

from typing import Any

import torch

from lightning_rdrop.arguments import non_negative
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.regularizers.perturbation import Passes, unit
from lightning_rdrop.regularizers.regularizer import Regularizer
from lightning_rdrop.terms import Average


class FGM(Regularizer):
    r"""Adversarial training by the fast gradient method: the task loss at adversarially perturbed embeddings.

    .. math::
        \text{fgm} = \operatorname{mean}_n D(y_n, f(e + r)), \qquad
        r_i = \epsilon \frac{g_i}{\|g_i\|_2}, \quad g = \nabla_e \operatorname{mean}_n D(y_n, f(e))

    The norm is per example, over non-padding positions and dimensions together; no gradient flows through r. It takes
    two forward and two backward passes over B rows.

    Args:
        weight, at: see :class:`~lightning_rdrop.Regularizer`.
        epsilon: the norm of the perturbation of an example, >= 0. It should be small compared to the norm of the
            example's embeddings.

    Raises:
        ValueError: an argument out of range.

    Source: Miyato et al. 2017, arXiv 1605.07725, equation 5; Su Jianlin, spaces.ac.cn/archives/7234 (who takes the
    norm over all embeddings of a batch together).

    Example:
        >>> FGM(epsilon=0.5).name
        'fgm'
    """

    name = "fgm"

    def __init__(self, *, weight: float = 1.0, epsilon: float = 1.0, at: str | None = None) -> None:
        super().__init__(weight=weight, at=at)
        self.epsilon = non_negative("epsilon", epsilon)

    def forward(self, module: Hooks, inputs: Any, target: Any = None) -> Average:
        passes, distance = Passes(module, inputs, self.at), module.rdrop_distance
        prediction, zero = passes.predict()
        (gradient,) = torch.autograd.grad(distance.to_target(prediction, target).total, zero)
        prediction, _ = passes.predict(self.epsilon * unit(gradient))
        return distance.to_target(prediction, target)
