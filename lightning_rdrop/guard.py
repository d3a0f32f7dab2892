"""What is looked at on the first batch, so that nothing is silently wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop._compat import is_sharded
from lightning_rdrop.dropout import explain
from lightning_rdrop.probe import untouched

_REDRAWS = 16


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two predictions agree up to rounding.

    The same row at two places of a batch may differ in its last bits, because the tail of a matrix product is summed
    in another order. Two numbers agree within a tolerance relative to themselves, or to the median of what differs
    (which a few classes masked with -1e9 do not move): 100 eps, 1e-5 in float32, where deep networks show 2e-6; 2 eps
    in half precision, whose products are summed in float32 and rounded once. Dropout makes differences of per cents.
    NaN equals NaN, and an infinity itself.

    Example:
        >>> from torch import tensor
        >>> same(tensor([1.0, 2.0]), tensor([1.000001, 2.0])), same(tensor([1.0, 2.0]), tensor([1.001, 2.0]))
        (True, False)
    """
    if first.shape != second.shape:
        return False
    # in pieces: a real difference shows in the first one, and the logits of a vocabulary fill the memory as it is
    pieces = (torch.split(tensor.detach().flatten(), 2**20) for tensor in (first, second))
    return all(torch.equal(one, other) or _close(one, other) for one, other in zip(*pieces, strict=True))


def diagnose(
    network: nn.Module, draw: Callable[[], Tensor], views: Tensor, on_all_ranks: Callable[[bool], bool] = bool
) -> str | None:
    """Whether randomness reaches the prediction: ``None`` if it does, else the reason why not.

    Equal views can be chance (one row, a small p, LayerDrop), and a weight that starts at zero (LoRA, a zero head)
    hides the dropout before it on the first batch. So they are drawn again, up to 16 times, with noise in the place
    of trained parameters that are all zero. Nothing remains of this: parameters, buffers such as the statistics of
    BatchNorm, and torch's random state are as before.

    Args:
        network: the module whose parts the reason names.
        draw: predicts the same batch again, (K, N, ...).
        views: the predictions at hand, (K, N, ...).
        on_all_ranks: whether a decision is the same, True, on all ranks. One that drew again alone would wait forever
            in the collectives of a SyncBatchNorm or of sharded weights.

    Example:
        >>> network, batch = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.ones(2, 3, 4)
        >>> diagnose(network, lambda: network(batch), network(batch)) is None
        True
        >>> network = network.eval()
        >>> "model.train()" in diagnose(network, lambda: network(batch), network(batch))
        True
    """
    if not on_all_ranks(_agree(views)):
        return None
    with untouched(network, views.device), _noise_for_zeros(network):
        first = draw()
        shared = False
        for again in itertools.chain([first], (draw() for _ in range(_REDRAWS - 1))):
            if not on_all_ranks(_agree(again)):
                return None
            shared = shared or not same(first[0], again[0])
    return explain(network, shared=shared)


def unshifted(inputs: Any, target: Any, ignore_index: int = -100) -> str | None:
    """Why a network learns nothing where each target that counts is the token at its own position; else ``None``.

    So it looks where the labels of a causal language model were not shifted: cross-entropy falls to 0 on noise.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7]])
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
        >>> none_counts(torch.tensor([3, -100])) is None
        True
    """
    if not isinstance(target, Tensor) or (target != ignore_index).any():
        return None
    return (
        f"No row of the unlabelled part counts: its labels, or its attention mask, mark all of them as padding, "
        f"{ignore_index}. Leave the labels out of this part, and all its rows count."
    )


class NanWatch:
    """Since which batch a view is NaN: written on the device in every batch, read only where it is asked for.

    It is forgotten when a view is a number again: a search for a learning rate goes on until the loss diverges, and
    puts the weights back; a GradScaler leaves out the steps in which float16 overflows.

    Args:
        part: the part of the batch that is watched, for the message; all of it, if there is but one.

    Example:
        >>> watch = NanWatch()
        >>> watch.look(torch.zeros(2, 3))
        >>> watch.look(torch.tensor([[0.0], [torch.nan]]))
        >>> print(watch.reason())
        The prediction of view 1 is NaN since batch 1. ...
    """

    def __init__(self, part: str = "") -> None:
        self.part = part
        self.batches = 0
        self._since: Tensor | None = None

    def look(self, predictions: Tensor) -> None:
        """Note which of the K views (K, N, ...) are NaN, without waiting for the device."""
        # an infinite logit masks a class, so that the sum may be infinite; NaN is NaN in any sum
        rows = predictions.detach().flatten(1)
        nan = rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).isnan()
        since = torch.full_like(nan, -1, dtype=torch.long) if self._since is None else self._since.to(nan.device)
        self._since = torch.where(nan, torch.where(since < 0, self.batches, since), -1)
        self.batches += 1

    def reason(self) -> str | None:
        """What to say of a view that is NaN; ``None`` if none is. Waits for the device."""
        for view, batch in enumerate([] if self._since is None else self._since.tolist()):
            if batch >= 0:
                return (
                    f"The prediction of view {view}{self.part} is NaN since batch {batch}. Too high a learning rate, "
                    "a row of the attention mask without a token, or an overflow in half precision are usual causes."
                )
        return None


def _agree(views: Tensor) -> bool:
    return all(same(views[0], view) for view in views[1:])


def _close(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point():
        return False
    eps = torch.finfo(first.dtype).eps
    tolerance = eps * (2 if eps > 1e-4 else 100)
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(wide), second.to(wide)
    differing = first[(first != second) & first.isfinite() & second.isfinite()].abs()
    scale = float(differing.median()) if len(differing) else 0.0
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@contextmanager
def _noise_for_zeros(network: nn.Module) -> Iterator[None]:
    """For a while: noise in the place of trained parameters that are all zero.

    The originals are put aside, not written back: the graph of the step still holds them (but no sharded one).
    """
    kept = [(module, dict(module._parameters)) for module in network.modules()]
    sharded: list[nn.Parameter] = []
    try:
        for module, parameters in kept:
            for name, parameter in parameters.items():
                # an empty parameter is one that is sharded away
                if parameter is None or not (parameter.requires_grad and parameter.numel()) or parameter.any():
                    continue
                noise = 0.1 * torch.randn_like(parameter)
                if is_sharded(parameter):  # a forward gathers it, whatever stands in its place
                    sharded.append(parameter)
                    parameter.copy_(noise)
                else:
                    module._parameters[name] = nn.Parameter(noise)
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)
        for parameter in sharded:
            parameter.zero_()
