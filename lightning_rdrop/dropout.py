"""Find the stochastic layers of a network, set their probabilities, and switch them on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from operator import attrgetter
from typing import Literal

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_rdrop.arguments import probability
from lightning_rdrop.submodules import few

_DROPS = re.compile(r"(?!.*(?-i:RDrop)).*(drop(?!ped|ping)|stochastic_?depth)", re.IGNORECASE)
"""Names of dropout classes, which keep their probability in ``p`` or ``prob``; excludes names such as LitRDrop."""
_NAMES_PROBABILITY = re.compile(
    r"(?!_?rdrop|.*lr_?drop).*(drop(out|_?path|_?connect|_?block)?|stochastic_?depth)(_?(p|prob|probability|rate|ratio))?"
    r"(_?\d+)?",
    re.IGNORECASE,
)
"""Names of such probabilities in other classes; excludes drop_rate_decay, drop_token_id and lr_drop."""
_DROPS_EXAMPLES = re.compile(r"drop_?path|drop_?connect|stochastic_?depth", re.IGNORECASE)
_DROPS_BATCHES = re.compile(r"layer_?drop(?!out)", re.IGNORECASE)
_READ_FROM_CONFIG = {
    r"(Data2VecAudio|Hubert|SEW|UniSpeech|UniSpeechSat|WavLM)Encoder(StableLayerNorm)?": ["layerdrop"],
    r"Wav2Vec2(Bert|Conformer)?Encoder(StableLayerNorm)?": ["layerdrop"],
    r"SeamlessM4T(v2)?ConformerEncoder": ["speech_encoder_layerdrop"],
    r"SpeechT5SpeechDecoderPrenet": ["speech_decoder_prenet_dropout"],
    r"FalconDecoderLayer": ["attention_dropout", "hidden_dropout"],
    r"PersimmonAttention|(DistilBert|Falcon|GPTNeoX?)FlashAttention2": ["attention_dropout"],
    r"GPTJFlashAttention2": ["attn_pdrop"],
    r"(Beit|Data2VecVision)SdpaSelfAttention": ["attention_probs_dropout_prob"],
    r"Blt(LocalEncoder|LocalDecoder|GlobalTransformer)|ProphetNetEncoder": ["dropout"],
}
"""Hugging Face classes whose ``forward`` reads a probability from ``self.config``, and its name there."""


@dataclass(frozen=True)
class StochasticLayer:
    """A place in a network that draws random numbers.

    Args:
        name: the path of a module (``encoder.drop``), or of a probability that a module passes to a functional
            dropout (``encoder.attention.dropout``, ``encoder.config.layerdrop``).
        kind: the class of the module, in the latter case with the attribute (``MultiheadAttention.dropout``).
        scope: what one random number decides: an ``"element"`` (or a channel), a branch for an ``"example"``
            (DropPath, row-wise StochasticDepth), or a branch for the whole ``"batch"`` including all views
            (LayerDrop, batch-wise StochasticDepth).
        trained: whether it affects trained parameters: the nearest enclosing module with parameters has one that
            requires a gradient, or there is one upstream, such as an adapter in an earlier layer of a frozen model.
        module: the module whose mode switches it on and off.
        attribute: the attribute of the module with the probability.
    """

    name: str
    kind: str
    scope: Literal["element", "example", "batch"]
    trained: bool
    module: nn.Module = field(repr=False)
    attribute: str = field(repr=False)

    @property
    def p(self) -> float:
        """The current dropout probability."""
        return float(attrgetter(self.attribute)(self.module))

    @property
    def active(self) -> bool:
        """Whether it currently drops anything, that is p > 0 and its module is in training mode."""
        return self.p > 0 and self.module.training


def stochastic_layers(network: nn.Module) -> list[StochasticLayer]:
    """Every stochastic layer that is visible from outside, in the order of the modules.

    These are torch's dropout modules, timm's DropPath and torchvision's StochasticDepth, and the probabilities that
    modules keep for a functional dropout: ``dropout`` of MultiheadAttention and of LSTM and GRU (with more than one
    layer), and those that Hugging Face layers copy from their config or read there in ``forward``. In other modules,
    including a LightningModule, these are attributes in [0, 1] whose names end like ``dropout``, ``attn_drop``,
    ``layerdrop``, ``drop_path``, ``drop_prob``, ``dropout_p`` or ``drop_rate``. A probability written inside a
    ``forward`` is not visible; :func:`lightning_rdrop.guard.diagnose` compares predictions instead.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.LSTM(4, 4, num_layers=2, dropout=0.2))
        >>> [(layer.name, layer.kind, layer.p) for layer in stochastic_layers(network)]
        [('1', 'Dropout', 0.1), ('2.dropout', 'LSTM.dropout', 0.2)]
    """
    modules = dict(network.named_modules())
    trained = _trained(modules)
    layers = []
    for path, module in modules.items():
        for attribute in _probabilities(module):
            suffix = "" if attribute in ("p", "prob", "drop_prob") else f".{attribute}"
            kind = type(module).__name__ + suffix
            name = (path + suffix).removeprefix(".")
            layers.append(StochasticLayer(name, kind, _scope(kind, module), path in trained, module, attribute))
    return layers


def set_probability(network: nn.Module, p: float | Mapping[str, float]) -> dict[str, float]:
    """Set dropout probabilities and return the earlier ones, which can be passed to a second call to restore them.

    A single number applies to all layers that drop elements or channels. DropPath, StochasticDepth and LayerDrop,
    whose probabilities have another meaning, are only set by name. Values in a Hugging Face config that no ``forward``
    reads are not changed.

    Args:
        network: changed in place.
        p: a probability, 0 <= p < 1; or several by name, with the names of :func:`stochastic_layers`.

    Returns:
        The earlier probabilities by name, plain floats.

    Raises:
        ValueError: ``p`` is out of range, or a name does not exist.

    Example:
        >>> network = nn.Sequential(nn.Dropout(0.1), nn.MultiheadAttention(4, 2, dropout=0.2))
        >>> earlier = set_probability(network, 0.3)
        >>> earlier, network[1].dropout
        ({'0': 0.1, '1.dropout': 0.2}, 0.3)
        >>> set_probability(network, earlier), network[1].dropout
        ({'0': 0.3, '1.dropout': 0.3}, 0.2)
    """
    layers = {layer.name: layer for layer in stochastic_layers(network)}
    if not isinstance(p, Mapping):
        p = probability("p", p, below_one=True)
        p = {layer.name: p for layer in layers.values() if layer.scope == "element"}
    unknown = few(name for name in p if name not in layers)
    if unknown:
        raise ValueError(f"The network has no stochastic layer {unknown}; it has {few(layers) or 'none'}.")
    earlier = {name: layers[name].p for name in p}
    for name, value in p.items():
        holder, _, attribute = layers[name].attribute.rpartition(".")
        setattr(attrgetter(holder)(layers[name].module) if holder else layers[name].module, attribute, value)
    return earlier


def switch_on(network: nn.Module) -> list[str]:
    """Put all trained parts into training mode, so that their dropout is active.

    Normalization with running statistics (BatchNorm), and frozen parts with the dropout inside them, keep their mode.
    A part is frozen if neither it nor anything upstream has a parameter that requires a gradient. The order is known
    within an ``nn.Sequential``, an ``nn.ModuleList`` and a Hugging Face model, whose children are assumed to run in
    the order of their definition.

    Returns:
        The names of the stochastic layers with p > 0 that were switched on.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)).eval()
        >>> switch_on(network), network[1].training
        (['2'], False)
    """
    dead = dead_layers(network)
    modules = dict(network.named_modules())
    for path in _trained(modules):
        if not _has_running_statistics(modules[path]):
            modules[path].training = True
    return [layer.name for layer in dead]


def set_dropout_modes(network: nn.Module, training: Mapping[nn.Module, bool] | None = None) -> None:
    """Set the modes for dropout passes outside of training: as in training, but without updating any statistics.

    Normalization with running statistics (BatchNorm) is put into eval mode, so that they are used but not changed.

    Args:
        network: the network whose modes are set.
        training: whether each module was in training mode when the network was trained. If not given, trained parts
            are put into training mode, or all parts if nothing is trained, as after ``LightningModule.freeze``.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)).eval()
        >>> set_dropout_modes(network)
        >>> [module.training for module in network]
        [True, False, True]
    """
    modules = dict(network.named_modules())
    frozen = not any(parameter.requires_grad for parameter in network.parameters())
    trained = _trained(modules)
    for path, module in modules.items():
        mode = frozen or path in trained if training is None else training.get(module, False)
        module.training = mode and not _has_running_statistics(module)


def dead_layers(network: nn.Module) -> list[StochasticLayer]:
    """The stochastic layers with p > 0 that are in eval mode inside a trained part.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1).eval())
        >>> [layer.name for layer in dead_layers(network)]
        ['1']
    """
    return [layer for layer in stochastic_layers(network) if layer.p > 0 and layer.trained and not layer.active]


def as_table(network: nn.Module) -> str:
    """Format the stochastic layers as a table, one per line.

    Example:
        >>> print(as_table(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.MultiheadAttention(4, 2).eval())))
        module     kind                          p  mode
        1          Dropout                     0.1  train
        2.dropout  MultiheadAttention.dropout    0  eval
    """
    rows = [("module", "kind", "p", "mode")]
    for layer in stochastic_layers(network):
        mode = ("train" if layer.module.training else "eval") + ("" if layer.trained else ", frozen")
        rows.append((layer.name, layer.kind, f"{layer.p:g}", mode))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows)


def _probabilities(module: nn.Module) -> list[str]:
    """The attributes of a module that are dropout probabilities."""
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return []  # its dropout is applied between layers
    own = ("p", "prob") if isinstance(module, _DropoutNd) or _DROPS.match(type(module).__name__) else ()
    kept = [name for name, value in vars(module).items() if name in own or _keeps_probability(name, value)]
    if hasattr(module, "config"):
        kept += [f"config.{name}" for name in _read_from_config(module)]
    return [name for name in kept if _is_probability(attrgetter(name)(module))]


def _read_from_config(module: nn.Module) -> list[str]:
    bases = [base.__name__ for base in type(module).__mro__]
    found = [read for names, read in _READ_FROM_CONFIG.items() if any(re.fullmatch(names, base) for base in bases)]
    return [name for read in found for name in read if hasattr(module.config, name)]


def _keeps_probability(name: str, value: object) -> bool:
    """Whether an attribute is a dropout probability. An integer is a count, or 0 if dropout is switched off."""
    if isinstance(value, Integral) and (value or name.endswith("_drop")):
        return False  # num_drop = 0
    return _NAMES_PROBABILITY.fullmatch(name) is not None


def _is_probability(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _scope(kind: str, module: nn.Module) -> Literal["element", "example", "batch"]:
    if _DROPS_BATCHES.search(kind) or getattr(module, "mode", None) == "batch":
        return "batch"
    return "example" if _DROPS_EXAMPLES.search(kind) else "element"


def _has_running_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


def _trained(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths of all modules that are trained or downstream of trained parameters."""
    downstream = _downstream(modules)
    trained = set()
    for path in modules:
        owner = path
        while owner and next(modules[owner].parameters(), None) is None:
            owner = owner.rpartition(".")[0]
        gradients = [parameter.requires_grad for parameter in modules[owner].parameters()]
        if any(gradients) or not gradients or owner in downstream:
            trained.add(path)
    return trained


def _downstream(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths behind the first trained parameter of a chain, whose children run in the order of their definition."""
    found = set()
    chain, reached = None, False
    for path, module in modules.items():
        if chain is None or not path.startswith(chain):
            chain, reached = (f"{path}." if path else "") if _is_chain(module) else None, False
        if reached:
            found.add(path)
        own = module.parameters(recurse=False)
        reached = chain is not None and (reached or any(parameter.requires_grad for parameter in own))
    return found


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList)) or hasattr(module, "base_model_prefix")
