"""The hooks of the mixin: methods to override for other batches, networks or output layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rdrop import views
from lightning_rdrop._lightning import MixinBase
from lightning_rdrop.cross_entropy import Head
from lightning_rdrop.data_views import Views
from lightning_rdrop.distance import Distance
from lightning_rdrop.guard.first_batch import no_counted_targets, same_shapes, unshifted_labels
from lightning_rdrop.own_losses import unused_losses

_PASSED_AS_ONE = (
    "{name}.forward got the inputs, a {kind}, as one argument. If it takes several, override the hook\n"
    "    def rdrop_predict(self, inputs):\n"
    "        return self(*inputs)\n"
    "If the Trainer got a list of data loaders, name them: {{'labeled': ..., 'unlabeled': ...}}."
)

TARGET_KEYS = ("labels", "label", "target")
"""The keys under which a mapping may hold its target."""


class Hooks(MixinBase):
    """How a LightningModule reads a batch and predicts; :class:`~lightning_rdrop.RDropMixin` inherits it.

    Regularizers use these hooks and nothing else of the mixin.
    """

    rdrop_distance: Distance
    """D of the general form."""
    _rdrop_unchecked_output = False
    """Whether the output of ``forward`` is still to be checked for losses that the mixin ignores."""

    def rdrop_unpack(self, batch: Any) -> tuple[Any, Any]:
        """Hook: split a batch into the inputs of the network and the target.

        Reads a pair ``(inputs, target)``, or a mapping with ``labels``, ``label`` or ``target``, whose other entries
        are the inputs. A named tuple whose first field has one of these names is ``(target, inputs)``. If the data has
        K inputs for each example, such as two crops of an image, return :class:`~lightning_rdrop.Views` of them.

        Raises:
            ValueError: the batch is neither.
        """
        if isinstance(batch, Mapping):
            keys = [key for key in TARGET_KEYS if key in batch]
            if len(keys) == 1:
                return {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]
            found = f"a mapping with the keys {list(batch)}"
        elif isinstance(batch, (tuple, list)):
            if len(batch) == 2:
                first, second = batch
                swapped = getattr(batch, "_fields", ("",))[0] in TARGET_KEYS  # a NamedTuple (target, inputs)
                return (second, first) if swapped else (first, second)
            found = f"a {type(batch).__name__} of {len(batch)} elements"
        else:
            found = f"a {type(batch).__name__}"
        raise ValueError(
            f"The batch is {found}, so it is unclear what its target is. A batch is a pair (inputs, target) "
            f"or a mapping with one of the keys {', '.join(TARGET_KEYS)}; for anything else override "
            "rdrop_unpack(self, batch) to return (inputs, target)."
        )

    def rdrop_unpack_unlabeled(self, batch: Any) -> tuple[Any, Any]:
        """Hook: split an unlabeled batch into the network's inputs and a target that only marks the rows that count.

        The target is None if all do. The inputs are a tensor, :class:`~lightning_rdrop.Views`, a mapping without
        ``labels``, ``label`` or ``target``, or the only element of a tuple or list. Anything else goes to
        :meth:`rdrop_unpack`. Labels found there are not learned from, but rows labeled -100 (the distance's
        ``ignore_index``) do not count. Without labels, tokens whose ``attention_mask`` (B, T) is 0 do not count, if the
        prediction is a single tensor (B, T, ...) with at least one further dimension, such as classes.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch[0], None
        targetless = isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS)
        if targetless or isinstance(batch, (Tensor, Views)):
            return batch, None
        return self.rdrop_unpack(batch)

    def rdrop_predict(self, inputs: Any) -> Any:
        """Hook: predict for some inputs; calls ``forward`` and takes ``logits`` from its output if there are any.

        Raises:
            TypeError: ``forward`` does not accept these inputs.
        """
        try:
            output = self(**inputs) if isinstance(inputs, Mapping) else self(inputs)
        except (AttributeError, TypeError) as error:
            if isinstance(error, TypeError) and (reason := _does_not_fit(self, inputs)):
                raise TypeError(reason) from error
            if isinstance(inputs, (list, tuple)):
                error.add_note(_PASSED_AS_ONE.format(name=type(self).__name__, kind=type(inputs).__name__))
            raise
        named = isinstance(output, Mapping) and "logits" in output
        if not named and not hasattr(output, "logits"):
            return output
        if not torch.compiler.is_compiling() and self._rdrop_unchecked_output:
            self._rdrop_check_output(output, "**inputs" if isinstance(inputs, Mapping) else "inputs")
        return output["logits"] if named else output.logits

    def _rdrop_check_output(self, output: Any, arguments: str) -> None:
        """Warn once in a fit about losses of the model's own, which are ignored."""
        if not self.training or not torch.is_grad_enabled():
            return
        self._rdrop_unchecked_output = False
        if names := unused_losses(output):
            warnings.warn(
                f"forward of {type(self).__name__} returns {' and '.join(names)} besides logits, but the mixin takes "
                "only the logits. If the model's own loss should be minimized too, override the hook\n"
                "    def rdrop_predict_with_losses(self, inputs):\n"
                f"        output = self({arguments})\n"
                f"        return WithLosses(output.logits, {{'own': ...}})  # computed from output.{names[0]}\n"
                "If not, let it return self.rdrop_predict(inputs).",
                stacklevel=3,
            )

    def rdrop_predict_with_losses(self, inputs: Any) -> Any:
        """Hook: predict in a training pass, with the losses that the model computes itself, if any.

        Calls :meth:`rdrop_predict`, or :meth:`rdrop_hidden` if there is an :meth:`rdrop_head`. A model with its own
        loss, such as load balancing in a mixture of experts, returns :class:`~lightning_rdrop.WithLosses`::

            def rdrop_predict_with_losses(self, inputs):
                output = self(**inputs)
                return WithLosses(output.logits, {"balance": 0.01 * output.aux_loss})

        which is added to the loss and logged as ``train/balance``. Passes in validation and of regularizers do not
        call this hook.
        """
        return self.rdrop_predict(inputs) if self.rdrop_head() is None else self.rdrop_hidden(inputs)

    def rdrop_head(self) -> Head | dict[str, Head] | None:
        """Hook: the linear output layer whose logits are not kept in training; needs :meth:`rdrop_hidden`, its inputs.

        This saves most of the memory of a large vocabulary. ``rdrop_predict`` still returns logits, for validation for
        example, but the terms of a training step have none: ``prediction`` is None.
        """
        return None

    def rdrop_hidden(self, inputs: Any) -> Tensor:
        """Hook: the hidden states (B, ..., D) for some inputs, from which ``rdrop_head`` predicts."""
        raise NotImplementedError("rdrop_head returns an output layer: override rdrop_hidden to return its inputs.")

    def rdrop_first_view(self, predictions: Any) -> Any:
        """The first view's prediction or, with a head and hidden states, a tensor of the prediction's shape."""
        head, first = self.rdrop_head(), views.view(predictions, 0)
        if isinstance(head, Mapping):
            return first | {name: one.like_logits(first[name]) for name, one in head.items()}
        return first if head is None else head.like_logits(first)

    def rdrop_check(self, predictions: Any, inputs: Any, target: Any, part: str) -> str | None:
        """Hook: what is wrong with the first batch, or None; raised or warned about according to ``rdrop_guard``.

        A suspicious prediction, such as a softmax, is only a warning.

        Args:
            predictions: the K views (K, N, ...), or hidden states if there is a head.
            inputs: inputs of B examples, for the first view.
            target: their target, or None.
            part: ``"labeled"`` or ``"unlabeled"``.
        """
        ignore_index = getattr(self.rdrop_distance, "ignore_index", -100)
        first = self.rdrop_first_view(predictions)
        if part == "unlabeled":
            ignored = _ignored_input(self.rdrop_distance, first, inputs, target)
            return no_counted_targets(target, ignore_index) or ignored
        try:
            if target is not None:
                self.rdrop_distance.check(first, target)
        except ValueError as error:
            return str(error)
        if self.rdrop_head() is None and (reason := self.rdrop_distance.prediction_warning(first)):
            warnings.warn(reason, stacklevel=2)
        return unshifted_labels(inputs, target, ignore_index)


