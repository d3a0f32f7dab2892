"""SimCSE: a sentence is distinguished from the others of the batch by its second view, or by a positive of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop._lightning import trainer_of
from lightning_rdrop.arguments import non_negative
from lightning_rdrop.data_views import Views
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.guard.first_batch import fed_its_source
from lightning_rdrop.mixin import RDropMixin
from lightning_rdrop.nesting import tensors_of
from lightning_rdrop.own_losses import add_losses, parted
from lightning_rdrop.terms import Terms

Pooling = Literal["cls", "mean", "first-last-average"]
_FIXED = (
    "rdrop_alpha",
    "rdrop_views",
    "rdrop_distance",
    "rdrop_unlabeled_weight",
    "rdrop_labeled_weight",
    "rdrop_regularizers",
)
"""The arguments of the mixin that set what this loss has not."""


class SimCSEMixin(RDropMixin):
    r"""Makes a LightningModule learn embeddings by SimCSE, from the two views that R-Drop compares.

    .. math:: \text{loss} = \operatorname*{mean}_i -\log
        \frac{e^{\cos(f_i, f'_i) / \tau}}{\sum_j e^{\cos(f_i, f'_j) / \tau}}

    with f and f' the embeddings of the same inputs under two dropout masks, and j over the batches of all ranks. It
    logs ``train/loss``, ``train/alignment`` and ``train/uniformity``. Batches are those that
    :meth:`~lightning_rdrop.RDropMixin.rdrop_unpack_unlabeled` reads, so labels may be there and are ignored. Hooks,
    guard and passes are those of R-Drop, ``forward`` returns embeddings; there is no alpha, no distance, and no
    regularizer.

    Supervised SimCSE has positives, and hard negatives if there are any, of its own. They come with the batch: return
    :class:`~lightning_rdrop.Views` ``(anchor, positive)`` or ``(anchor, positive, negative)`` from
    ``rdrop_unpack_unlabeled``. The sum is then over both, :math:`\sum_j (e^{\cos(f_i, f^+_j) / \tau} +
    e^{\cos(f_i, f^-_j) / \tau})`, and over every further negative.

    Args:
        simcse_temperature: :math:`\tau`, > 0.
        rdrop: ``rdrop_passes`` and ``rdrop_guard`` of :class:`~lightning_rdrop.RDropMixin`.

    Shapes:
        embeddings (B, D); every rank has the same B, as with Lightning's sampler, and a loader that drops its last
        batch.

    Raises:
        ValueError: an argument out of its range, embeddings of another shape, or no second example to compare with.
        TypeError: an argument of R-Drop that SimCSE has no use for, such as ``rdrop_alpha``.

    Source: Gao et al. 2021, arXiv 2104.08821, equations 4 and 5. Without their additional layer, which only training
    has.

    Example:
        >>> import pytorch_lightning as pl
        >>> class Encoder(SimCSEMixin, pl.LightningModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.network = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(8, 4))
        ...     def forward(self, x):
        ...         return self.network(x)
        >>> terms = Encoder().rdrop_step(torch.randn(5, 8))
        >>> terms.prediction.shape, list(terms.extra)
        (torch.Size([5, 4]), ['alignment', 'uniformity'])
    """

    def __init__(self, *args: Any, simcse_temperature: float = 0.05, **kwargs: Any) -> None:
        if fixed := [name for name in _FIXED if name in kwargs]:
            raise TypeError(
                f"{fixed[0]}={kwargs[fixed[0]]!r} has no place in {type(self).__name__}: SimCSE has two views, and no "
                "alpha, distance, labelled part or regularizer. Leave it out; simcse_temperature, rdrop_passes, "
                "rdrop_duplicate_at and rdrop_guard are there."
            )
        # given here, they are no arguments of the subclass: what they set has no place in this loss
        super().__init__(
            *args,
            rdrop_alpha=1.0,
            rdrop_views=2,
            rdrop_distance=None,
            rdrop_unlabeled_weight=1.0,
            rdrop_labeled_weight=1.0,
            rdrop_regularizers=None,
            **kwargs,
        )
        self.simcse_temperature = non_negative("simcse_temperature", simcse_temperature)
        if not simcse_temperature:
            raise ValueError("simcse_temperature must be > 0 (0.05 is the default), got 0.")

    def rdrop_step(self, batch: Any) -> Terms:
        """The whole computation without logging; ``ce`` is the loss, a cross-entropy, and ``kl`` 0."""
        inputs, others = self.rdrop_unpack_unlabeled(batch)
        count = max(2, len(inputs.inputs)) if isinstance(inputs, Views) else 2
        embeddings, losses = parted(self.rdrop_draw(inputs, others, part="unlabeled", count=count))
        if embeddings.dim() != 3:
            shape = tuple(embeddings.shape[1:])
            raise ValueError(f"SimCSE compares embeddings (B, D), and forward returned the shape {shape}.")
        first = embeddings[0]
        candidates, rank = self._gathered(embeddings[1:])
        loss = info_nce(first, candidates, self.simcse_temperature, offset=rank * len(first))
        first, second = first.detach(), embeddings[1].detach()
        terms = Terms(
            loss=loss,
            ce=loss.detach(),
            kl=torch.zeros_like(loss.detach()),
            prediction=first,
            examples=len(first),
            extra={"alignment": alignment(first, second), "uniformity": uniformity(first)},
        )
        add_losses(terms, losses, taken={"loss"})
        self.rdrop_note(terms.extra["alignment"])
        return terms

    def rdrop_check(self, predictions: Any, inputs: Any, target: Any, part: str) -> str | None:
        """A first batch of one example has no other to compare with (a last one may be so), and a pair no label."""
        if len(predictions) == 2 and predictions.shape[1] * getattr(trainer_of(self), "world_size", 1) == 1:
            return "SimCSE distinguishes an example from the others of its batch, which has only one: batch_size=1."
        if _alike(inputs, target):
            return (
                "The batch is a pair whose second part is like the first, an anchor and its positive, and "
                "unsupervised SimCSE would ignore the second. Return Views(anchor, positive) from "
                "rdrop_unpack_unlabeled for supervised SimCSE. Give the anchors alone, or both as examples of one "
                "batch, for the unsupervised."
            )
        return fed_its_source(self, inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as for the log of R-Drop
    def rdrop_log(self, terms: Terms) -> None:
        """Log the loss, the alignment and the uniformity."""
        for name, value in ({"loss": terms.loss} | terms.extra).items():
            self.log(f"train/{name}", value, prog_bar=name != "loss", batch_size=terms.examples)

    def _gathered(self, others: Tensor) -> tuple[Tensor, int]:
        """The other views (K - 1, B, D) of all ranks, view after view, with their gradients, and this rank's number."""
        trainer = trainer_of(self)
        if trainer is None or trainer.world_size == 1:
            return others.flatten(0, 1), 0
        # On the way back the gradients of all ranks are summed, and DDP divides them by W, as it does the loss of
        # each rank: the result is the gradient of the mean over the joined batch, with no factor to be added.
        gathered: Any = self.all_gather(others, sync_grads=True)
        return gathered.transpose(0, 1).flatten(0, 2), trainer.global_rank


