"""The hooks of the mixin: what a class overrides to fit its own batches, network or output layer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_rdrop import views
from lightning_rdrop._lightning import MixinBase
from lightning_rdrop.cross_entropy import Head
from lightning_rdrop.data_views import Views
from lightning_rdrop.distance import Distance
from lightning_rdrop.guard.first_batch import fed_its_source, none_counts, unshifted

TARGET_KEYS = ("labels", "label", "target")
"""Under one of these names a mapping carries its target."""


class Hooks(MixinBase):
    """How a LightningModule reads a batch and predicts; :class:`~lightning_rdrop.RDropMixin` inherits it.

    Regularizers know a module by these hooks, and nothing more of the mixin.
    """

    rdrop_distance: Distance
    """D of the general form."""

    def rdrop_unpack(self, batch: Any) -> tuple[Any, Any]:
        """Hook: the inputs of the network and the target, out of a batch.

        Reads a pair ``(inputs, target)``, and mappings with ``labels``, ``label`` or ``target``, whose other entries
        are the inputs. Where the data has K inputs for each example, such as two crops of an image, return
        :class:`~lightning_rdrop.Views` of them.

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
                return batch[0], batch[1]
            found = f"a {type(batch).__name__} of {len(batch)} elements"
        else:
            found = f"a {type(batch).__name__}"
        raise ValueError(
            f"The batch is {found}, in which no target can be told from the inputs. A batch is a pair (inputs, target) "
            f"or a mapping with one of the keys {', '.join(TARGET_KEYS)}; for anything else override "
            "rdrop_unpack(self, batch) to return (inputs, target)."
        )

    def rdrop_unpack_unlabeled(self, batch: Any) -> tuple[Any, Any]:
        """Hook: the inputs of the network out of a batch without labels, and None or what tells which rows count.

        A tensor, :class:`~lightning_rdrop.Views`, a mapping without ``labels``, ``label`` or ``target``, or the one
        element of a tuple or list, is the inputs. All else goes to :meth:`rdrop_unpack`. Labels that are found there
        are not learned from; where they are -100 (the distance's ``ignore_index``), a row does not count. Without
        labels, nor does a token whose ``attention_mask`` (B, T) is 0, if the prediction is one tensor (B, T, ...) with
        a further dimension, as of classes.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch[0], None
        targetless = isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS)
        if targetless or isinstance(batch, (Tensor, Views)):
            return batch, None
        return self.rdrop_unpack(batch)

    def rdrop_predict(self, inputs: Any) -> Any:
        """Hook: the prediction for some inputs; calls ``forward``, and takes ``logits`` of what it returns.

        Raises:
            TypeError: ``forward`` does not take such inputs.
        """
        try:
            output = self(**inputs) if isinstance(inputs, Mapping) else self(inputs)
        except TypeError as error:
            if (reason := _does_not_fit(self, inputs)) is None:
                raise
            raise TypeError(reason) from error
        if isinstance(output, Mapping) and "logits" in output:
            return output["logits"]
        return getattr(output, "logits", output)

    def rdrop_predict_with_losses(self, inputs: Any) -> Any:
        """Hook: the prediction of a training pass, and the losses that the model makes itself, if it makes any.

        Calls :meth:`rdrop_predict`, or :meth:`rdrop_hidden` where a head makes the prediction. A model with a loss of
        its own, such as the load balancing of a mixture of experts, returns :class:`~lightning_rdrop.WithLosses`::

            def rdrop_predict_with_losses(self, inputs):
                output = self(**inputs)
                return WithLosses(output.logits, {"balance": 0.01 * output.aux_loss})

        which is added to the loss and logged as ``train/balance``. No other pass, in validation or of a regularizer,
        comes here.
        """
        return self.rdrop_predict(inputs) if self.rdrop_head() is None else self.rdrop_hidden(inputs)

    def rdrop_head(self) -> Head | dict[str, Head] | None:
        """Hook: the linear output layer whose logits training never holds; then :meth:`rdrop_hidden` gives its inputs.

        It saves most of the memory of a large vocabulary. ``rdrop_predict`` gives the logits as ever, for validation
        and whoever else asks, but those of a training step are not there: its ``prediction`` is None.
        """
        return None

    def rdrop_hidden(self, inputs: Any) -> Tensor:
        """Hook: the hidden states (B, ..., D) of some inputs, of which ``rdrop_head`` makes the prediction."""
        raise NotImplementedError("rdrop_head gives an output layer: override rdrop_hidden to give its inputs.")

    def rdrop_first_view(self, predictions: Any) -> Any:
        """What has the shape of the first view's prediction, also where a head makes it of hidden states."""
        head, first = self.rdrop_head(), views.view(predictions, 0)
        if isinstance(head, Mapping):
            return first | {name: one.like_logits(first[name]) for name, one in head.items()}
        return first if head is None else head.like_logits(first)

    def rdrop_check(self, predictions: Any, inputs: Any, target: Any, part: str) -> str | None:
        """Hook: what is wrong with a first batch, if anything; it is said as ``rdrop_guard`` says.

        Args:
            predictions: the K views (K, N, ...), or the hidden states of which a head makes them.
            inputs: those of B examples, of the first view.
            target: theirs, or None.
            part: ``"labeled"`` or ``"unlabeled"``.

        Raises:
            ValueError: a target that the distance does not take.
        """
        ignore_index = getattr(self.rdrop_distance, "ignore_index", -100)
        if part == "unlabeled":
            return none_counts(target, ignore_index) or fed_its_source(self, inputs)
        first = self.rdrop_first_view(predictions)
        if target is not None:
            self.rdrop_distance.check(first, target)
        if self.rdrop_head() is None and (reason := self.rdrop_distance.suspicious(first)):
            warnings.warn(reason, stacklevel=2)
        return unshifted(inputs, target, ignore_index) or fed_its_source(self, inputs)


def _does_not_fit(module: Any, inputs: Any) -> str | None:
    """Why ``forward`` cannot be called with these inputs; ``None`` where its signature takes them."""
    signature, named = inspect.signature(module.forward), isinstance(inputs, Mapping)
    try:
        signature.bind(**inputs) if named else signature.bind(inputs)
    except TypeError as mismatch:
        given = f"the inputs {', '.join(map(str, inputs))} by name" if named else "one argument, the inputs"
        return (
            f"{type(module).__name__}.forward{signature} was given {given}: {mismatch}. Override its hook,\n"
            "    def rdrop_predict(self, inputs):\n"
            "        return self(...)  # what forward takes, made of inputs\n"
            "and rdrop_unpack(self, batch) as well, where forward needs more of the batch than its inputs, as labels."
        )
    return None
