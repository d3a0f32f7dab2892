"""Where a perturbation enters a network, and passes through the network with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import submodules, views
from lightning_rdrop._compat import is_compiled
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.probe import buffers_aside, random_states, unlogged


class Passes:
    """Passes of one batch through a module, each with something added at one place.

    What differs between them is what was added, and nothing else: all have the dropout masks of the first one, as in
    the code of Miyato et al. (github.com/takerum/vat_tf seeds them alike), for between different masks the direction
    that moves the prediction most would be noise. Running statistics, and all other buffers, are put aside meanwhile,
    and what ``forward`` logs is not logged.

    Args:
        module: with the mixin.
        inputs: those of B examples.
        at: see :class:`~lightning_rdrop.Regularizer`.

    Raises:
        ValueError: a submodule that is not there, or no place to be found.
        TypeError: inputs whose examples cannot be told.
    """

    def __init__(self, module: Hooks, inputs: Any, at: str | None) -> None:
        self._module, self._inputs = module, inputs
        self._at = at
        self._place = _find(self._module, inputs, at)
        try:
            self._examples = views.batch_size(inputs)
        except TypeError as error:
            raise TypeError(f"A perturbation has a norm for each example, which cannot be told here: {error}") from None
        self._put_back: Callable[[], None] | None = None
        self.counted: Tensor | float = 1.0
        """1, or (B, T, 1) with 0 at padding, which is not perturbed; known after the first pass."""

    def predict(self, perturbation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prediction with the perturbation added, and the perturbation.

        ``None`` is zeros that require a gradient, which is then the gradient at the place itself, (B, ...).
        """
        added: list[Tensor] = []

        def add(point: Any) -> Tensor:
            self._check(point)
            self.counted = self._not_padding(point)
            added.append(torch.zeros_like(point, requires_grad=True) if perturbation is None else perturbation)
            return point + self.counted * added[0]  # type: ignore[no-any-return]

        with buffers_aside(self._module), unlogged(self._module), self._same_masks():
            if self._place is None:
                inputs = self._inputs
                changed = {key: add(inputs[key]) for key in inputs} if isinstance(inputs, Mapping) else add(inputs)
                prediction = self._module.rdrop_predict(changed)
            else:
                hook = self._place.register_forward_hook(lambda _, __, output: None if added else add(output))
                try:
                    prediction = self._module.rdrop_predict(self._inputs)
                finally:
                    hook.remove()
        if not added and any(map(is_compiled, self._module.modules())):
            raise ValueError(
                f"{self._named_place()} was not seen in a forward pass: the network around it is compiled, which hides "
                "the calls of its submodules. Train this regularizer without torch.compile, or compile other parts."
            )
        if not added:
            raise ValueError(f"{self._named_place()} was not called in a forward pass; name another one: at='...'.")
        return prediction, added[0]

    @contextmanager
    def _same_masks(self) -> Iterator[None]:
        if self._put_back is None:
            self._put_back = random_states(self._module.device)
            yield
            return
        go_on = random_states(self._module.device)
        self._put_back()
        try:
            yield
        finally:
            go_on()

    def _not_padding(self, point: Tensor) -> Tensor | float:
        # it may be the mask of other positions than those of a place that was named
        named = isinstance(self._inputs, Mapping) and self._at is None
        mask = self._inputs.get("attention_mask") if named else None
        if not isinstance(mask, Tensor) or point.dim() != 3 or mask.shape != point.shape[:2]:
            return 1.0
        return (mask != 0).unsqueeze(-1).to(point.dtype)

    def _check(self, point: Any) -> None:
        if not isinstance(point, Tensor) or not point.is_floating_point():
            found = f"{point.dtype}" if isinstance(point, Tensor) else f"a {type(point).__name__}"
            raise TypeError(f"{self._named_place()} gives {found}, where a tensor of floats is perturbed: at='...'.")
        if point.dim() == 0 or len(point) != self._examples:
            raise ValueError(
                f"{self._named_place()} gives the shape {tuple(point.shape)} for {self._examples} examples; a "
                "perturbation has a norm for each example, (B, ...). Name another submodule: at='...'."
            )

    def _named_place(self) -> str:
        names = {module: name for name, module in self._module.named_modules()}
        return "The input" if self._place is None else f"{names[self._place]}, the place of the perturbation,"


def unit(direction: Tensor) -> Tensor:
    """Each example's vector divided by its L2 norm over all dimensions but the first; 0 stays 0.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    rows = direction.reshape(len(direction), -1)
    # the squares of small numbers would be 0; after this the largest is 1, or all are 0
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1)
    return (rows / norm).reshape(direction.shape)


def _find(network: nn.Module, inputs: Any, at: str | None) -> nn.Module | None:
    """The submodule whose output is perturbed; None is the input itself."""
    modules = submodules.named(network)
    if at is not None:
        if at in modules:
            return modules[at]
        raise submodules.unknown("at", at, network, modules)
    for part in modules.values():
        config = getattr(part, "config", None)
        if config is not None and hasattr(part, "get_input_embeddings"):
            # a decoder has embeddings of its own, and what both share may be called by neither
            model: Any = part.get_encoder() if getattr(config, "is_encoder_decoder", False) else part  # type: ignore[operator]
            embeddings: nn.Module = model.get_input_embeddings()
            return embeddings
    values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if len(values) == 1 and isinstance(values[0], Tensor) and values[0].is_floating_point():
        return None
    for part in modules.values():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            return part
    raise ValueError(
        f"No place for a perturbation is found: the input is no single tensor of floats, and {type(network).__name__} "
        "has no embedding. Name the submodule whose output is perturbed: at='...'."
    )
