"""SimCSE: contrastive learning of sentence embeddings, with a second view or a labeled positive as counterpart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rdrop._lightning import trainer_of
from lightning_rdrop.arguments import positive
from lightning_rdrop.data_views import Views
from lightning_rdrop.divergence import at_least_float32
from lightning_rdrop.guard.first_batch import same_shapes
from lightning_rdrop.mixin import RDropMixin
from lightning_rdrop.own_losses import add_losses, split_losses
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
"""The arguments of RDropMixin that do not apply to this loss."""


class SimCSEMixin(RDropMixin):
    r"""Train a LightningModule with SimCSE: it learns embeddings from two views under different dropout masks.

    .. math:: \text{loss} = \operatorname*{mean}_i -\log
        \frac{e^{\cos(f_i, f'_i) / \tau}}{\sum_j e^{\cos(f_i, f'_j) / \tau}}

    with f and f' the embeddings of the same inputs under two dropout masks, and j over the batches of all ranks. It
    logs ``train/loss``, ``train/alignment`` and ``train/uniformity``. ``forward`` returns embeddings. Batches are read
    by :meth:`~lightning_rdrop.RDropMixin.rdrop_unpack_unlabeled`, so they may have labels, which are ignored. Hooks,
    guard and passes are those of R-Drop; there is no alpha, distance or regularizer.

    For supervised SimCSE, with positives and optional hard negatives in the batch, return
    :class:`~lightning_rdrop.Views` ``(anchor, positive)`` or ``(anchor, positive, negative)`` from
    ``rdrop_unpack_unlabeled``. The sum is then over both, :math:`\sum_j (e^{\cos(f_i, f^+_j) / \tau} +
    e^{\cos(f_i, f^-_j) / \tau})`, and over any further negatives.

    Args:
        simcse_temperature: :math:`\tau`, > 0.
        kwargs: ``rdrop_passes``, ``rdrop_duplicate_at`` and ``rdrop_guard`` of :class:`~lightning_rdrop.RDropMixin`.

    Shapes:
        Embeddings (B, D). B must be the same on all ranks, as with Lightning's sampler and ``drop_last=True``.

    Raises:
        ValueError: an argument is out of range, embeddings have another shape, or there is no second example.
        TypeError: an argument of R-Drop that does not apply to SimCSE, such as ``rdrop_alpha``.

    Source: Gao et al. 2021, arXiv 2104.08821, equations 4 and 5, without their extra layer that is only used in
    training.

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
                f"{fixed[0]}={kwargs[fixed[0]]!r} does not apply to {type(self).__name__}: SimCSE has two views, and "
                "no alpha, distance, labeled part or regularizer. Remove it; the arguments are simcse_temperature, "
                "rdrop_passes, rdrop_duplicate_at and rdrop_guard."
            )
        # passed here so that they are not arguments of the subclass
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
        self.simcse_temperature = positive("simcse_temperature", simcse_temperature, " (0.05 is the default)")

    def rdrop_step(self, batch: Any) -> Terms:
        """Run the whole computation without logging; ``ce`` is the loss, a cross-entropy, and ``kl`` is 0."""
        inputs, others = self.rdrop_unpack_unlabeled(batch)
        count = max(2, len(inputs.inputs)) if isinstance(inputs, Views) else 2
        embeddings, losses = split_losses(self.rdrop_draw(inputs, others, part="unlabeled", count=count))
        if embeddings.dim() != 3:
            shape = tuple(embeddings.shape[1:])
            raise ValueError(f"SimCSE compares embeddings (B, D), but forward returned the shape {shape}.")
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
        """Hook: refuse a first batch with a single example, or with a pair instead of :class:`Views`."""
        if len(predictions) == 2 and predictions.shape[1] * getattr(trainer_of(self), "world_size", 1) == 1:
            return "SimCSE distinguishes an example from the others in its batch, but it has only one: batch_size=1."
        if same_shapes(inputs, target):
            return (
                "The batch is a pair of parts with the same shapes, such as an anchor and its positive, and "
                "unsupervised SimCSE would ignore the second. For supervised SimCSE, return Views(anchor, positive) "
                "from rdrop_unpack_unlabeled; for unsupervised SimCSE, only the anchors, or both as examples of one "
                "batch."
            )
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as in RDropMixin.rdrop_log
    def rdrop_log(self, terms: Terms) -> None:
        """Log the loss, the alignment and the uniformity."""
        for name, value in ({"loss": terms.loss} | terms.extra).items():
            self.log(f"train/{name}", value, prog_bar=name != "loss", batch_size=terms.examples)

    def _gathered(self, others: Tensor) -> tuple[Tensor, int]:
        """The other views (K - 1, B, D) of all ranks, view after view, with gradients, and the index of this rank."""
        trainer = trainer_of(self)
        if trainer is None or trainer.world_size == 1:
            return others.flatten(0, 1), 0
        # The backward pass sums the gradients of all ranks, and DDP divides them by W, as it does the loss of each
        # rank: the result is the gradient of the mean over the joined batch, without any further factor.
        gathered: Any = self.all_gather(others, sync_grads=True)
        return gathered.transpose(0, 1).flatten(0, 2), trainer.global_rank


def info_nce(first: Tensor, second: Tensor, temperature: float = 0.05, *, offset: int = 0) -> Tensor:
    r"""The InfoNCE loss: a cross-entropy that picks the counterpart of each embedding among all candidates.

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
    with torch.autocast(first.device.type, enabled=False):  # in half precision, cosines / 0.05 would have steps of 0.1
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

    Lower is better. It is 0 if all embeddings are equal, or if there is only one.

    Source: Wang & Isola 2020, arXiv 2005.10242, with their t = 2.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # -2 times 2
        tensor(-4.0000)
    """
    if len(embeddings) < 2:
        return embeddings.new_zeros(())
    return torch.pdist(_unit(embeddings)).square().mul(-2).exp().mean().log()


def pool(hidden_states: Sequence[Tensor], attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool the hidden states of the tokens into sentence embeddings (B, D).

    Args:
        hidden_states: outputs of the embedding layer and of every layer after it, each (B, T, D).
        attention_mask: (B, T), 0 at padding; None means no padding.
        pooling: ``"cls"`` is the first token of the last layer, ``"mean"`` the mean over the tokens of the last layer,
            ``"first-last-average"`` the mean over the tokens of the first and the last layer.

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
