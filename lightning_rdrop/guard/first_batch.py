"""Checks of the first batch, and of when it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_rdrop.nesting import tensors_of


def unshifted_labels(inputs: Any, target: Any, ignore_index: int = -100) -> str | None:
    """Report targets that are each the token at their own position, from which nothing is learned; else ``None``.

    This happens if the labels of a causal language model were not shifted: cross-entropy then falls to 0 even on noise.

    With decoder inputs, these are compared, since the task may be to copy the source.

    Example:
        >>> from torch import tensor
        >>> tokens = tensor([[5, 6, 7]])
        >>> "were not shifted" in unshifted_labels({"input_ids": tokens}, tokens)
        True
        >>> unshifted_labels(tokens[:, :-1], tokens[:, 1:]) is None
        True
    """
    tokens = inputs
    if isinstance(inputs, Mapping):
        tokens = inputs.get("decoder_input_ids" if _decoder_inputs(inputs) else "input_ids")
    if not (isinstance(tokens, Tensor) and isinstance(target, Tensor)) or tokens.is_nested or target.is_nested:
        return None
    if tokens.shape != target.shape:
        return None
    counted = target != ignore_index
    if tokens.dim() < 2 or tokens.is_floating_point() or not counted.any() or (tokens != target)[counted].any():
        return None
    return (
        "Every target is the token at its own position, so the network only has to copy it: the labels of a causal "
        "language model were not shifted. Override rdrop_unpack(self, batch) to return inputs without the last token "
        "and targets without the first."
    )


def missing_decoder_inputs(network: nn.Module, inputs: Any) -> str | None:
    """Report a Hugging Face seq2seq model without decoder inputs; ``None`` if there is none.

    T5 then fails, and BART and similar models feed the source to the decoder and train on the wrong task. A classifier
    on such a model does so by design and is not reported.
    """
    if not isinstance(inputs, Mapping) or "labels" in inputs or _decoder_inputs(inputs):  # it makes them from labels
        return None
    for name, module in network.named_modules():
        head = getattr(module, "get_output_embeddings", None)
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and head and head() is not None:
            return (
                f"{name or type(module).__name__}, a {type(module).__name__}, got no decoder inputs and would fail, "
                "or feed the source to its decoder. Override rdrop_unpack(self, batch) to add decoder_input_ids to the "
                "inputs, made by model.prepare_decoder_input_ids_from_labels(labels)."
            )
    return None


def _decoder_inputs(inputs: Mapping[Any, Any]) -> list[Any]:
    """The names of the decoder inputs, token ids or embeddings."""
    return [key for key in inputs if str(key).startswith("decoder_input")]


def no_counted_targets(target: Any, ignore_index: int = -100) -> str | None:
    """Report an unlabeled part in which no row counts; else ``None``.

    Example:
        >>> from torch import tensor
        >>> no_counted_targets(tensor([3, -100])) is None
        True
    """
    if not isinstance(target, Tensor) or (target != ignore_index).any():
        return None
    return (
        f"No row of the unlabeled part counts: its labels or its attention mask mark all rows as padding, "
        f"{ignore_index}. Remove the labels from this part to count all rows."
    )


def same_shapes(inputs: Any, others: Any) -> bool:
    """Whether both have the same tensor shapes, with more than one number per example.

    Example:
        >>> from torch import zeros
        >>> same_shapes(zeros(4, 8), zeros(4, 8)), same_shapes(zeros(4), zeros(4))
        (True, False)
    """
    shapes = [{path: tensor.shape for path, tensor in tensors_of(part)} for part in (inputs, others)]
    return shapes[0] == shapes[1] and any(len(shape) > 1 for shape in shapes[0].values())


def in_evaluation(trainer: Any) -> str | None:
    """Report views drawn outside of training; ``None`` if the Trainer trains, or if there is none.

    Example:
        >>> import pytorch_lightning as pl
        >>> in_evaluation(pl.Trainer(barebones=True)) is None
        True
    """
    for stage in ("sanity_checking", "validating", "testing", "predicting"):
        if getattr(trainer, stage, False):
            return (
                f"The views of a batch are drawn while the Trainer is {stage.replace('_', ' ')}: dropout is off, so "
                "they cannot differ. Use a single pass instead: inputs, target = self.rdrop_unpack(batch); prediction "
                "= self.rdrop_predict(inputs)."
            )
    return None
