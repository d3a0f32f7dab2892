"""Prediction with dropout on: several passes, and the model average that they sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import views
from lightning_rdrop.arguments import whole
from lightning_rdrop.distance import Distance, Together
from lightning_rdrop.divergence import kl
from lightning_rdrop.draw import draw
from lightning_rdrop.dropout import set_dropout_modes
from lightning_rdrop.mixin import RDropMixin
from lightning_rdrop.probe import without_side_effects
from lightning_rdrop.simcse import SimCSEMixin


@dataclass  # not frozen: the Trainer copies it to the CPU
class MCPrediction:
    """The prediction of a model average, and how much the models agree.

    Args:
        mean: the mean over the passes of the expected values: probabilities of classes or labels, or a number.
        std: the standard deviation over the passes, same shape.
        entropy: of the mean probabilities, nats per row: the total uncertainty. None without classes.
        mutual_information: of prediction and dropout mask, nats per row: the part of the entropy that comes from
            disagreement of the models, which more data would remove. None without classes.
        average: in the format of the network's predictions, for metrics that take these: log-probabilities of classes,
            logits of labels, or a mean, with its log-variance if predicted. None if the distance cannot average.
    """

    mean: Tensor
    std: Tensor
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    average: Tensor | None = None


def mc_predict(module: RDropMixin, inputs: Any, passes: int = 16) -> Any:
    r"""Predict with the average of the models that dropout trains (Monte Carlo dropout).

    .. math::
        \bar p = \operatorname*{mean}_k p_k, \qquad H(\bar p) = -\sum_c \bar p_c \log \bar p_c, \qquad
        I = H(\bar p) - \operatorname*{mean}_k H(p_k) = \operatorname*{mean}_k KL(p_k \| \bar p)

    Args:
        module: a module with the mixin; its ``rdrop_distance`` defines how its predictions are read.
        inputs: the inputs of B examples, as ``rdrop_predict`` takes them.
        passes: K >= 2.

    Returns:
        an :class:`MCPrediction`; a mapping of them by name if the module makes several predictions.

    Raises:
        ValueError: fewer than two passes.
        TypeError: the distance has no expectation, or the module learns embeddings.

    Source: Gal and Ghahramani 2016, arXiv 1506.02142; the mutual information is that of Houlsby et al. 2011,
    arXiv 1112.5745.

    Example:
        >>> from lightning_rdrop.modules import Classifier
        >>> module = Classifier(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)), num_classes=3).eval()
        >>> prediction = mc_predict(module, torch.randn(5, 8), passes=16)
        >>> prediction.mean.shape, prediction.std.shape, prediction.entropy.shape
        (torch.Size([5, 3]), torch.Size([5, 3]), torch.Size([5]))
    """
    refuse_embeddings("mc_predict", module)
    return _summary(module.rdrop_distance, dropout_passes(module, inputs, passes))


def dropout_passes(
    module: RDropMixin, inputs: Any, passes: int = 8, *, training: Mapping[nn.Module, bool] | None = None
) -> Any:
    """Make K predictions (K, N, ...) of the same inputs with dropout on, outside of training.

    Nothing else changes: no gradient is computed, BatchNorm uses its running statistics, and modes, buffers and random
    states are restored afterwards. As many passes are batched together as fit in GPU memory.

    Args:
        module: a module with the mixin.
        inputs: the inputs of B examples, as ``rdrop_predict`` takes them.
        passes: K >= 2.
        training: the modes in which the module was trained; see :func:`~lightning_rdrop.dropout.set_dropout_modes`.

    Raises:
        ValueError: fewer than two passes.

    Example:
        >>> from lightning_rdrop.metrics import dropout_kl
        >>> from lightning_rdrop.modules import Classifier
        >>> module = Classifier(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)), num_classes=3)
        >>> predictions = dropout_passes(module, torch.randn(5, 8))
        >>> predictions.shape, list(dropout_kl(predictions))
        (torch.Size([8, 5, 3]), ['dropout_kl'])
    """
    passes = whole("passes", passes, 2)
    separate = module.rdrop_passes == "separate"
    examples = 0 if separate else views.batch_size(inputs)
    with without_side_effects(module, views.device_of(module, inputs)):
        set_dropout_modes(module, training)
        at_once = passes
        while True:
            try:
                counts = [min(at_once, passes - start) for start in range(0, passes, at_once)]
                drawn = [
                    draw(module, module.rdrop_predict, inputs, count, examples, passes=module.rdrop_passes)
                    for count in counts
                ]
            except torch.OutOfMemoryError:
                if separate or at_once == 1:
                    raise
                at_once = (at_once + 1) // 2
            else:
                return drawn[0] if len(drawn) == 1 else views.join(drawn)


def refuse_embeddings(what: str, module: RDropMixin) -> None:
    """Reject a module whose predictions are embeddings.

    Raises:
        TypeError: the module learns embeddings by SimCSE.
    """
    if isinstance(module, SimCSEMixin):
        raise TypeError(
            f"{what} needs a module that predicts a target, but {type(module).__name__} learns embeddings by SimCSE."
        )


def _summary(distance: Distance, predictions: Any) -> Any:
    if isinstance(distance, Together):
        return {name: _summary(distance.part(name), predictions[name]) for name in distance.weights}
    distance = distance.unwrapped
    merged, passes, rows = views.merge(predictions), len(predictions), len(predictions[0])
    expected: Tensor = views.split(distance.expectation(merged), passes, rows)
    mean, std = expected.mean(0), expected.std(0)
    if not distance.implements("model_average"):
        return MCPrediction(mean, std)
    average = distance.model_average(predictions)
    if not distance.implements("log_probabilities"):
        return MCPrediction(mean, std, average=average)
    log_p, log_mean = views.split(distance.log_probabilities(merged), passes, rows), distance.log_probabilities(average)
    entropy = torch.special.entr(log_mean.exp()).sum(-1)
    information = kl(log_p, log_mean.expand_as(log_p)).mean(0).clamp(min=0)  # rounding may make it negative
    return MCPrediction(mean, std, entropy, information, average)
