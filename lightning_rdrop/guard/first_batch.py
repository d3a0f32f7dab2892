"""What is wrong with a first batch, and with the moment at which it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def unshifted(inputs: Any, target: Any, ignore_index: int = -100) -> str | None:
    """Why a network learns nothing where each target that counts is the token at its own position; else ``None``.

    So it looks where the labels of a causal language model were not shifted: cross-entropy falls to 0 on noise.

    Example:
        >>> from torch import tensor
        >>> tokens = tensor([[5, 6, 7]])
        >>> "were not shifted" in unshifted({"input_ids": tokens}, tokens)
        True
        >>> unshifted(tokens[:, :-1], tokens[:, 1:]) is None
        True
    """
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not (isinstance(tokens, Tensor) and isinstance(target, Tensor)) or tokens.shape != target.shape:
        return None
    counted = target != ignore_index
    if tokens.dim() < 2 or tokens.is_floating_point() or not counted.any() or (tokens != target)[counted].any():
        return None
    return (
        "Every target is the token at its own position, which a network only has to copy: the labels of a causal "
        "language model were not shifted. Override rdrop_unpack(self, batch) to return inputs that end before the "
        "last token, and targets that begin with the second."
    )


def fed_its_source(network: nn.Module, inputs: Any) -> str | None:
    """Which Hugging Face seq2seq model got no decoder inputs; ``None`` if none did.

    BART and its kin feed the source to the decoder then, and train happily on the wrong task. A classifier on such a
    model does so by design, and is left in peace.
    """
    if not isinstance(inputs, Mapping) or any(key.startswith("decoder_input") for key in inputs):
        return None
    for name, module in network.named_modules():
        head = getattr(module, "get_output_embeddings", None)
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and head and head() is not None:
            return (
                f"{name or type(module).__name__}, a {type(module).__name__}, got no decoder inputs, and would feed "
                "the source to its decoder. Override rdrop_unpack(self, batch) to add decoder_input_ids to the inputs; "
                "model.prepare_decoder_input_ids_from_labels(labels) makes them."
            )
    return None


def none_counts(target: Any, ignore_index: int = -100) -> str | None:
    """Why nothing is learned from unlabelled rows all of which are marked as not counting; else ``None``.

    Example:
        >>> from torch import tensor
        >>> none_counts(tensor([3, -100])) is None
        True
    """
    if not isinstance(target, Tensor) or (target != ignore_index).any():
        return None
    return (
        f"No row of the unlabelled part counts: its labels, or its attention mask, mark all of them as padding, "
        f"{ignore_index}. Leave the labels out of this part, and all its rows count."
    )


def in_evaluation(trainer: Any) -> str | None:
    """Why views cannot be drawn now; ``None`` where a Trainer trains, or where there is none.

    Example:
        >>> import pytorch_lightning as pl
        >>> in_evaluation(pl.Trainer(barebones=True)) is None
        True
    """
    for stage in ("sanity_checking", "validating", "testing", "predicting"):
        if getattr(trainer, stage, False):
            return (
                f"The views of a batch are drawn while the Trainer is {stage.replace('_', ' ')}, where dropout is off "
                "and they cannot differ. Predict once there: inputs, target = self.rdrop_unpack(batch); prediction = "
                "self.rdrop_predict(inputs)."
            )
    return None
