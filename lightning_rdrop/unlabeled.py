"""Unlabeled examples in addition to labeled ones: their part of a batch, which of their rows count, and their terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop.data_views import Views
from lightning_rdrop.distance import Distance, RowMask
from lightning_rdrop.nesting import tensors_of
from lightning_rdrop.terms import Terms


def parts(batch: Any) -> tuple[Any, Any]:
    """The parts of a batch ``{"labeled": ..., "unlabeled": ...}``; for any other batch, the batch and None.

    Raises:
        ValueError: a part is None, because its loader ended before the other one.

    Example:
        >>> parts({"labeled": (1, 2), "unlabeled": 3}), parts({"x": 1, "label": 2})
        (((1, 2), 3), ({'x': 1, 'label': 2}, None))
    """
    if not isinstance(batch, Mapping) or set(batch) != {"labeled", "unlabeled"}:
        return batch, None
    for name, part in batch.items():
        if part is None:
            raise ValueError(
                f"batch[{name!r}] is None: its loader has ended, and CombinedLoader(mode='max_size') goes on without "
                "it. Use mode='max_size_cycle', which restarts it, or mode='min_size'."
            )
    return batch["labeled"], batch["unlabeled"]


def is_empty(inputs: Any) -> bool:
    """Whether there are no examples, as may happen if a loader filters them.

    Example:
        >>> is_empty({"x": torch.zeros(0, 8)}), is_empty({"nodes": torch.zeros(3, 8), "edges": torch.zeros(0, 2)})
        (True, False)
    """
    tensors = [tensor for _, tensor in tensors_of(inputs) if tensor.dim()]
    return bool(tensors) and not any(map(Tensor.numel, tensors))


def counted(inputs: Any, target: Any, labeled: Terms, distance: Distance) -> Any:
    """A target that only tells which rows of unlabeled inputs count; None if all do.

    Args:
        inputs: inputs of the network. If they have an ``attention_mask`` (B, T) and the prediction has one row per
            token, tokens with mask 0 do not count; a token must count in all :class:`~lightning_rdrop.Views`.
        target: labels in the batch, if any, which override the mask: rows with ``ignore_index`` do not count.
        labeled: the terms of the labeled part, whose prediction shows whether there is one row per token; several
            predictions by name have one target each.
        distance: the distance; one without ``ignore_index`` gets a :class:`RowMask`.

    Example:
        >>> from lightning_rdrop.distance import Bernoulli, Categorical
        >>> zero = torch.zeros(())
        >>> tokens = Terms(zero, zero, zero, prediction=torch.zeros(5, 7, 3))
        >>> counted({"attention_mask": torch.tensor([[1, 1, 0]])}, None, tokens, Categorical())
        tensor([[   0,    0, -100]])
        >>> counted({"attention_mask": torch.tensor([[1, 1, 0]])}, None, tokens, Bernoulli())
        RowMask(mask=tensor([[ True,  True, False]]))
    """
    if labeled.parts:
        given = target if isinstance(target, Mapping) else {}
        parts = labeled.parts.items()
        return {name: counted(inputs, given.get(name), part, distance.part(name)) for name, part in parts}
    ignore_index, prediction = getattr(distance, "ignore_index", None), labeled.prediction
    told = target is not None if ignore_index is None else isinstance(target, Tensor)
    if told or not isinstance(prediction, Tensor):
        return target
    each = inputs.inputs if isinstance(inputs, Views) else (inputs,)
    masks = [mask for one in each if isinstance(one, Mapping) and isinstance(mask := one.get("attention_mask"), Tensor)]
    if len(masks) < len(each) or any(mask.dim() < 2 or mask.dim() != prediction.dim() - 1 for mask in masks):
        return None
    absent = torch.stack([mask == 0 for mask in masks]).any(0)
    if ignore_index is None:
        return RowMask(~absent)
    return torch.zeros_like(masks[0], dtype=torch.long).masked_fill(absent, ignore_index)


def join(labeled: Terms, unlabeled: Terms | None, *, labeled_weight: float, weight: float, consistency: str) -> Terms:
    r"""Combine the terms of both parts.

    .. math::
        \text{kl} = w_\text{labeled}\,\text{kl}_\text{labeled} + w\,\text{kl}_\text{unlabeled}, \qquad
        \text{term}_i = \text{term}_{i,\text{labeled}} + w\,\text{term}_{i,\text{unlabeled}}

    for the regularizers that need no target and for the model's own losses, each a mean over its own rows.

    Args:
        labeled: terms with the loss :math:`\text{ce} + \alpha\,w_\text{labeled}\,\text{kl}_\text{labeled}` plus
            regularizers.
        unlabeled: terms with the loss :math:`\alpha\,\text{kl}_\text{unlabeled}` plus regularizers; None if not
            computed.
        labeled_weight: :math:`w_\text{labeled}`.
        weight: w.
        consistency: the distance's name for kl.

    Example:
        >>> from torch import tensor
        >>> labeled, unlabeled = (Terms(tensor(loss), tensor(ce), tensor(0.5)) for loss, ce in ((3.0, 1.0), (2.0, 0.0)))
        >>> terms = join(labeled, unlabeled, labeled_weight=1.0, weight=0.5, consistency="kl")
        >>> terms.loss, terms.ce, terms.kl  # alpha = 4
        (tensor(4.), tensor(1.), tensor(0.7500))
        >>> sorted(terms.extra)
        ['kl_labeled', 'kl_unlabeled', 'unlabeled_weight']
    """
    loss, kl = labeled.loss, labeled_weight * labeled.kl
    extra = labeled.extra | {"unlabeled_weight": weight}
    if labeled_weight:
        extra[f"{consistency}_labeled"] = labeled.kl.detach()
    if unlabeled is not None:
        loss, kl = loss + weight * unlabeled.loss, kl + weight * unlabeled.kl
        extra[f"{consistency}_unlabeled"] = unlabeled.kl.detach()
        for name, term in unlabeled.extra.items():
            own = extra.get(name, loss.new_zeros(()))  # the model may return a loss for one part only
            extra |= {f"{name}_labeled": own, f"{name}_unlabeled": term, name: own + weight * term}
    return dataclasses.replace(labeled, loss=loss, kl=kl, extra=extra)
