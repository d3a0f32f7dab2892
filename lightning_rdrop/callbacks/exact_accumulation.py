"""Gradient accumulation that is exact when micro-batches have different numbers of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rdrop._lightning import Callback
from lightning_rdrop.callbacks._require import require_rdrop
from lightning_rdrop.distance import Categorical
from lightning_rdrop.mixin import RDropMixin
from lightning_rdrop.unlabeled import parts

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_rdrop._lightning import LightningModule, Trainer


class ExactAccumulation(Callback):
    r"""Makes an optimizer step over several micro-batches and ranks equal to one over all their rows in a single batch.

    .. math:: g = \frac{\sum_i n_i\, g_i}{\sum_i n_i}

    with :math:`g_i` the gradient of the mean over the :math:`n_i` rows that count in micro-batch i. Lightning takes the
    unweighted mean of the :math:`g_i`, which gives a token in a short micro-batch more weight than one in a long one.
    Here each gradient is multiplied by :math:`n_i` in the backward pass, and the sum is divided once, before clipping
    and the optimizer step, with one all-reduce of one number per step. A loss of the model itself, added by
    :class:`~lightning_rdrop.WithLosses`, becomes the mean over the micro-batches with the same weights.

    Raises:
        ValueError: class weights, unlabeled examples, or a distance whose terms are means over different numbers of
            rows, such as those of one prediction per example and one per token: their gradients would have to be kept
            separate until all rows are counted. The last is detected on the first batch or at the end of an epoch.
            Also manual optimization, a loss that is not a per-row mean, or a strategy that hides gradients (DeepSpeed).
        TypeError: a module without ``RDropMixin``.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(accumulate_grad_batches=8, callbacks=[ExactAccumulation()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: Tensor | float = 0.0
        self._compared = False
        self._differ: Tensor | bool = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reject what cannot be exact, and discard the rows of an earlier, interrupted training."""
        module = require_rdrop(self, pl_module)
        distances = (part for part in module.rdrop_distance.modules() if isinstance(part, Categorical))
        if any(distance.weight is not None for distance in distances):
            raise ValueError(
                "ExactAccumulation needs one denominator, but with class weights ce is a weighted mean and kl a mean "
                "over rows. Train without Categorical(weight=...), or without this callback."
            )
        if not module.automatic_optimization:
            raise ValueError(
                "ExactAccumulation works in automatic optimization only. In manual optimization, multiply each loss by "
                "terms.rows, and divide the gradients by the sum of terms.rows before the step."
            )
        self._rows = 0.0
        self._compared = self._differ = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Reject unlabeled examples, which only the batch shows."""
        require_rdrop(self, pl_module).rdrop_denominators = {}  # drop those of an earlier step
        if parts(batch)[1] is not None:
            raise ValueError(
                "ExactAccumulation needs one denominator, but labeled and unlabeled examples are two means, each over "
                "its own rows. Train without the unlabeled part, or without this callback."
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Multiply the gradient of this micro-batch by its number of rows."""
        module = require_rdrop(self, pl_module)
        if not module.rdrop_denominators:
            raise ValueError(
                "ExactAccumulation needs a loss that is a mean over rows, and their number, which rdrop_log records: "
                "call self.rdrop_log(terms) in your training_step. The loss of SimCSE is not such a mean: its "
                "negatives are the other examples of the micro-batch."
            )
        rows, *others = module.rdrop_denominators.values()
        if any(other is not rows for other in others):
            self._compare(module)
        loss.register_hook(lambda gradient: gradient * rows)  # type: ignore[no-untyped-call]
        self._rows = self._rows + rows

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Divide the accumulated gradients by the total number of rows, before Lightning clips them."""
        if not isinstance(self._rows, Tensor):
            return  # training_step skipped every micro-batch
        # Lightning has divided by the number of micro-batches, DDP by the number of ranks
        means = trainer.accumulate_grad_batches * trainer.world_size
        rows: Any = trainer.strategy.reduce(self._rows, reduce_op="sum")
        factor = means / rows.where(rows != 0, 1)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise ValueError(
                f"ExactAccumulation found no gradient to divide: the strategy {type(trainer.strategy).__name__} hides "
                "gradients, as DeepSpeed does. Train without this callback, or with DDP or FSDP."
            )
        torch._foreach_mul_(gradients, factor)
        self._rows = 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if the denominators differed after the first batch, where they are not read to avoid waiting."""
        if bool(self._differ):
            raise ValueError(
                "ExactAccumulation needs one denominator, but in a batch of this epoch the terms of the loss were "
                "means over different numbers of rows. Train without this callback."
            )

    def _compare(self, module: RDropMixin) -> None:
        """Check that all terms are means over equally many rows: raise on the first batch, record on later ones."""
        (name, rows), *others = module.rdrop_denominators.items()
        differ = {other: ~torch.isclose(rows, its.to(rows), rtol=1e-4) for other, its in others}
        self._differ = torch.stack([torch.as_tensor(self._differ, device=rows.device), *differ.values()]).any()
        if self._compared:
            return
        self._compared = True
        for other, found in differ.items():
            if found:
                raise ValueError(
                    f"ExactAccumulation needs one denominator, but with {type(module.rdrop_distance).__name__} there "
                    f"are several: in this batch {name} is a mean over {float(rows):g} rows, and {other} over "
                    f"{float(module.rdrop_denominators[other]):g}. Train without this callback; if the sequences in "
                    "batches have similar lengths, the micro-batches differ little."
                )