def _alike(inputs: Any, others: Any) -> bool:
    """Whether both have the same tensors, which are more than a number for each example."""
    shapes = [{path: tensor.shape for path, tensor in tensors_of(part)} for part in (inputs, others)]
    return shapes[0] == shapes[1] and any(len(shape) > 1 for shape in shapes[0].values())


def info_nce(first: Tensor, second: Tensor, temperature: float = 0.05, *, offset: int = 0) -> Tensor:
    r"""How well its counterpart distinguishes each embedding from all others, hard negatives included.

    .. math:: \operatorname*{mean}_i -\log \frac{e^{\cos(f_i, f'_i) / \tau}}{\sum_j e^{\cos(f_i, f'_j) / \tau}}

    Args:
        first: f, shape (B, D).
        second: f', shape (M, D) with M >= B.
        temperature: :math:`\tau`.
        offset: ``second[offset + i]`` is the counterpart of ``first[i]``.

    Source: van den Oord et al. 2018, arXiv 1807.03748; Gao et al. 2021, arXiv 2104.08821, equation 4.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)  # ln(1 + 1 / e)
        tensor(0.3133)
    """
    first, second = _unit(first), _unit(second)
    with torch.autocast(first.device.type, enabled=False):  # cosines / 0.05 in half precision would be 0.1 apart
        logits = first @ second.T / temperature
    return F.cross_entropy(logits, offset + torch.arange(len(first), device=first.device))


def alignment(first: Tensor, second: Tensor) -> Tensor:
    r"""How close the two embeddings of an example are, mean of :math:`\|f - f'\|^2` on the unit sphere; in [0, 4].

    Source: Wang & Isola 2020, arXiv 2005.10242, with their exponent 2.

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(2.)
    """
    return (_unit(first) - _unit(second)).square().sum(-1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    r"""How evenly embeddings (N, D) fill the unit sphere: log of the mean of :math:`e^{-2\|f_i - f_j\|^2}` over pairs.

    It is 0 where all are the same, or where there is but one, and the lower the better.

    Source: Wang & Isola 2020, arXiv 2005.10242, with their t = 2.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # -2 times 2
        tensor(-4.0000)
    """
    if len(embeddings) < 2:
        return embeddings.new_zeros(())
    return torch.pdist(_unit(embeddings)).square().mul(-2).exp().mean().log()


def pool(hidden_states: Sequence[Tensor], attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """A sentence's embedding out of its tokens'.

    Args:
        hidden_states: those of the embedding layer and of every layer after it, each (B, T, D).
        attention_mask: (B, T), 0 at padding; None is no padding.
        pooling: ``"cls"`` is the first token of the last layer, ``"mean"`` the mean over the tokens of the last layer,
            ``"first-last-average"`` the mean over tokens of the first and the last layer together.

    Source: Gao et al. 2021, arXiv 2104.08821, table 6; Su et al. 2021, arXiv 2103.15316, for the first and last layer.

    Example:
        >>> states = [torch.zeros(1, 2, 1), torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [5.0]]])]
        >>> [pool(states, None, pooling).item() for pooling in ("cls", "mean", "first-last-average")]
        [3.0, 4.0, 2.75]
    """
    last = hidden_states[-1]
    if pooling == "cls":
        return last[:, 0]
    tokens = last if pooling == "mean" else (hidden_states[1] + last) / 2
    if attention_mask is None:
        return tokens.mean(1)
    weight = attention_mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(at_least_float32(embeddings), dim=-1)
