"""Gradient accumulation that is exact when micro-batches have different numbers of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rdrop._lightning import Callback
from lightning_rdrop.callbacks._module import require_rdrop
from lightning_rdrop.distance import Categorical, Distance
from lightning_rdrop.unlabeled import parts

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_rdrop._lightning import LightningModule, Trainer


class ExactAccumulation(Callback):
    r"""Makes an optimizer step over several micro-batches and ranks equal to that over all their rows in one batch.

    .. math:: g = \frac{\sum_i n_i\, g_i}{\sum_i n_i}

    with :math:`g_i` the gradient of the mean over the :math:`n_i` rows that count in micro-batch i. Lightning takes the
    unweighted mean of the :math:`g_i`, which gives a token in a short micro-batch more weight than one in a long one.
    Here each gradient is multiplied by :math:`n_i` in the backward pass, and the sum is divided once, before clipping
    and the optimizer's step; that takes one all-reduce of one number a step.

    Raises:
        ValueError: class weights, unlabelled examples, or a distance whose ce and kl are means over different rows, as
            is seen on the first batch; manual optimization; a loss that is not a mean over rows; a strategy that hides
            the gradients (DeepSpeed).
        TypeError: a module without ``RDropMixin``.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(accumulate_grad_batches=8, callbacks=[ExactAccumulation()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: Tensor | float = 0.0
        self._compared = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be exact, and forget the rows of an earlier training that broke off."""
        module = require_rdrop(self, pl_module)
        distances = (part for part in module.rdrop_distance.modules() if isinstance(part, Categorical))
        if any(distance.weight is not None for distance in distances):
            raise ValueError(
                "ExactAccumulation needs one denominator, but with class weights ce is a weighted mean and kl a mean "
                "over rows. Train without Categorical(weight=...), or without this callback."
            )
        if not module.automatic_optimization:
            raise ValueError(
                "ExactAccumulation works in automatic optimization. In manual optimization, multiply each loss by "
                "terms.rows, and divide the gradients by the sum of these before the step."
            )
        self._rows = 0.0
        self._compared = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse unlabelled examples, which show in a batch only."""
        require_rdrop(self, pl_module).rdrop_rows = None  # those of an earlier step are not those of this one
        if parts(batch)[1] is not None:
            raise ValueError(
                "ExactAccumulation needs one denominator, but labelled and unlabelled examples are two means, each "
                "over its own rows. Train without the unlabelled part, or without this callback."
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Multiply the gradient of this micro-batch by its rows."""
        module = require_rdrop(self, pl_module)
        rows = module.rdrop_rows
        if rows is None:
            raise ValueError(
                "ExactAccumulation needs a loss that is a mean over rows, and a step that counts them, as rdrop_step "
                "does. SimCSE's is not: its negatives are the other examples of the micro-batch. "
                "Nor is that of several predictions by name, each a mean over rows of its own."
            )
        if not self._compared:
            self._require_one_denominator(module.rdrop_distance, rows, module.rdrop_kl_rows)
        loss.register_hook(lambda gradient: gradient * rows)  # type: ignore[no-untyped-call]
        self._rows = self._rows + rows

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Divide the accumulated gradients by all rows, before Lightning clips them."""
        # Lightning has divided by the number of micro-batches, DDP by that of ranks
        means = trainer.accumulate_grad_batches * trainer.world_size
        rows = torch.as_tensor(trainer.strategy.reduce(self._rows, reduce_op="sum"))
        factor = means / rows.where(rows != 0, 1)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise ValueError(
                f"ExactAccumulation found no gradient to divide: the strategy, {type(trainer.strategy).__name__}, "
                "keeps them to itself, as DeepSpeed does. Train without this callback, or with DDP or FSDP."
            )
        torch._foreach_mul_(gradients, factor)
        self._rows = 0.0

    def _require_one_denominator(self, distance: Distance, rows: Tensor, kl_rows: Tensor | None) -> None:
        """On the first batch, since it waits for the device."""
        self._compared = True
        if kl_rows is not None and not torch.isclose(rows, kl_rows.to(rows), rtol=1e-4):
            ce, kl = distance.term_names
            raise ValueError(
                f"ExactAccumulation needs one denominator, but with {type(distance).__name__} there are two: in this "
                f"batch {ce} is a mean over {float(rows):g} rows, and {kl} over {float(kl_rows):g}. Train without this "
                "callback; in batches of sequences of similar lengths micro-batches differ little."
            )
