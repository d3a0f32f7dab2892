"""The gradient penalty, which keeps the loss flat around the examples."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.regularizers.perturbation import Passes
from lightning_rdrop.regularizers.regularizer import Regularizer
from lightning_rdrop.terms import Average


class GradientPenalty(Regularizer):
    r"""Half the squared norm of the gradient of each example's task loss with respect to its embeddings.

    .. math:: \text{gradient\_penalty} = \frac{1}{2n} \sum_i \Big\| \nabla_{e_i} \sum_{n \in i} D(y_n, f(e)) \Big\|_2^2

    over the n rows that count; with one row per example, it is the mean over the examples for any B. To first order,
    the loss plus w times this is the loss after a step of w/2 times the gradient. It takes one forward pass and a
    double backward pass.

    Fused attention has no second derivative, so torch's is replaced by its math implementation during the pass; a model
    with another fused attention needs ``attn_implementation="sdpa"`` or ``"eager"``. A cuDNN LSTM has none either:
    train it under ``torch.backends.cudnn.flags(enabled=False)``.

    Args:
        weight, at: see :class:`~lightning_rdrop.Regularizer`.

    Source: Drucker and LeCun 1992, double backpropagation; Su Jianlin, spaces.ac.cn/archives/7234. His code takes the
    gradient of the mean loss, so with B examples his epsilon is B times this weight.

    Example:
        >>> GradientPenalty(weight=0.1).name
        'gradient_penalty'
    """

    name = "gradient_penalty"

    def forward(self, module: Hooks, inputs: Any, target: Any = None) -> Average:
        with sdpa_kernel(SDPBackend.MATH):
            prediction, zero = Passes(module, inputs, self.at).predict()
            loss = module.rdrop_distance.to_target(prediction, target)
            (gradient,) = torch.autograd.grad(loss.total, zero, create_graph=True)
        return Average(at_least_float32(gradient).square().sum() / 2, loss.weight)
