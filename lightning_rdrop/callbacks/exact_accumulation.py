"""Many micro-batches, on many ranks, as if they were one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rdrop._lightning import Callback
from lightning_rdrop.callbacks._module import require_rdrop
from lightning_rdrop.distance import Categorical
from lightning_rdrop.unlabeled import parts

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_rdrop._lightning import LightningModule, Trainer


class ExactAccumulation(Callback):
    r"""Makes an optimizer step over micro-batches and ranks exactly that over all their rows as one batch.

    .. math:: g = \frac{\sum_i n_i\, g_i}{\sum_i n_i}

    with :math:`g_i` the gradient of the mean over the :math:`n_i` rows that count in micro-batch i. Lightning averages
    the :math:`g_i` plainly, which gives a token in a short batch more weight than one in a long batch. Each gradient
    is weighted on its way back, and their sum is divided once before the optimizer's step, ahead of clipping; that
    takes one all-reduce of a number a step.

    Raises:
        ValueError: class weights, or unlabelled examples, with which ce and kl have two denominators; manual
            optimization; a loss that is no mean over rows; or a strategy that keeps gradients to itself (DeepSpeed).
        TypeError: the module is no ``RDropMixin``.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(accumulate_grad_batches=8, callbacks=[ExactAccumulation()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: Tensor | float = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = require_rdrop(self, pl_module)
        if isinstance(module.rdrop_distance, Categorical) and module.rdrop_distance.weight is not None:
            raise ValueError(
                "ExactAccumulation needs one denominator, but with class weights ce is a mean by weight and kl one by "
                "rows. Train without Categorical(weight=...), or without this callback."
            )
        if not module.automatic_optimization:
            raise ValueError(
                "ExactAccumulation works in automatic optimization. In a manual one, weigh each loss by terms.rows and "
                "divide the gradients by their sum before the step."
            )
        self._rows = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if parts(batch)[1] is not None:
            raise ValueError(
                "ExactAccumulation needs one denominator, but labelled and unlabelled examples are two means, each "
                "over rows of its own. Train without the unlabelled part, or without this callback."
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        rows = require_rdrop(self, pl_module).rdrop_rows
        if rows is None:
            raise ValueError(
                "ExactAccumulation needs the mixin's own training_step, which counts the rows, and a loss that is a "
                "mean over them; that of SimCSE is not, whose negatives are the other examples of the micro-batch."
            )
        loss.register_hook(lambda gradient: gradient * rows)  # type: ignore[no-untyped-call]
        self._rows = self._rows + rows

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # what Lightning has divided by: the micro-batches, and DDP the ranks
        means = trainer.accumulate_grad_batches * trainer.world_size
        factor = means / trainer.strategy.reduce(self._rows, reduce_op="sum")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise ValueError(
                f"ExactAccumulation found no gradient to divide: the strategy, {type(trainer.strategy).__name__}, "
                "keeps them to itself, as DeepSpeed does. Train without this callback, or with DDP or FSDP."
            )
        torch._foreach_mul_(gradients, factor)
        self._rows = 0.0
