import copy
import math
import warnings

import pytest
import pytorch_lightning as pl
import yaml

from lightning_rdrop import AlphaScheduler
from lightning_rdrop.compare.config import resolve
from lightning_rdrop.compare.equal_cost import add_equal_cost
from lightning_rdrop.compare.plan import Plan
from lightning_rdrop.compare.report import Report
from lightning_rdrop.compare.summary import Summary

for package in ("scipy", "rich", "matplotlib"):
    pytest.importorskip(package)

CONFIG = {
    "model": {"class_path": "Classifier", "init_args": {"network": {"class_path": "torch.nn.Flatten"}}},
    "callbacks": {
        "best": {
            "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "val/accuracy", "mode": "max"},
        }
    },
}


def row(variant, seed, test, val=0.5, seconds=10.0, memory=100.0):
    costs = {"steps": 8, "seconds": seconds, "peak_memory_mib": memory, "status": "done"}
    return {"variant": variant, "seed": seed, "test/ce": 1 - test, "test/accuracy": test, "val/accuracy": val} | costs


def failed(variant, seed):
    return {"variant": variant, "seed": seed, "status": "failed: KeyError: 'x'"}


def plan(*variants, mode="max", **families):
    config = copy.deepcopy(CONFIG)
    config["callbacks"]["best"]["init_args"]["mode"] = mode
    members = {name for grid in families.values() for name in grid}
    alone = {name: [name] for name in variants if name not in members}
    return Plan({name: copy.deepcopy(config) for name in variants}, alone | families)


def report_of(plan, rows):
    return Report(Summary(plan, rows))


HAND = [  # differences of rdrop: 0.02, 0.01, 0.03, 0.00, 0.04, as in test_compare_statistics
    *(row("plain", seed, 0.1 * seed, val=0.6) for seed in range(1, 6)),
    *(row("rdrop", seed, 0.1 * seed + more, val=0.7, seconds=16.0, memory=150.0)
      for seed, more in zip(range(1, 6), (0.02, 0.01, 0.03, 0.0, 0.04), strict=True)),
]  # fmt: skip


def test_the_table_worked_out_by_hand(tmp_path):
    report = report_of(plan("plain", "rdrop"), HAND)
    written = report.markdown()
    assert report.summary.metrics == ["test/accuracy", "test/ce"]
    assert "| plain | 5 | 0.6000 | 0.3000 | 0.1581 | reference |  |  | 1.00x | 1.00x |" in written
    assert "| rdrop | 5 | 0.7000 | 0.3200 | 0.1636 | +0.0200 ± 0.0196 | better | 8 | 1.60x | 1.50x |" in written
    assert "| -0.0200 ± 0.0196 | lower |" in written  # of ce it is not known which way is better
    report.write(tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert written in (tmp_path / "report.md").read_text()


def test_a_grid_of_two_settings_is_a_picture_too(tmp_path):
    grid = [f"rdrop:alpha={alpha},p={p}" for alpha in (1, 4) for p in (0.1, 0.3)]
    rows = [
        row(name, seed, 0.5 + 0.1 * number + 0.01 * seed, val=0.5 if number == 1 else 0.4)
        for number, name in enumerate(["plain", *grid])
        for seed in (1, 2)
    ]
    report_of(plan("plain", *grid, rdrop=grid), rows).write(tmp_path)
    assert (tmp_path / "rdrop.png").stat().st_size > 10_000
    assert (
        "![test/accuracy over the grid rdrop, the chosen variant framed](rdrop.png)"
        in (tmp_path / "report.md").read_text()
    )
    one_axis = [name.partition(",")[0] for name in grid]
    report_of(plan("plain", *one_axis, other=one_axis), rows).write(tmp_path)
    assert not (tmp_path / "other.png").exists()


def test_lower_may_be_better():
    assert "+0.0200 ± 0.0196 | worse |" in report_of(plan("plain", "rdrop", mode="min"), HAND).markdown()


def test_names_with_an_underscore():
    report = plan("plain", "rdrop")
    for config in report.variants.values():
        config["callbacks"]["best"]["init_args"] |= {"monitor": "val_loss", "mode": "min"}
    rows = [{"variant": "plain", "seed": 1, "test_acc": 0.5, "test_loss": 0.1, "val_loss": 0.2, "status": "done"}]
    assert Summary(report, rows).metrics == ["test_loss", "test_acc"]
    assert "| best val_loss |" in report_of(report, rows).markdown()


def test_what_is_not_shown_says_so():
    rows = [row("plain", 1, 0.5), row("plain", 2, 0.5), row("rdrop", 1, 0.7), row("rdrop", 2, 0.4)]
    assert "| +0.0500 ± 1.9059 | not shown |" in report_of(plan("plain", "rdrop"), rows).markdown()


def test_only_seeds_of_both_are_paired():
    rows = [*HAND[:5], row("rdrop", 2, 0.3, seconds=20.0), failed("rdrop", 1), row("rdrop", 9, 0.9, seconds=99.0)]
    written = report_of(plan("plain", "rdrop"), rows).markdown()
    assert "| rdrop | 2 (1 failed) | 0.5000 | 0.6000 | 0.4243 | +0.1000 | not shown |  | 2.00x | 1.00x |" in written
    assert "- rdrop, seed 1: failed: KeyError: 'x'" in written


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_grid_is_chosen_on_validation_whatever_the_test_says(mode):
    rows = []
    for seed in (1, 2, 3):
        rows += [row("plain", seed, 0.5), row("a=1", seed, 0.9, val=0.6), row("a=2", seed, 0.1, val=0.8)]
    rows.append(row("a=1", 4, 0.9, val=1.0))  # a seed that one of them alone has does not count
    report = report_of(plan("plain", "a=1", "a=2", mode=mode, grid=["a=1", "a=2"]), rows)
    chosen = {"max": "a=2", "min": "a=1"}[mode]
    assert report.summary.chosen("grid") == chosen
    assert f"| {chosen} * | " in report.markdown()
    assert f"{chosen} (marked *) was chosen among 2 variants by the mean of val/accuracy, on validation data only" in (
        report.markdown()
    )


def test_the_reference_may_be_the_chosen_one_of_a_grid():
    rows = [row(name, seed, 0.5, val=val) for name, val in (("p=1", 0.1), ("p=2", 0.2), ("r", 0.3)) for seed in (1, 2)]
    report = report_of(Plan(plan("p=1", "p=2", "r").variants, {"plain": ["p=1", "p=2"], "r": ["r"]}), rows)
    assert report.summary.reference == "p=2"
    assert "| p=2 * | 2 | 0.2000 | 0.5000 | 0.0000 | reference |" in report.markdown()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["test/accuracy", "test/ce"])
