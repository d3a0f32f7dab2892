"""The plan of a comparison: variants, their configs, and the reference."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_rdrop.compare import atomic
from lightning_rdrop.compare.config import Config, arguments_of, changes, checkpointed, resolve

_GRID = "grid"
"""The family of a grid that belongs to no variant."""


@dataclass
class Plan:
    """A comparison, saved as ``comparison.yaml``.

    Args:
        variants: configs by name.
        families: the variants of each grid, by the name of the variant that the grid belongs to. One of them is chosen
            on validation to represent the grid. A variant without a grid is its own family.
        seed_to: arguments besides ``seed_everything`` that are set to a run's seed.
        equal_cost: the variants added to match the cost of a variant, by its name, with a description of each.
    """

    variants: dict[str, Config] = field(default_factory=dict)
    families: dict[str, list[str]] = field(default_factory=dict)
    seed_to: list[str] = field(default_factory=list)
    equal_cost: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, base: Sequence[str], variants: Sequence[str], grids: Sequence[str] = (), seed_to: Sequence[str] = ()
    ) -> Plan:
        """The plan of a command; ``fit`` must accept all of its configs.

        Args:
            base: config files.
            variants: ``NAME=OVERLAY`` each; the first is the reference.
            grids: ``KEY=VALUE,VALUE`` makes variants of the base, ``NAME:KEY=VALUE,VALUE`` of a variant.
            seed_to: as above.

        Raises:
            ValueError: ``fit`` does not accept a variant, or two have the same name.
        """
        files = [argument for path in base for argument in ("--config", path)]
        _resolve("--config", files)
        overlays: dict[str, str] = {}
        for variant in variants:
            name, overlay = _split(variant)
            if name in overlays:
                raise ValueError(f"--variant {variant}: there are two with the name {name}.")
            overlays[name] = overlay
        axes = [_axis(grid, overlays) for grid in grids]
        if any(name == _GRID for name, _ in axes):
            overlays.setdefault(_GRID, "")

        plan = cls(seed_to=[*seed_to])
        for name, overlay in overlays.items():
            arguments = [*files, *arguments_of(overlay)]
            for key in seed_to:
                _resolve(f"--seed-to {key}", [*arguments, f"--{key}=1"])
            for values in itertools.product(*(settings for owner, settings in axes if owner == name)):
                label = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in values)
                member = label if name == _GRID else f"{name}:{label}" if label else name
                settings = [f"--{key}={value}" for key, value in values]
                said = f"--variant {name}={overlay}" if not settings else f"--grid {' '.join(settings)}"
                plan.variants[member] = _resolve(said, [*arguments, *settings])
                plan.families.setdefault(name, []).append(member)
        _same_monitor(plan)
        return plan

    @property
    def monitor(self) -> tuple[str, str] | None:
        """The validation metric that selects checkpoints, and ``"max"`` or ``"min"``."""
        return checkpointed(next(iter(self.variants.values())))

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """The plan of an earlier command; None if there was none."""
        path = folder / "comparison.yaml"
        if not path.exists():
            return None
        kept: dict[str, Any] = yaml.safe_load(path.read_text())
        return cls(**kept)

    def write(self, folder: Path) -> None:
        """Write the plan atomically."""
        text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        atomic.write(folder / "comparison.yaml", text)

    def continues(self, earlier: Plan, begun: Collection[str]) -> Plan:
        """This plan, extended by the other variants of an earlier command.

        The reference stays the same, unless this plan has it after another variant.

        Args:
            earlier: the plan of that command.
            begun: its variants with runs that have not failed, whose configs must not change.

        Raises:
            ValueError: such a config differs, or ``seed_to``, or the metric that selects checkpoints.
        """
        for name in self.variants.keys() & earlier.variants.keys() & {*begun}:
            if different := changes(_with_new_defaults(earlier.variants[name]), self.variants[name]):
                more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
                raise ValueError(
                    f"variant {name} has another config than its existing runs: "
                    f"{'; '.join(different[:5])}{more}. Use another name or another --out."
                )
        if self.seed_to != earlier.seed_to:
            raise ValueError(
                f"--seed-to was {earlier.seed_to} for the existing runs, but is {self.seed_to} now. Use another --out."
            )
        first, second = (self, earlier) if next(iter(earlier.families)) in self.families else (earlier, self)
        families = {
            name: list(dict.fromkeys([*first.families.get(name, []), *second.families.get(name, [])]))
            for name in first.families | second.families
        }
        variants = first.variants | second.variants | self.variants
        merged = Plan(variants, families, self.seed_to, earlier.equal_cost)
        _same_monitor(merged)
        return merged


def settings_of(variant: str) -> dict[str, str]:
    """The settings of a grid's variant, from its name.

    Example:
        >>> settings_of("rdrop:rdrop_alpha=1,p=0.3"), settings_of("plain")
        ({'rdrop_alpha': '1', 'p': '0.3'}, {})
    """
    settings = (setting.partition("=") for setting in variant.rpartition(":")[2].split(","))
    return {key: value for key, equals, value in settings if equals}


def _with_new_defaults(config: Config) -> Config:
    """A config of an earlier version, with the defaults of arguments added since."""
    try:
        return resolve(["--config", yaml.safe_dump(config)])
    except ValueError:  # it has arguments that no longer exist
        return config


def _split(variant: str) -> tuple[str, str]:
    name, equals, overlay = variant.partition("=")
    if not equals or not name or set(name) & set("/\\:") or name.startswith((".", "-")) or name == _GRID:
        raise ValueError(
            f"--variant {variant}: write NAME=FILE.yaml, or NAME='--model.rdrop_alpha=1'. The name becomes a folder: "
            f"it has no slashes or colons, does not begin with . or -, and is not {_GRID}."
        )
    return name, overlay


def _axis(grid: str, variants: dict[str, str]) -> tuple[str, list[tuple[str, str]]]:
    """The variant that a grid belongs to, and the grid's settings, each a key and a value."""
    left, _, values = grid.partition("=")
    name, colon, key = left.rpartition(":")
    settings = [(key, value) for value in values.split(",") if value]
    if not key or not settings or len(set(settings)) < len(settings):
        raise ValueError(f"--grid {grid}: write KEY=VALUE,VALUE, with different values.")
    if colon and name not in variants:
        raise ValueError(f"--grid {grid}: there is no variant {name} among {', '.join(variants)}.")
    return name or _GRID, settings


def _same_monitor(plan: Plan) -> None:
    """Check that all variants select checkpoints by the same metric, and that a grid has one."""
    monitors = {name: checkpointed(config) for name, config in plan.variants.items()}
    if len(set(monitors.values())) > 1:
        raise ValueError(f"the variants select checkpoints by different metrics: {monitors}.")
    if plan.monitor is None and any(len(members) > 1 for members in plan.families.values()):
        raise ValueError("--grid chooses on validation: add a ModelCheckpoint with a monitor and a mode to the config.")


def _resolve(what: str, arguments: Sequence[str]) -> Config:
    """The config of these arguments; an error begins with the option they come from."""
    try:
        return resolve(arguments)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
