"""LightningCLI with callbacks by name, a test after training, and predictions as a table."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from pytorch_lightning.utilities.model_helpers import is_overridden

import lightning_rdrop.callbacks
import lightning_rdrop.data
import lightning_rdrop.modules  # noqa: F401  # LightningCLI finds imported classes by their bare names
from lightning_rdrop._lightning import monitored_checkpoint
from lightning_rdrop.lightning_cli.parser import RDropParser
from lightning_rdrop.lightning_cli.prediction_table import PredictionTable
from lightning_rdrop.lightning_cli.progress_bar import NarrowProgressBar


class NumberedConfig(SaveConfigCallback):
    """Save the config of each run; if the folder already has one, as ``config_1.yaml``.

    Tests and predictions without a logger have no folder of their own, so their config is not saved.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" and not trainer.loggers:
            return
        folder = Path(trainer.log_dir or ".")
        number = 0
        while not self.already_saved and (folder / self.config_filename).exists():
            number += 1
            self.config_filename = f"config_{number}.yaml"
        super().setup(trainer, pl_module, stage)


class RDropCLI(LightningCLI):
    """LightningCLI with named callbacks, a test after training, and predictions as a table.

    ``callbacks`` is a mapping, so that a second config, or ``--callbacks.alpha.init_args.ramp=0.2``, can change one
    argument of one callback; the Trainer's own list can only be replaced as a whole. ``test_after_fit`` tests the best
    checkpoint after training, or the last weights if no checkpoint is chosen by a monitored metric. ``predict`` writes
    a :class:`~lightning_rdrop.lightning_cli.prediction_table.PredictionTable` to the file ``predictions``.

    Args:
        args, kwargs: those of ``LightningCLI``.

    Raises:
        ValueError: ``test_after_fit`` with nothing to test (before training); a number of classes that differs from
            that of the checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"save_config_callback": NumberedConfig, "parser_class": RDropParser} | kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--callbacks", type=dict[str, Callback | None], default={}, help="Callbacks by name; null removes one."
        )
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test the best weights after training.")

    def setup_parser(self, add_subcommands: bool, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(add_subcommands, *args, **kwargs)
        if add_subcommands:
            predict = self._parser("predict")
            predict.add_argument(
                "--predictions", type=str | None, help="Write predictions to this .csv or .jsonl file."
            )
            predict.add_argument(
                "--all_probabilities",
                type=bool,
                default=False,
                help="Write those of all classes, not only the predicted.",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.given = self.config.clone()  # before the checkpoint's arguments replace the model's
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        named = (re.match(r"--model\.(?:init_args\.)?(\w+)", word) for word in words)
        self.on_command_line = {match[1] for match in named if match}

    def before_instantiate_classes(self) -> None:
        """Check the checkpoint's path and number of classes before anything is loaded."""
        path = self._get(self.config, "ckpt_path")
        elsewhere = path is None or path in ("best", "last", "hpc") or path.startswith("registry") or "://" in path
        if not elsewhere and not os.path.exists(path):
            self.parser.error(f"ckpt_path: there is no {path!r} in {os.getcwd()}.")
        for name in ("num_classes", "num_labels"):
            arguments = self.config.get(f"{self.subcommand}.model.init_args") or {}
            given, now = self.given.get(f"{self.subcommand}.model.init_args.{name}"), arguments.get(name)
            if None not in (given, now) and given != now:
                raise ValueError(f"{name} is {given}, but the checkpoint was trained for {now} classes.")
            later = "pretrained" in arguments and name in arguments and now is None
            if later and self.config.get(f"{self.subcommand}.optimizer"):
                raise ValueError(f"--optimizer is created before the data give {name}. Pass --model.{name} as well.")
        self._prefer_command_line()

    def _prefer_command_line(self) -> None:
        """Model arguments on the command line override those of a checkpoint, which override those of a config."""
        model = f"{self.subcommand}.model"
        key = f"{model}.init_args" if f"{model}.init_args" in self.given else model
        for name in sorted(self.on_command_line):
            given, now = (config.get(f"{key}.{name}") for config in (self.given, self.config))
            if f"{key}.{name}" in self.given and given != now:
                self.config[f"{key}.{name}"] = given
                rank_zero_info(f"--model.{name}={given} replaces the checkpoint's {now}.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = self._get(self.config_init, "trainer.callbacks") or []
        named = self._get(self.config_init, "callbacks", {})
        callbacks = [*(given if isinstance(given, list) else [given]), *filter(None, named.values())]
        if path := self._get(self.config_init, "predictions"):
            every = self._get(self.config_init, "all_probabilities")
            callbacks.append(PredictionTable(path, all_probabilities=every))
        bar = self._get(self.config_init, "trainer.enable_progress_bar") is not False
        if bar and find_spec("rich") is None and not any(isinstance(one, ProgressBar) for one in callbacks):
            callbacks.append(NarrowProgressBar())  # Lightning's own is too wide for a terminal; rich's wraps lines
        return super().instantiate_trainer(**kwargs | {"callbacks": callbacks})

    def before_fit(self) -> None:
        """Check before training that ``test_after_fit`` has something to test, with the data's own check."""
        if not self._get(self.config_init, "test_after_fit"):
            return
        data, model = self.datamodule, self.model
        for hook, owners in (("test_dataloader", [data, model]), ("test_step", [model])):
            if not any(is_overridden(hook, owner) for owner in owners):
                names = " or ".join(type(owner).__name__ for owner in owners if owner is not None)
                raise ValueError(
                    f"test_after_fit is true, but there is no {hook} in {names}. Add one, or leave test_after_fit out."
                )
        if hasattr(data, "check_test"):
            data.check_test()

    def before_predict(self) -> None:
        self._log_untrained()
        if self._get(self.config_init, "predictions"):
            self.config_init["predict"]["return_predictions"] = False  # the table has them

    def before_validate(self) -> None:
        self._log_untrained()

    def before_test(self) -> None:
        self._log_untrained()

    def after_fit(self) -> None:
        if self._get(self.config_init, "test_after_fit"):
            best = getattr(monitored_checkpoint(self.trainer), "best_model_path", None)
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None)
        self._print_paths()

    def after_validate(self) -> None:
        self._print_paths()

    def after_test(self) -> None:
        self._print_paths()

    def _log_untrained(self) -> None:
        if self._get(self.config_init, "ckpt_path") is None:
            rank_zero_info(
                f"{self.subcommand} without --ckpt_path: the model is untrained, except for pretrained weights."
            )

    @rank_zero_only
    def _print_paths(self) -> None:
        """Print where the loggers and the checkpoints wrote."""
        for logger in self.trainer.loggers:
            if folder := getattr(logger, "log_dir", None):
                print(f"{type(logger).__name__}: {folder}")
        callback = monitored_checkpoint(self.trainer) or self.trainer.checkpoint_callback
        if self.subcommand == "fit" and (path := getattr(callback, "best_model_path", None)):
            print(f"checkpoint: {path}")
