"""Controls for R-Drop besides plain training: the same time, and the same doubled rows without the kl."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

from pytorch_lightning.callbacks import Timer

from lightning_rdrop.callbacks import AdaptiveAlpha, AlphaScheduler
from lightning_rdrop.compare.config import Config, instances
from lightning_rdrop.compare.plan import Plan
from lightning_rdrop.compare.results import Row
from lightning_rdrop.compare.summary import Summary

_DURATIONS = {"T_max", "T_0", "total_steps", "total_iters", "epochs", "step_size", "milestones"}
"""Arguments of learning rate schedules that are numbers of epochs or steps."""


def add_equal_cost(plan: Plan, rows: Sequence[Row], family: str) -> Plan:
    """Add two variants to the plan, once the runs have shown what R-Drop costs.

    ``REFERENCE-time-of-NAME`` is the reference trained for the time of R-Drop: the Trainer's ``max_epochs``,
    ``max_steps`` and ``max_time``, and the durations in ``lr_scheduler``, grow in proportion. ``NAME-alpha0`` is
    R-Drop with alpha 0, so that only the rows are doubled. They are added once and stay the same for later seeds.

    Args:
        plan: contains the variant, or its grid, whose chosen variant is used.
        rows: the runs so far.
        family: the variant with R-Drop.

    Raises:
        ValueError: no seed of both R-Drop and the reference is finished, or no variant of a grid is chosen.
    """
    if family in plan.equal_cost:
        return plan
    summary = Summary(plan, rows)
    reference, variant = (summary.chosen(one) for one in (next(iter(plan.families)), family))
    if reference is None or variant is None:
        raise ValueError(f"--equal-cost {family}: no validation metric to choose a variant of the grid by.")
    ratio = max(1.0, summary.relative(variant, "seconds"))
    if math.isnan(summary.relative(variant, "seconds")):
        raise ValueError(f"--equal-cost {family}: no seed is finished for both {variant} and {reference}.")
    added = {
        f"{next(iter(plan.families))}-time-of-{family}": _longer(plan.variants[reference], ratio),
        f"{family}-alpha0": _without_kl(plan.variants[variant]),
    }
    reasons = (
        f"{reference} trained for the time of {variant}, {ratio:.2f} times its own",
        f"{variant} with alpha 0, which doubles the rows without the kl",
    )
    families = plan.families | {name: [name] for name in added}
    equal_cost = plan.equal_cost | {family: dict(zip(added, reasons, strict=True))}
    return Plan(plan.variants | added, families, plan.seed_to, equal_cost)


def _longer(config: Config, ratio: float) -> Config:
    config = copy.deepcopy(config)
    trainer = config.setdefault("trainer", {})
    limits = {key: trainer[key] for key in ("max_epochs", "max_steps") if trainer.get(key) not in (None, -1)}
    seconds = Timer(trainer.get("max_time")).time_remaining()
    if seconds is not None:
        trainer["max_time"] = {"seconds": _times(seconds, ratio)}
    elif not limits:
        limits = {"max_epochs": 1000}  # Lightning's own default
    longer = {key: _times(limit, ratio) for key, limit in limits.items()}
    trainer |= longer

    ratio = max((longer[key] / limit for key, limit in limits.items()), default=ratio)  # epochs are rounded up
    schedule = (config.get("lr_scheduler") or {}).get("init_args", {})
    schedule |= {key: _times(schedule[key], ratio) for key in _DURATIONS & schedule.keys()}
    return config


def _times(duration: Any, ratio: float) -> Any:
    """A number of epochs or steps, or a list of such numbers, times a ratio."""
    if isinstance(duration, list):
        return [_times(one, ratio) for one in duration]
    return duration and math.ceil(duration * ratio - 1e-6)


def _without_kl(config: Config) -> Config:
    config = copy.deepcopy(config)
    config["model"].setdefault("init_args", {})["rdrop_alpha"] = 0.0
    listed = [one for one in instances(config, "trainer.callbacks") if not _sets_alpha(one)]
    config.setdefault("trainer", {})["callbacks"] = listed
    named = config.get("callbacks") or {}
    config["callbacks"] = {name: None if one and _sets_alpha(one) else one for name, one in named.items()}
    return config


def _sets_alpha(callback: Config) -> bool:
    kind: Any = resolve_name(callback["class_path"])
    ours = isinstance(kind, type) and issubclass(kind, (AlphaScheduler, AdaptiveAlpha))
    return ours and kind.attribute == "rdrop_alpha"
