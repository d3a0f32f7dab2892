"""Conversion of alpha from other implementations, which weight the two terms differently."""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

from lightning_rdrop.arguments import non_negative


class _Source(NamedTuple):
    """Total loss of another implementation: ``ce * CE + alpha * j * J``, where J may be times B or divided by C."""

    ce: float
    j: float
    size: Literal["batch_size", "num_classes"] | None = None


_SOURCES = {
    "paper": _Source(2, 1 / 2),
    "fairseq": _Source(2, 1 / 2),
    "official-sum": _Source(1, 1 / 2, "batch_size"),
    "official-mean": _Source(1, 1 / 2, "num_classes"),
    "official-glue": _Source(2, 1 / 2, "batch_size"),
    "official-vit": _Source(2, 1, "batch_size"),
    "su": _Source(1, 1 / 4),
    "ofa": _Source(1, 1 / 4),
    "bert4torch": _Source(1, 1 / 4, "num_classes"),
    "paddlenlp-sum": _Source(1, 1 / 2, "batch_size"),
    "paddlenlp-batchmean": _Source(1, 1 / 2),
    "paddlenlp-mean": _Source(1, 1 / 2, "num_classes"),
}


def convert_alpha(alpha: float, source: str, *, batch_size: int | None = None, num_classes: int | None = None) -> float:
    r"""Convert the alpha of another implementation to the one that gives the same ratio of the two terms here.

    With J the mean over examples of :math:`KL_{12} + KL_{21}` and CE the mean over the rows of both views, the loss
    here is :math:`CE + \tfrac\alpha4 J`. A source whose total is :math:`c\,CE + \alpha\,k\,J` therefore has

    .. math:: \alpha_\text{here} = 4\,\frac{k}{c}\,\alpha

    The source's total is c times the loss here: with plain SGD, multiply its learning rate by c.

    ============================================================================  ==================
    source                                                                        its total loss
    ============================================================================  ==================
    ``paper``, ``fairseq``: the paper's formula, the criterion for fairseq        2 CE + alpha/2 J
    ``official-sum``: the snippet of the official README, ``kl.sum()``            CE + alpha/2 B J
    ``official-mean``: the same with ``kl.mean()``                                CE + alpha/(2C) J
    ``official-glue``: the official code for BERT                                 2 CE + alpha/2 B J
    ``official-vit``: the official code for ViT, B its micro-batch                2 CE + alpha B J
    ``su``, ``ofa``: bojone/r-drop, OFA                                           CE + alpha/4 J
    ``bert4torch``                                                                CE + alpha/(4C) J
    ``paddlenlp-sum``: CE + alpha RDropLoss                                       CE + alpha/2 B J
    ``paddlenlp-batchmean``                                                       CE + alpha/2 J
    ``paddlenlp-mean``                                                            CE + alpha/(2C) J
    ============================================================================  ==================

    Args:
        alpha: the weight in the source, >= 0.
        source: a name from the table.
        batch_size: B, the number of examples in a batch (not of views), needed if the table has B.
        num_classes: C, needed if the table has C.

    Raises:
        ValueError: an unknown source, an alpha out of range, or a missing size.

    Example:
        >>> convert_alpha(5.0, "paper")
        5.0
        >>> convert_alpha(1.0, "official-sum", batch_size=32)
        64.0
    """
    if source not in _SOURCES:
        near = difflib.get_close_matches(source, _SOURCES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"source {source!r} is unknown: {hint}It must be one of {', '.join(_SOURCES)}.")
    non_negative("alpha", alpha)
    ce, j, size = _SOURCES[source]
    factor = 4 * j / ce
    if size is None:
        return factor * alpha
    value = batch_size if size == "batch_size" else num_classes
    if value is None or value < 1:
        raise ValueError(f"The alpha of {source!r} depends on {size}: pass {size}=..., an int >= 1, got {value!r}.")
    return factor * alpha * value if size == "batch_size" else factor * alpha / value