def test_a_value_that_is_not_finite_is_named_and_has_no_mean(tmp_path, bad, metric):
    grid = [f"rdrop:alpha={alpha},p={p}" for alpha in (1, 4) for p in (0.1, 0.3)]
    rows = [row(name, seed, 0.1 * seed) for name in ("plain", *grid) for seed in (1, 2, 3)]
    next(one for one in rows if one["variant"] == grid[1])[metric] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_of(plan("plain", *grid, rdrop=grid), rows).write(tmp_path)
    table, _, notes = (tmp_path / "report.md").read_text().partition(f"## {metric}")[2].partition("- difference")
    assert f"| {grid[1]} | 3 | 0.5000 |  |  |  | not shown |  | 1.00x | 1.00x |" in table
    assert f"| {grid[2]} | 3 | 0.5000 | 0." in table
    assert f"- {grid[1]}, seed 1: {metric} is {bad}." in notes


def test_a_metric_that_one_variant_does_not_log_is_blank(tmp_path):
    rows = [row("plain", seed, 0.1 * seed) | {"test/f1": 0.5} for seed in (1, 2)]
    rows += [row("rdrop", seed, 0.1 * seed) for seed in (1, 2)]
    report_of(plan("plain", "rdrop"), rows).write(tmp_path)
    table = (tmp_path / "report.md").read_text().partition("## test/f1")[2]
    assert "| plain | 2 | 0.5000 | 0.5000 | 0.0000 | reference |" in table
    assert "| rdrop | 2 | 0.5000 |  |  |  | not shown |  | 1.00x | 1.00x |" in table
    assert "seed 1:" not in table


@pytest.mark.parametrize("val", [None, math.nan, -math.inf])  # -inf is what ModelCheckpoint makes of NaN
def test_without_validation_nothing_is_chosen(val):
    grid = ["a=1", "a=2"]
    rows = [row(name, 1, 0.5, val=val) for name in ("plain", *grid)]
    if val is None:
        rows = [{key: value for key, value in one.items() if key != "val/accuracy"} for one in rows]
    tuned = plan("plain", *grid, grid=grid)
    report = report_of(tuned, rows)
    assert report.summary.chosen("grid") is None
    assert "*" not in report.markdown()
    assert "- none of the 2 variants of grid was chosen: no mean of val/accuracy is known." in report.notes()
    with pytest.raises(ValueError, match="no validation metric to choose a variant"):
        add_equal_cost(tuned, rows, "grid")


