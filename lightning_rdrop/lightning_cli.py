"""LightningCLI with callbacks by name and a test after training."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.model_helpers import is_overridden

import lightning_rdrop.callbacks
import lightning_rdrop.modules  # noqa: F401  # LightningCLI finds imported classes by their bare names
from lightning_rdrop.data import TextDataModule


class RDropCLI(LightningCLI):
    """LightningCLI with named callbacks and a test after training.

    ``callbacks`` is a mapping, so that a second config, or ``--callbacks.alpha.init_args.ramp=0.2``, can change one
    argument of one callback; the Trainer's own list can only be replaced as a whole. ``test_after_fit`` tests the best
    checkpoint after training, or the last weights if no checkpoint is chosen by a monitored metric.

    Raises:
        ValueError: ``test_after_fit`` without anything to test, before training.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--callbacks", type=dict[str, Callback | None], default={}, help="Callbacks by name; null removes one."
        )
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test the best weights afterwards.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        named = self._get(self.config_init, "callbacks", {})
        kwargs["callbacks"] = [*(self._get(self.config_init, "trainer.callbacks") or []), *filter(None, named.values())]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Find what ``test_after_fit`` lacks before training, not after it."""
        if not self._get(self.config_init, "test_after_fit"):
            return
        data, model = self.datamodule, self.model
        for hook, owners in (("test_dataloader", [data, model]), ("test_step", [model])):
            if not any(is_overridden(hook, owner) for owner in owners):
                names = " or ".join(type(owner).__name__ for owner in owners if owner is not None)
                raise ValueError(
                    f"test_after_fit is true, and there is no {hook} in {names}: add one, or leave test_after_fit out."
                )
        own = ("prepare_data", "rows", "test_dataloader")
        if isinstance(data, TextDataModule) and not any(is_overridden(hook, data, TextDataModule) for hook in own):
            data.table("test")

    def after_fit(self) -> None:
        if self._get(self.config_init, "test_after_fit"):
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", None)
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if best else None)