def _ignored_input(distance: Distance, prediction: Any, inputs: Any, target: Any) -> str | None:
    """Report an unlabeled pair whose second part has the shape of the first and cannot be a target; else ``None``."""
    if not isinstance(target, Tensor) or not target.is_floating_point() or not same_shapes(inputs, target):
        return None  # token ids and labels have the same shape
    if target.isnan().all():
        return None  # no labels
    try:
        distance.check(prediction, target)
    except (TypeError, ValueError):
        return (
            f"The unlabeled part is a pair of tensors of the same shape, {tuple(target.shape)}, such as two "
            f"augmentations. The second is no valid target of {type(distance).__name__} and would be ignored. Return "
            "Views(first, second), None from rdrop_unpack_unlabeled to compare their predictions, or first, None to "
            "use only the first."
        )
    return None


def _does_not_fit(module: Any, inputs: Any) -> str | None:
    """Why ``forward`` cannot be called with these inputs; ``None`` if its signature accepts them."""
    signature, named = inspect.signature(module.forward), isinstance(inputs, Mapping)
    try:
        signature.bind(**inputs) if named else signature.bind(inputs)
    except TypeError as mismatch:
        given = f"the keyword arguments {', '.join(map(str, inputs))}" if named else "one argument, the inputs"
        return (
            f"{type(module).__name__}.forward{signature} was called with {given}: {mismatch}. Override the hook\n"
            "    def rdrop_predict(self, inputs):\n"
            "        return self(...)  # the arguments of forward, taken from inputs\n"
            "and also rdrop_unpack(self, batch), if forward needs more of the batch than the inputs, such as labels."
        )
    return None
