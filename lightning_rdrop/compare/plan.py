"""What is compared: variants with their configs, and which is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_rdrop.compare.config import Config, arguments_of, changes, checkpointed, nearest, resolve


@dataclass
class Plan:
    """A comparison; it is kept in ``comparison.yaml``.

    Args:
        variants: their configs by name; the first is the reference.
        seed_to: arguments besides ``seed_everything`` that a run's seed is given to.
    """

    variants: dict[str, Config] = field(default_factory=dict)
    seed_to: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    @property
    def monitor(self) -> tuple[str, str] | None:
        """The validation metric by which checkpoints are chosen, and ``"max"`` or ``"min"``."""
        return checkpointed(self.variants[self.reference])

    @classmethod
    def of(cls, base: Sequence[str], variants: Sequence[str], seed_to: Sequence[str] = ()) -> Plan:
        """The plan of a command, every config of which is one that ``fit`` takes.

        Args:
            base: config files.
            variants: ``NAME=OVERLAY`` each.
            seed_to: as above.

        Raises:
            ValueError: a variant that ``fit`` does not take, or two of one name.
        """
        files = [argument for path in base for argument in ("--config", path)]
        _resolve("--config", files)
        plan = cls(seed_to=tuple(seed_to))
        for variant in variants:
            name, overlay = _split(variant)
            if name in plan.variants:
                raise ValueError(f"--variant {variant}: there are two of the name {name}.")
            arguments = [*files, *arguments_of(overlay)]
            plan.variants[name] = _resolve(f"--variant {variant}", arguments, files)
            for key in seed_to:
                _resolve(f"--seed-to {key}", [*arguments, f"--{key}=1"], arguments)
        return plan

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """The plan of an earlier command; None if there was none."""
        path = folder / "comparison.yaml"
        if not path.exists():
            return None
        kept: dict[str, Any] = yaml.safe_load(path.read_text())
        return cls(kept["variants"], tuple(kept["seed_to"]))

    def write(self, folder: Path) -> None:
        """Keep it, whole or not at all."""
        part = folder / "comparison.part"
        part.write_text(yaml.safe_dump(asdict(self) | {"seed_to": list(self.seed_to)}, sort_keys=False))
        part.replace(folder / "comparison.yaml")

    def continues(self, earlier: Plan) -> Plan:
        """This plan with the variants of an earlier command that it does not name again.

        Raises:
            ValueError: a config is another one under the same name.
        """
        for name in self.variants.keys() & earlier.variants.keys():
            different = changes(earlier.variants[name], self.variants[name])
            if different:
                raise ValueError(
                    f"variant {name} has another config than the runs that are there already: {'; '.join(different)}. "
                    "Give it another name, or the comparison another --out."
                )
        if self.seed_to != earlier.seed_to:
            raise ValueError(
                f"--seed-to was {list(earlier.seed_to)} for the runs that are there already, and is "
                f"{list(self.seed_to)} now. Give the comparison another --out."
            )
        return Plan(self.variants | {k: v for k, v in earlier.variants.items() if k not in self.variants}, self.seed_to)


def _split(variant: str) -> tuple[str, str]:
    name, equals, overlay = variant.partition("=")
    if not equals or not name or set(name) & set("/\\\0") or name.startswith((".", "-")):
        raise ValueError(
            f"--variant {variant}: write NAME=FILE.yaml, or NAME='--model.rdrop_alpha=1'; a name is one of a folder."
        )
    return name, overlay


def _resolve(what: str, arguments: Sequence[str], right: Sequence[str] = ()) -> Config:
    """The config of these arguments; ``right`` are some that are known to be right, with the names that were meant."""
    try:
        return resolve(arguments)
    except ValueError as error:
        near = nearest(str(error), resolve(right, defaults=True)) if right else ""
        raise ValueError(f"{what}: {error}{near}") from None
