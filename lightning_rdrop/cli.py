"""`lightning-rdrop fit|validate|test|predict`: experiments as configuration."""

from __future__ import annotations

import os
import sys
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_rdrop.callbacks
import lightning_rdrop.data
import lightning_rdrop.modules  # noqa: F401  # so that a config can say `Classifier` instead of the whole path


class RDropCLI(LightningCLI):
    """Lightning's CLI, and callbacks by name.

    ``callbacks`` is a mapping: a second config, or ``--callbacks.alpha.init_args.ramp=0.2``, changes one argument of
    one callback, where the Trainer's own list could only be replaced as a whole. ``test_after_fit`` tests the best
    checkpoint when the training is over (the last weights if no checkpoint is kept by a monitored metric).
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--callbacks", type=dict[str, Callback | None], default={}, help="Callbacks, each by a name."
        )
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test when the training is over.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        named = self._get(self.config_init, "callbacks", {})
        kwargs["callbacks"] = [*(self._get(self.config_init, "trainer.callbacks") or []), *filter(None, named.values())]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        if self._get(self.config_init, "test_after_fit"):
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", None)
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if best else None)


def main(args: ArgsType = None) -> None:
    """The console command. The current folder is importable, as it is for ``python -m``."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    RDropCLI(args=args)
