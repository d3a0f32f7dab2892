"""Classification: cross-entropy and the Jensen-Shannon divergence."""

from __future__ import annotations

from torch import Tensor

from lightning_rdrop.distance.categorical import Categorical
from lightning_rdrop.divergence import jensen_shannon
from lightning_rdrop.terms import Average


class JensenShannon(Categorical):
    r"""Classification with the Jensen-Shannon divergence between two predictions, which is at most ln 2.

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

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        return jensen_shannon(first, second, self.class_dim)
