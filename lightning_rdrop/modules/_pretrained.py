"""What modules with a pretrained Hugging Face model share."""

from __future__ import annotations

from typing import Any, ClassVar

from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from lightning_rdrop.dropout import stochastic_layers, switch_on
from lightning_rdrop.extras import require
from lightning_rdrop.modules._classes import ClassTask
from lightning_rdrop.modules.task import Task

LATER: Any = None
"""In the place of a network that is loaded in ``configure_model``."""


class Pretrained(Task):
    """A module whose model was loaded with its dropout switched on; it says so when a training begins."""

    def on_fit_start(self) -> None:
        on = [layer.name for layer in stochastic_layers(self.network) if layer.active]
        if on:
            rank_zero_info(
                f"{self.hparams['pretrained']} was handed out in eval mode. Switched on for the training: {len(on)} "
                f"dropout layers, {on[0]} to {on[-1]}."
            )


class PretrainedClasses(Pretrained, ClassTask):
    """Loads a model with an output for each class, as soon as their number is known."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    """The class of transformers that loads it."""

    def configure_model(self) -> None:
        if self.network is None:
            count = getattr(self, self.count_argument)
            self.network = load(self.auto, self.hparams["pretrained"], num_labels=count)


def load(auto: str, pretrained: str, **config: Any) -> nn.Module:
    """``auto.from_pretrained(pretrained, **config)`` with its dropout switched on.

    ``from_pretrained`` returns models in eval mode, and Lightning's ``fit`` keeps that mode.

    Args:
        auto: the name of one of the ``AutoModel`` classes of transformers.
        pretrained: name or folder of the model.
        config: what else ``from_pretrained`` takes.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    network: nn.Module = getattr(require("transformers", "huggingface", auto), auto).from_pretrained(
        pretrained, **config
    )
    switch_on(network)
    return network
