"""What a further term of the loss is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from lightning_rdrop.arguments import non_negative
from lightning_rdrop.description import Described
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.terms import Average


class Regularizer(Described):
    r"""A further term of the loss, which makes the passes that it needs through the hooks of the mixin.

    .. math:: \text{loss} = \text{ce} + \alpha\,\text{kl} + \sum_i w_i\,\text{term}_i

    A subclass has a ``name`` and a ``forward``. With ``rdrop_views=1`` a regularizer is that method alone.

    Args:
        weight: w, finite and >= 0; a plain attribute.
        at: where a perturbation enters: the dotted name of a submodule, whose output at its first call in a pass is
            perturbed. ``None`` is the input embeddings of the Hugging Face model in the module, if there is one; else
            the input itself, if it is a single tensor of floats; else the first ``nn.Embedding`` or
            ``nn.EmbeddingBag``.

    Raises:
        ValueError: an argument out of its range.
    """

    name: ClassVar[str]
    """Logged as ``train/<name>``."""
    uses_target: ClassVar[bool] = True
    """Whether it needs labels; where it does not, it is for unlabelled inputs as well."""

    def __init__(self, *, weight: float = 1.0, at: str | None = None) -> None:
        super().__init__()
        self.weight = non_negative("weight", weight)
        self.at = at

    def forward(self, module: Hooks, inputs: Any, target: Any = None) -> Average:
        """The term for some examples, once, however many views R-Drop makes of them.

        Args:
            module: predicts by ``module.rdrop_predict(inputs)`` and measures by ``module.rdrop_distance``.
            inputs: those of B examples, not doubled.
            target: theirs. Where ``uses_target`` is False it may be what tells which unlabelled rows count: ``None`` if
                all do, or a ``RowMask``, which ``lightning_rdrop.distance.measured`` takes.

        Returns:
            the sum over the rows that count and their weight, as a distance gives them. With one denominator for all
            terms, the loss stays exact under :class:`~lightning_rdrop.callbacks.ExactAccumulation`.
        """
        raise NotImplementedError


def distinct(regularizers: Sequence[Regularizer], taken: Collection[str]) -> Sequence[Regularizer]:
    """The regularizers, if each has a name of its own.

    Args:
        regularizers: a list.
        taken: the names under which other values are logged.

    Raises:
        TypeError: it is no list of regularizers.
        ValueError: a name that is taken.
    """
    if isinstance(regularizers, Regularizer) or not all(isinstance(part, Regularizer) for part in regularizers):
        raise TypeError(f"rdrop_regularizers must be a list of regularizers, such as [VAT()], got {regularizers!r}.")
    names = set(taken)
    for regularizer in regularizers:
        if regularizer.name in names:
            raise ValueError(
                f"rdrop_regularizers: train/{regularizer.name} would be logged twice. Each needs a name of its own: "
                f"class Another({type(regularizer).__name__}): name = 'another'"
            )
        names.add(regularizer.name)
    return regularizers
