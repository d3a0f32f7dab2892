"""What is compared: variants with their configs, and which is the reference."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_rdrop.compare.config import Config, arguments_of, changes, checkpointed, resolve

_GRID = "grid"
"""The family of a grid that is not one of a variant."""


@dataclass
class Plan:
    """A comparison; it is kept in ``comparison.yaml``.

    Args:
        variants: their configs by name.
        families: the variants of a grid, by the name of what they are variants of. One of them is chosen, on
            validation, to stand for all. A variant without a grid is a family of its own.
        seed_to: arguments besides ``seed_everything`` that a run's seed is given to.
        equal_cost: the variants that were added at the cost of one, by its name, and what each of them is.
    """

    variants: dict[str, Config] = field(default_factory=dict)
    families: dict[str, list[str]] = field(default_factory=dict)
    seed_to: list[str] = field(default_factory=list)
    equal_cost: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, base: Sequence[str], variants: Sequence[str], grids: Sequence[str] = (), seed_to: Sequence[str] = ()
    ) -> Plan:
        """The plan of a command, every config of which is one that ``fit`` takes.

        Args:
            base: config files.
            variants: ``NAME=OVERLAY`` each; the first is the reference.
            grids: ``KEY=VALUE,VALUE`` makes variants of the base, ``NAME:KEY=VALUE,VALUE`` of a variant.
            seed_to: as above.

        Raises:
            ValueError: a variant that ``fit`` does not take, or two of one name.
        """
        files = [argument for path in base for argument in ("--config", path)]
        _resolve("--config", files)
        overlays: dict[str, str] = {}
        for variant in variants:
            name, overlay = _split(variant)
            if name in overlays:
                raise ValueError(f"--variant {variant}: there are two of the name {name}.")
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
        """The validation metric by which checkpoints are chosen, and ``"max"`` or ``"min"``."""
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
        """Keep it, whole or not at all."""
        part = folder / "comparison.part"
        part.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True))
        part.replace(folder / "comparison.yaml")

    def continues(self, earlier: Plan, begun: Collection[str]) -> Plan:
        """This plan with the variants of an earlier command that it does not name again.

        Args:
            earlier: the plan of that command.
            begun: its variants with runs that have not failed, whose configs stay.

        Raises:
            ValueError: a config is another one under the same name, or checkpoints are chosen by another metric.
        """
        for name in self.variants.keys() & earlier.variants.keys() & {*begun}:
            different = changes(earlier.variants[name], self.variants[name])
            if different and (different := changes(_of_today(earlier.variants[name]), self.variants[name])):
                more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
                raise ValueError(
                    f"variant {name} has another config than the runs that are there already: "
                    f"{'; '.join(different[:5])}{more}. Give it another name, or the comparison another --out."
                )
        if self.seed_to != earlier.seed_to:
            raise ValueError(
                f"--seed-to was {earlier.seed_to} for the runs that are there already, and is {self.seed_to} now. "
                "Give the comparison another --out."
            )
        families = {
            name: list(dict.fromkeys([*self.families.get(name, []), *earlier.families.get(name, [])]))
            for name in [*self.families, *earlier.families]
        }
        variants = self.variants | {name: c for name, c in earlier.variants.items() if name not in self.variants}
        merged = Plan(variants, families, self.seed_to, earlier.equal_cost)
        _same_monitor(merged)
        return merged


def settings_of(variant: str) -> dict[str, str]:
    """What a grid sets in one of its variants.

    Example:
        >>> settings_of("rdrop:rdrop_alpha=1,p=0.3"), settings_of("plain")
        ({'rdrop_alpha': '1', 'p': '0.3'}, {})
    """
    settings = (setting.partition("=") for setting in variant.rpartition(":")[2].split(","))
    return {key: value for key, equals, value in settings if equals}


def _of_today(config: Config) -> Config:
    """A config of an earlier version, with the defaults of arguments that have been added since."""
    try:
        return resolve(["--config", yaml.safe_dump(config)])
    except ValueError:  # it has arguments that there are no more
        return config


def _split(variant: str) -> tuple[str, str]:
    name, equals, overlay = variant.partition("=")
    if not equals or not name or set(name) & set("/\\:") or name.startswith((".", "-")) or name == _GRID:
        raise ValueError(
            f"--variant {variant}: write NAME=FILE.yaml, or NAME='--model.rdrop_alpha=1'. A name is one of a folder, "
            f"without slashes and colons, and not {_GRID}."
        )
    return name, overlay


def _axis(grid: str, variants: dict[str, str]) -> tuple[str, list[tuple[str, str]]]:
    """The variant that a grid is one of, and its settings, key and value each."""
    left, _, values = grid.partition("=")
    name, colon, key = left.rpartition(":")
    settings = [(key, value) for value in values.split(",") if value]
    if not key or not settings or len(set(settings)) < len(settings):
        raise ValueError(f"--grid {grid}: write KEY=VALUE,VALUE, with different values.")
    if colon and name not in variants:
        raise ValueError(f"--grid {grid}: there is no variant {name} among {', '.join(variants)}.")
    return name or _GRID, settings


def _same_monitor(plan: Plan) -> None:
    """Values are chosen, and columns compared, by one validation metric."""
    monitors = {name: checkpointed(config) for name, config in plan.variants.items()}
    if len(set(monitors.values())) > 1:
        raise ValueError(f"the variants choose their checkpoints by different metrics: {monitors}.")
    if plan.monitor is None and any(len(members) > 1 for members in plan.families.values()):
        raise ValueError("--grid chooses on validation: give the config a ModelCheckpoint with a monitor and a mode.")


def _resolve(what: str, arguments: Sequence[str]) -> Config:
    """The config of these arguments, or what is wrong with them, and where."""
    try:
        return resolve(arguments)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