def test_a_report_of_nothing(tmp_path):
    report_of(plan("plain", "rdrop"), [failed("plain", 1)]).write(tmp_path)
    assert "- plain, seed 1: failed" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"max_epochs": 10}, {"max_epochs": 16}),
        ({"max_epochs": 3}, {"max_epochs": 5}),  # never less time than R-Drop has
        ({"max_epochs": -1, "max_steps": 100}, {"max_epochs": -1, "max_steps": 160}),
        ({}, {"max_epochs": 1600}),
        ({"max_time": "00:00:00:10"}, {"max_time": {"seconds": 16}}),
        ({"max_epochs": 10, "max_time": {"minutes": 1}}, {"max_epochs": 16, "max_time": {"seconds": 96}}),
    ],
)
def test_plain_training_with_the_seconds_of_rdrop(trainer, expected):
    before = plan("plain", "rdrop")
    before.variants["plain"]["trainer"] = trainer
    after = add_equal_cost(before, HAND, "rdrop")
    assert after.variants["plain-time-of-rdrop"]["trainer"] == expected
    assert "plain-time-of-rdrop is plain trained for the time of rdrop, 1.60 times" in report_of(after, HAND).notes()
    # it is made once: what later seeds take changes it no more
    slower = [*HAND, row("plain", 6, 0.5), row("rdrop", 6, 0.5, seconds=100.0)]
    assert add_equal_cost(after, slower, "rdrop") == after


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"T_max": 3, "eta_min": 0.001}, {"T_max": 5, "eta_min": 0.001}),
        ({"max_lr": 0.1, "total_steps": 300}, {"max_lr": 0.1, "total_steps": 500}),  # 5 epochs have 500 steps, not 480
        ({"milestones": [1, 2], "gamma": 0.1}, {"milestones": [2, 4], "gamma": 0.1}),
        ({"start_factor": 0.5, "total_iters": 0}, {"start_factor": 0.5, "total_iters": 0}),
    ],
)
def test_the_learning_rate_of_longer_training_falls_as_late(schedule, expected):
    before = plan("plain", "rdrop")
    before.variants["plain"] |= {"trainer": {"max_epochs": 3}, "lr_scheduler": {"init_args": schedule}}
    after = add_equal_cost(before, HAND, "rdrop").variants["plain-time-of-rdrop"]
    assert after["lr_scheduler"]["init_args"] == expected


class Warm(AlphaScheduler):
    """Sets alpha under another name."""


class NoAlphaScheduler(pl.Callback):
    """Sets something else."""


def test_doubled_rows_have_no_alpha_from_anywhere(tmp_path):
    before = plan("plain", "rdrop")
    config = before.variants["rdrop"]
    config["callbacks"]["alpha"] = {"class_path": "lightning_rdrop.AlphaScheduler", "init_args": {"peak": 5.0}}
    config["trainer"] = {"callbacks": [
        {"class_path": "lightning_rdrop.AdaptiveAlpha", "init_args": {"target_kl": 0.1, "horizon": 9}},
        {"class_path": "test_compare_report.Warm"},
        {"class_path": "test_compare_report.NoAlphaScheduler"},
        {"class_path": "lightning_rdrop.callbacks.UnlabeledWeightScheduler"},
        {"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"},
    ]}  # fmt: skip
    doubled = add_equal_cost(before, HAND, "rdrop").variants["rdrop-alpha0"]
    (tmp_path / "doubled.yaml").write_text(yaml.safe_dump(doubled))
    resolved = resolve(["--config", str(tmp_path / "doubled.yaml")])
    assert resolved["model"]["init_args"]["rdrop_alpha"] == 0
    assert resolved["model"]["init_args"].get("rdrop_views", 2) == 2
    assert resolved["callbacks"]["alpha"] is None
    assert [one["class_path"].rpartition(".")[2] for one in resolved["trainer"]["callbacks"]] == [
        "NoAlphaScheduler",
        "UnlabeledWeightScheduler",
        "LearningRateMonitor",
    ]
    assert config["callbacks"]["alpha"]["init_args"]["peak"] == 5.0  # that of R-Drop is as it was


def test_a_single_callback_of_the_trainer_sets_no_alpha_either():
    before = plan("plain", "rdrop")
    before.variants["rdrop"]["trainer"] = {"callbacks": {"class_path": "lightning_rdrop.AlphaScheduler"}}
    assert add_equal_cost(before, HAND, "rdrop").variants["rdrop-alpha0"]["trainer"]["callbacks"] == []


def test_no_equal_cost_without_seconds():
    with pytest.raises(ValueError, match="no seed is finished for both rdrop and plain"):
        add_equal_cost(plan("plain", "rdrop"), [failed("rdrop", 1), row("plain", 1, 0.5)], "rdrop")
