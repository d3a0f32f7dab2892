"""Image classification with a timm or torchvision network."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from lightning_rdrop.dropout import set_probability, stochastic_layers
from lightning_rdrop.extras import require
from lightning_rdrop.modules._frozen import freeze_below
from lightning_rdrop.modules.classifier import Classifier


class ImageClassifier(Classifier):
    """Classification of images (N, channels, height, width) with a timm or torchvision network.

    Args:
        architecture: the name of a timm model, such as ``vit_base_patch16_224``; or the dotted name of a constructor
            that takes ``num_classes``, such as ``torchvision.models.swin_t``.
        num_classes: C of the logits (N, C); ``None`` takes the number of classes in an
            :class:`~lightning_rdrop.data.ImageFolderDataModule`.
        pretrained: start from timm's weights, with a new output layer.
        dropout: the probability of all layers that drop elements; ``None`` is the network's own, usually 0.
        drop_path: the probability that the last block drops its branch for an example; it grows linearly from 0 in
            the first block. ``None`` is the network's own.
        frozen_below: the submodule below which the network is frozen and dropout is off, such as ``blocks.6``. Set
            ``rdrop_duplicate_at`` to the same name to run the frozen part once.
        gradient_checkpointing: recompute activations inside a block in the backward pass instead of storing them.
        model_args: further arguments of the constructor, such as ``{img_size: 384}``.
        learning_rate: of AdamW.
        kwargs: the arguments of :class:`~lightning_rdrop.modules.Task`, such as ``warmup``.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: an architecture that is unknown, or does not accept its arguments.
    """

    def __init__(
        self,
        architecture: str,
        num_classes: int | None = None,
        *,
        pretrained: bool = False,
        dropout: float | None = None,
        drop_path: float | None = None,
        frozen_below: str | None = None,
        gradient_checkpointing: bool = False,
        model_args: dict[str, Any] | None = None,
        learning_rate: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        later: Any = None  # until the number of classes is known
        super().__init__(later, num_classes, learning_rate=learning_rate, **kwargs)
        if num_classes is not None:
            self.configure_model()

    def configure_model(self) -> None:
        if self.network is not None:
            return
        given = self.hparams
        arguments = (given["model_args"] or {}) | ({"pretrained": True} if given["pretrained"] else {})
        network: Any = make(given["architecture"], self.num_classes, given["drop_path"], arguments)
        if given["dropout"] is not None:
            set_probability(network, given["dropout"])
        if given["frozen_below"] is not None:
            freeze_below(network, given["frozen_below"])
        if given["gradient_checkpointing"]:
            if not hasattr(network, "set_grad_checkpointing"):
                raise ValueError(
                    f"gradient_checkpointing=True needs a timm model, and {given['architecture']} is not one."
                )
            network.set_grad_checkpointing()
        self.network = network


def make(
    architecture: str, num_classes: int | None, drop_path: float | None, arguments: Mapping[str, Any]
) -> nn.Module:
    """Build a timm model by its name, or a network by the dotted name of its constructor.

    Args:
        architecture: the name.
        num_classes: C of its logits (N, C).
        drop_path: the largest probability of its stochastic depth; ``None`` is its own.
        arguments: further arguments of the constructor.

    Raises:
        ValueError: the name is unknown, or the constructor does not accept the arguments.
    """
    dotted = "." in architecture and find_spec(architecture.partition(".")[0]) is not None  # timm's may have dots, too
    try:
        return (_from_constructor if dotted else _from_timm)(architecture, num_classes, drop_path, arguments)
    except TypeError as error:
        raise ValueError(f"architecture={architecture!r} does not accept its arguments: {error}") from error


def _from_timm(name: str, num_classes: int | None, drop_path: float | None, arguments: Mapping[str, Any]) -> nn.Module:
    timm = require("timm", "vision", f"architecture={name!r}")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"architecture={name!r} is not a timm model. Did you mean {' or '.join(near) or 'a dotted name'}?"
        )
    rate = {} if drop_path is None else {"drop_path_rate": drop_path}
    network: nn.Module = timm.create_model(name, num_classes=num_classes, **rate, **arguments)
    return network


def _from_constructor(
    dotted: str, num_classes: int | None, drop_path: float | None, arguments: Mapping[str, Any]
) -> nn.Module:
    if arguments.get("pretrained"):
        raise ValueError(f"pretrained=True needs a timm model: the weights of {dotted} are for other classes.")
    module, _, name = dotted.rpartition(".")
    network: nn.Module = getattr(import_module(module), name)(num_classes=num_classes, **arguments)
    if drop_path is not None:  # not every constructor of torchvision takes it
        layers = [layer.name for layer in stochastic_layers(network) if layer.scope == "example"]
        if not layers:
            raise ValueError(f"drop_path={drop_path} needs stochastic depth, but {dotted} has none.")
        last = max(1, len(layers) - 1)
        set_probability(network, {layer: drop_path * number / last for number, layer in enumerate(layers)})
    return network
