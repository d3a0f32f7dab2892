"""Classification with many easy rows: the focal loss and symmetric KL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rdrop.arguments import non_negative
from lightning_rdrop.distance.categorical import Categorical
from lightning_rdrop.divergence import log_probabilities
from lightning_rdrop.labels import blank_rows, moved
from lightning_rdrop.terms import Average


class Focal(Categorical):
    r"""Classification with the focal loss, which down-weights rows that are predicted well.

    .. math::
        D(y, f) = -(1 - p_f(y))^\gamma \log p_f(y), \qquad D(f', f) = KL(p_{f'} \| p_f)

    ce is the mean of the first over the rows that count, weighted by the class weights :math:`\alpha_y` if given. With
    :math:`\gamma = 0` it is :class:`~lightning_rdrop.Categorical`.

    Args:
        gamma: :math:`\gamma \ge 0`; 2 in the paper.
        class_dim, ignore_index, weight: as for :class:`~lightning_rdrop.Categorical`.

    Shapes:
        prediction (N, ..., C) logits; target (N, ...) of class indices.

    Raises:
        ValueError: class probabilities as a target, or an argument out of range.

    Source: Lin et al. 2017, Focal loss for dense object detection, arXiv 1708.02002.

    Example:
        >>> from torch import tensor
        >>> Focal(gamma=2.0).to_target(tensor([[0.5, 0.5]]).log(), tensor([0])).mean  # ln 2 / 4
        tensor(0.1733)
    """

    term_names = ("focal", "kl")

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        class_dim: int = -1,
        ignore_index: int = -100,
        weight: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(class_dim=class_dim, ignore_index=ignore_index, weight=weight)
        self.gamma = non_negative("gamma", gamma)

    def to_target(self, prediction: Tensor, target: Tensor) -> Average:
        counted = self.counted(prediction, target)
        log_probs = log_probabilities(blank_rows(prediction.movedim(self.class_dim, 1), counted), 1)
        label = target.where(counted, 0).long()
        log_p = log_probs.gather(1, label.unsqueeze(1)).squeeze(1)
        missing = -torch.expm1(log_p)  # 1 - p in full precision
        # clamped, since powers below 1 have an infinite slope at 0
        values = -(missing.clamp(min=torch.finfo(missing.dtype).tiny) ** self.gamma) * log_p
        if self.weight is None:
            return Average.of(values, counted)
        weight = moved(self.weight, values.device, values.dtype)[label].where(counted, 0)
        return Average.over(values * weight, weight)

    def checked(self, prediction: Tensor, target: Tensor) -> Tensor:
        target = super().checked(prediction, target)
        if target.is_floating_point():
            raise ValueError("Focal takes class indices: the paper does not define it for class probabilities.")
        return target
