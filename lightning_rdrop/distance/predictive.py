"""What a prediction says about its target: classes, a value, and what several predictions say together."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Predictive:
    """How a distance reads a prediction, for metrics and for prediction; all of it is optional.

    Training needs none of these methods. A distance that has ``log_probabilities`` and ``target_class`` is measured by
    all metrics of :mod:`lightning_rdrop.metrics`; one with ``model_average`` has a gap, and one with ``expectation``
    can be predicted with by :func:`~lightning_rdrop.mc_predict`.
    """

    def log_probabilities(self, prediction: Any) -> Tensor:
        """log p of the C classes of each row, (N, ..., C), classes last.

        Raises:
            TypeError: the distance knows no classes.
        """
        raise self._unknown("log_probabilities", "classes")

    def target_class(self, prediction: Any, target: Any) -> Tensor:
        """The class of each row, (N, ...), as an index; of a target of probabilities the most probable one.

        Raises:
            TypeError: the distance knows no classes.
        """
        raise self._unknown("target_class", "classes")

    def model_average(self, predictions: Any) -> Any:
        """The prediction (N, ...) of the average of the models that made K predictions (K, N, ...).

        Raises:
            TypeError: the distance knows no average.
        """
        raise self._unknown("model_average", "average of predictions")

    def expectation(self, prediction: Any) -> Tensor:
        """What is to be expected, in the layout of the prediction: probabilities of classes or labels, or a mean.

        Raises:
            TypeError: the distance knows no expectation.
        """
        raise self._unknown("expectation", "expectation")

    def reads(self, *methods: str) -> bool:
        """Whether the distance has these of the methods above."""
        return all(getattr(type(self), method) is not getattr(Predictive, method) for method in methods)

    def _unknown(self, method: str, what: str) -> TypeError:
        return TypeError(f"{type(self).__name__} knows no {what}: a distance that does has the method {method}.")
