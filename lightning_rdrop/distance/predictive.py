"""How a distance reads predictions: as classes, as an expected value, and as an average of several."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Predictive:
    """How a distance reads predictions, for metrics and :func:`~lightning_rdrop.mc_predict`; every method is optional.

    Training needs none of them. The metrics of :mod:`lightning_rdrop.metrics` use ``log_probabilities`` and
    ``target_class`` for what concerns classes, and ``model_average`` for the gap. :func:`~lightning_rdrop.mc_predict`
    needs ``expectation``.
    """

    def log_probabilities(self, prediction: Any) -> Tensor:
        """Log-probabilities of the C classes of each row, (N, ..., C), classes last.

        Raises:
            TypeError: the distance has no classes.
        """
        raise self._unknown("log_probabilities", "classes")

    def target_class(self, prediction: Any, target: Any) -> Tensor:
        """Class index of each row, (N, ...); the most probable class if the target is probabilities.

        Raises:
            TypeError: the distance has no classes.
        """
        raise self._unknown("target_class", "classes")

    def model_average(self, predictions: Any) -> Any:
        """The prediction (N, ...) of the average of the models that made K predictions (K, N, ...).

        Raises:
            TypeError: the distance cannot average predictions.
        """
        raise self._unknown("model_average", "average of predictions")

    def expectation(self, prediction: Any) -> Tensor:
        """Expected value, in the layout of the prediction: probabilities of classes or labels, or a mean.

        Raises:
            TypeError: the distance has no expectation.
        """
        raise self._unknown("expectation", "expectation")

    def implements(self, *methods: str) -> bool:
        """Whether the distance implements these methods."""
        return all(getattr(type(self), method) is not getattr(Predictive, method) for method in methods)

    @property
    def has_classes(self) -> bool:
        """Whether predictions and targets can be read as classes."""
        return self.implements("log_probabilities", "target_class")

    def _unknown(self, method: str, what: str) -> TypeError:
        return TypeError(f"{type(self).__name__} has no {what}: implement {method}, or use another distance.")
