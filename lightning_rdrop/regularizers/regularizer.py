"""The base class of additional loss terms."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from lightning_rdrop.arguments import non_negative
from lightning_rdrop.description import Described
from lightning_rdrop.distance import Distance
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.terms import Average


class Regularizer(Described):
    r"""Base class of additional loss terms, which make their own forward passes through the hooks of the mixin.

    .. math:: \text{loss} = \text{ce} + \alpha\,\text{kl} + \sum_i w_i\,\text{term}_i

    A subclass defines ``name`` and ``forward``. With ``rdrop_views=1`` it is used alone, without R-Drop.

    Args:
        weight: w, finite and >= 0; a plain attribute.
        at: where a perturbation enters: the dotted name of a submodule, whose output is perturbed at its first call in
            a pass. ``None`` selects the input embeddings of the Hugging Face model in the module, if there is one; else
            the input itself, if it is a single floating-point tensor; else the first ``nn.Embedding`` or
            ``nn.EmbeddingBag``.

    Raises:
        ValueError: an argument out of range.
    """

    name: ClassVar[str]
    """Logged as ``train/<name>``."""
    uses_target: ClassVar[bool] = True
    """Whether it needs labels; if not, it is applied to unlabeled inputs as well."""

    def __init__(self, *, weight: float = 1.0, at: str | None = None) -> None:
        super().__init__()
        self.weight = non_negative("weight", weight)
        self.at = at

    def forward(self, module: Hooks, inputs: Any, target: Any = None) -> Average:
        """The term for B examples, each of them once, regardless of the number of views.

        Args:
            module: predicts with ``module.rdrop_predict(inputs)`` and measures with ``module.rdrop_distance``.
            inputs: the inputs of B examples, not doubled.
            target: their targets. If ``uses_target`` is False, it may only tell which unlabeled rows count: ``None`` if
                all do, or a ``RowMask``, which ``lightning_rdrop.distance.measured`` takes.

        Returns:
            the sum over the rows that count and their weight, as a distance returns them. If all terms have the same
            denominator, the loss is exact under :class:`~lightning_rdrop.callbacks.ExactAccumulation`.
        """
        raise NotImplementedError


def logged_names(distance: Distance) -> set[str]:
    """The names under which the mixin logs the terms of every step.

    Example:
        >>> from lightning_rdrop import Categorical
        >>> sorted(logged_names(Categorical()))
        ['alpha', 'ce', 'kl', 'loss']
    """
    return {"loss", "alpha", *distance.term_names}


def distinct(regularizers: Sequence[Regularizer], taken: Collection[str]) -> Sequence[Regularizer]:
    """Check that each regularizer has a unique name, and return them.

    Args:
        regularizers: a list.
        taken: the names of other logged values.

    Raises:
        TypeError: it is not a list of regularizers.
        ValueError: a name is already taken.
    """
    if isinstance(regularizers, Regularizer) or not all(isinstance(part, Regularizer) for part in regularizers):
        raise TypeError(f"rdrop_regularizers must be a list of regularizers, such as [VAT()], got {regularizers!r}.")
    names = set(taken)
    for regularizer in regularizers:
        if regularizer.name in names:
            raise ValueError(
                f"rdrop_regularizers: train/{regularizer.name} would be logged twice. Give each a unique name: "
                f"class Another({type(regularizer).__name__}): name = 'another'"
            )
        names.add(regularizer.name)
    return regularizers
