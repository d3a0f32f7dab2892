"""Several predictions per example, each with its own distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import views
from lightning_rdrop.arguments import non_negative
from lightning_rdrop.cross_entropy import Head
from lightning_rdrop.distance.distance import Distance, measured
from lightning_rdrop.terms import Average, Terms


class Together(Distance):
    r"""Several distances by name, for predictions and targets that are mappings with the same names.

    .. math::
        \text{ce} = \sum_i w_i\,\text{ce}_i, \qquad \text{kl} = \sum_i w_i a_i\,\text{kl}_i, \qquad
        \text{loss} = \text{ce} + \alpha\,\text{kl} = \sum_i w_i (\text{ce}_i + \alpha a_i\,\text{kl}_i)

    Each part is a mean over its own rows, logged with its name, such as ``train/intent_ce`` and ``train/intent_kl``.
    ``rdrop_distance={"intent": Categorical(), ...}`` is this distance with all weights equal to 1.

    Args:
        distances: D of each prediction, by name.
        weights: :math:`w_i`, >= 0, by name; 1 if not given.
        alphas: :math:`a_i`, >= 0, by name: factors of alpha; 1 if not given.

    Shapes:
        prediction and target: mappings with the names of ``distances``, each what that distance takes. ``head`` is a
        mapping too, for the parts whose predictions are hidden states.

    Raises:
        ValueError: no distance, a name that a submodule cannot have, such as ``"type"``, an unknown name, or a weight
            out of range.
        TypeError: a part that is not a distance.

    Example:
        >>> from torch import tensor
        >>> from lightning_rdrop import Categorical, Gaussian
        >>> distance = Together({"kind": Categorical(), "size": Gaussian()}, weights={"size": 0.5})
        >>> predictions = {"kind": torch.zeros(2, 3, 4), "size": tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]])}
        >>> terms = distance.terms(predictions, {"kind": tensor([0, 1, 2]), "size": tensor([1.0, 2.0, 3.0])}, alpha=3.0)
        >>> terms.ce, terms.kl  # ln 4 + 0.5 * 4 / 6, and 0.5 * (4 / 3) / 2
        (tensor(1.7196), tensor(0.3333))
        >>> sorted(terms.parts)
        ['kind', 'size']
    """

    def __init__(
        self,
        distances: Mapping[str, Distance],
        *,
        weights: Mapping[str, float] | None = None,
        alphas: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not distances or not isinstance(distances, Mapping):
            raise ValueError(f"distances must map at least one name to a distance, got {distances!r}.")
        for name, distance in distances.items():
            if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"distances has the name {name!r}, which no submodule can have: names must be non-empty strings "
                    "without a dot that are not attributes of torch.nn.ModuleDict. Rename it here, and in the "
                    "mappings that rdrop_predict and rdrop_unpack return."
                )
            if not isinstance(distance, Distance):
                raise TypeError(f"distances[{name!r}] must be a Distance, got {distance!r}.")
        self.distances = nn.ModuleDict(distances)
        self.weights = self._factors("weights", weights or {})
        self.alphas = self._factors("alphas", alphas or {})

    def to_target(self, prediction: Any, target: Any) -> Average:
        self.check_names(prediction, target)
        return self._sum(self.weights, lambda name, part: part.to_target(prediction[name], target[name]), prediction)

    def between(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._sum(
            self._both(),
            lambda name, part: measured(part.between, first[name], second[name], _of(target, name)),
            first,
        )

    def directed(self, first: Any, second: Any, target: Any = None) -> Average:
        return self._sum(
            self._both(),
            lambda name, part: measured(part.directed, first[name], second[name], _of(target, name)),
            first,
        )

    def part(self, name: str) -> Distance:
        part: Any = self.distances[name]
        return part  # type: ignore[no-any-return]

    def check(self, prediction: Any, target: Any) -> None:
        self.check_names(prediction, target)
        for name, distance in self._parts():
            distance.check(prediction[name], target[name])

    def has_invalid(self, prediction: Any, target: Any) -> Tensor | None:
        self.check_names(prediction, target)
        found = [part.has_invalid(prediction[name], target[name]) for name, part in self._parts()]
        flags = [flag for flag in found if flag is not None]
        return torch.stack(flags).any() if flags else None

    def prediction_warning(self, prediction: Any) -> str | None:
        reasons = [reason for name, part in self._parts() if (reason := part.prediction_warning(prediction[name]))]
        return reasons[0] if reasons else None

    def terms(
        self, predictions: Any, target: Any, alpha: float | Tensor, head: Mapping[str, Head] | None = None
    ) -> Terms:
        """The weighted sum of the parts, each computed by its distance in its fastest way."""
        self.check_names(predictions, target)
        return self._joined(
            {
                name: part.terms(predictions[name], target[name], alpha * self.alphas[name], (head or {}).get(name))
                for name, part in self._parts()
            }
        )

    def consistency(self, predictions: Any, alpha: float | Tensor, target: Any = None) -> Terms:
        return self._joined(
            {
                name: part.consistency(predictions[name], alpha * self.alphas[name], _of(target, name))
                for name, part in self._parts()
            }
        )

    def _joined(self, parts: dict[str, Terms]) -> Terms:
        weights, both = self.weights, self._both()
        return Terms(
            loss=torch.stack([weights[name] * part.loss for name, part in parts.items()]).sum(),
            ce=torch.stack([weights[name] * part.ce for name, part in parts.items()]).sum(),
            kl=torch.stack([both[name] * part.kl for name, part in parts.items()]).sum(),
            prediction={name: part.prediction for name, part in parts.items()},
            parts=parts,
        )

    def _sum(
        self, factors: Mapping[str, float], measure: Callable[[str, Distance], Average], prediction: Any
    ) -> Average:
        """The weighted sum of means, as an average over examples, since the rows of the parts differ."""
        mean = torch.stack([factors[name] * measure(name, part).mean for name, part in self._parts()]).sum()
        examples = len(views.first_tensor(prediction))
        return Average(examples * mean, torch.full_like(mean, examples))

    def _both(self) -> dict[str, float]:
        return {name: self.weights[name] * self.alphas[name] for name in self.weights}

    def _parts(self) -> Any:
        return self.distances.items()

    def _factors(self, argument: str, given: Mapping[str, float]) -> dict[str, float]:
        if unknown := [name for name in given if name not in self.distances]:
            raise ValueError(f"{argument} has {unknown[0]!r}, but there are distances for {', '.join(self.distances)}.")
        return {name: non_negative(f"{argument}[{name!r}]", given.get(name, 1.0)) for name in self.distances}

    def check_names(self, prediction: Any, target: Any) -> None:
        """Check that prediction and target are mappings with the names of the distances.

        Raises:
            ValueError: one of them is not.
        """
        for what, value in (("prediction", prediction), ("target", target)):
            names = list(value) if isinstance(value, Mapping) else None
            if names is None or set(names) != set(self.distances):
                found = type(value).__name__ if names is None else f"mapping with {', '.join(map(str, names))}"
                raise ValueError(
                    f"There are distances for {', '.join(self.distances)}, but the {what} is a {found}. Return a "
                    f"mapping with these names from {'rdrop_predict' if what == 'prediction' else 'rdrop_unpack'}."
                )


def _of(target: Any, name: str) -> Any:
    return None if target is None else target.get(name)
