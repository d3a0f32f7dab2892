"""Forward passes with a perturbation at one place in the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rdrop import submodules, views
from lightning_rdrop._compat import is_compiled
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.nesting import copied
from lightning_rdrop.probe import copied_buffers, logging_disabled, random_states


class Passes:
    """Forward passes of one batch through a module, each with a perturbation added at one place.

    The passes differ only in the perturbation: all use the dropout masks of the first pass, as in the code of Miyato
    et al. (github.com/takerum/vat_tf uses the same seed). With different masks, the direction that moves the
    prediction most would be noise. Running statistics and all other buffers are restored afterwards, and ``forward``
    logs nothing.

    Args:
        module: a module with the mixin.
        inputs: the inputs of B examples.
        at: see :class:`~lightning_rdrop.Regularizer`.

    Raises:
        ValueError: an unknown submodule, or no place was found.
        TypeError: the number of examples in the inputs is unknown.
    """

    def __init__(self, module: Hooks, inputs: Any, at: str | None) -> None:
        self._module, self._inputs = module, inputs
        self._at = at
        self._place = _find(self._module, inputs, at)
        try:
            self._examples = views.batch_size(inputs)
        except TypeError as error:
            raise TypeError(f"A perturbation has a norm per example, whose number is unknown here: {error}") from None
        self._restore_masks: Callable[[], None] | None = None
        self.counted: Tensor | float = 1.0
        """1, or (B, T, 1) with 0 at padding, which is not perturbed; set by the first pass."""

    def predict(self, perturbation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict with the perturbation added, and return the prediction and the perturbation.

        ``None`` adds zeros that require a gradient: theirs is the gradient at the perturbed place itself, (B, ...).
        """
        added: list[Tensor] = []

        def add(point: Any) -> Tensor:
            self._check(point)
            self.counted = self._not_padding(point)
            added.append(torch.zeros_like(point, requires_grad=True) if perturbation is None else perturbation)
            return point + self.counted * added[0]  # type: ignore[no-any-return]

        with copied_buffers(self._module), logging_disabled(self._module), self._same_masks():
            if self._place is None:
                inputs = self._inputs
                changed = {key: add(inputs[key]) for key in inputs} if isinstance(inputs, Mapping) else add(inputs)
                prediction = self._module.rdrop_predict(changed)
            else:
                hook = self._place.register_forward_hook(lambda _, __, output: None if added else add(output))
                try:
                    prediction = self._module.rdrop_predict(copied(self._inputs))
                finally:
                    hook.remove()
        if not added and any(map(is_compiled, self._module.modules())):
            raise ValueError(
                f"{self._named_place()} was not seen in a forward pass: the network around it is compiled, which hides "
                "calls of its submodules. Train with this regularizer without torch.compile, or compile other parts."
            )
        if not added:
            raise ValueError(
                f"{self._named_place()} was not called in a forward pass. Name another submodule: at='...'."
            )
        return prediction, added[0]

    @contextmanager
    def _same_masks(self) -> Iterator[None]:
        device = views.device_of(self._module, self._inputs)
        if self._restore_masks is None:
            self._restore_masks = random_states(device)
            yield
            return
        restore = random_states(device)
        self._restore_masks()
        try:
            yield
        finally:
            restore()

    def _not_padding(self, point: Tensor) -> Tensor | float:
        # the mask may not fit the positions of a place chosen by name
        named = isinstance(self._inputs, Mapping) and self._at is None
        mask = self._inputs.get("attention_mask") if named else None
        if not isinstance(mask, Tensor) or point.dim() != 3 or mask.shape != point.shape[:2]:
            return 1.0
        return (mask != 0).unsqueeze(-1).to(point.dtype)

    def _check(self, point: Any) -> None:
        if not isinstance(point, Tensor) or not point.is_floating_point():
            found = f"{point.dtype}" if isinstance(point, Tensor) else f"a {type(point).__name__}"
            raise TypeError(
                f"{self._named_place()} gives {found}, but only a floating-point tensor can be perturbed. Name another "
                "submodule: at='...'."
            )
        if point.dim() == 0 or len(point) != self._examples:
            raise ValueError(
                f"{self._named_place()} gives the shape {tuple(point.shape)} for {self._examples} examples, but a "
                "perturbation has a norm per example, (B, ...). Name another submodule: at='...'."
            )

    def _named_place(self) -> str:
        names = {module: name for name, module in self._module.named_modules()}
        return "The input" if self._place is None else f"{names[self._place]}, the place of the perturbation,"


def unit(direction: Tensor) -> Tensor:
    """Divide the vector of each example by its L2 norm over all dimensions but the first; 0 stays 0.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    rows = direction.reshape(len(direction), -1)
    # squares of small numbers would underflow: scale the largest number to 1 first, unless all are 0
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1)
    return (rows / norm).reshape(direction.shape)


def _find(network: nn.Module, inputs: Any, at: str | None) -> nn.Module | None:
    """Find the submodule whose output is perturbed; None is the input itself."""
    modules = submodules.named(network)
    if at is not None:
        if at in modules:
            return modules[at]
        raise submodules.unknown("at", at, network, modules)
    for part in modules.values():
        config = getattr(part, "config", None)
        if config is not None and hasattr(part, "get_input_embeddings"):
            # the decoder has its own embeddings, and shared ones may be called by neither
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
        "No place for the perturbation was found: the input is not a single floating-point tensor, and "
        f"{type(network).__name__} has no embedding. Name the submodule whose output to perturb: at='...'."
    )
