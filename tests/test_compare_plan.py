import json
import re
import sys

import pytest
import yaml

from lightning_rdrop.cli import main
from lightning_rdrop.compare.config import checkpointed
from lightning_rdrop.compare.plan import Plan

for package in ("submitit", "scipy", "rich", "matplotlib"):
    pytest.importorskip(package)

CONFIG = {
    "model": {
        "class_path": "Classifier",
        "init_args": {"network": {"class_path": "torch.nn.Dropout"}, "num_classes": 3, "rdrop_alpha": 2.0},
    },
    "callbacks": {
        "alpha": {"class_path": "AlphaScheduler"},
        "best": {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/accuracy", "mode": "max"}},
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 2},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "plain.yaml").write_text("model: {init_args: {rdrop_views: 1}}")
    (tmp_path / "many.yaml").write_text("trainer: {max_epochs: 9}")
    return tmp_path


def planned(*variants, grids=(), **arguments):
    return Plan.of(["base.yaml"], variants, grids, **arguments)


def alphas(plan):
    return {name: config["model"]["init_args"].get("rdrop_alpha", 4.0) for name, config in plan.variants.items()}


def test_variants_lie_over_the_base_in_the_order_of_their_words(folder):
    plan = planned(
        "plain=plain.yaml", "same=", "both=plain.yaml many.yaml --model.rdrop_alpha 1 --trainer.max_epochs=3"
    )
    assert plan.monitor == ("val/accuracy", "max")
    plain, same, both = plan.variants.values()
    assert plain["model"]["init_args"]["rdrop_views"] == 1
    assert "rdrop_views" not in same["model"]["init_args"]
    assert both["model"]["init_args"] | {"rdrop_views": 1, "rdrop_alpha": 1.0} == both["model"]["init_args"]
    assert both["trainer"]["max_epochs"] == 3


def test_the_first_monitor_is_that_of_the_trainers_own_list():
    named, listed = (
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": name}} for name in ("val/accuracy", "val/ce")
    )
    assert checkpointed({"callbacks": {"best": named}, "trainer": {"callbacks": [listed]}}) == ("val/ce", "min")


def test_grids_make_variants_of_the_base_and_of_variants(folder):
    dropout = "model.network.p=0.1,0.3"
    plan = planned("plain=plain.yaml", grids=["model.rdrop_alpha=0.5,8", f"plain:{dropout}", dropout])
    assert plan.families == {
        "plain": ["plain:p=0.1", "plain:p=0.3"],
        "grid": ["rdrop_alpha=0.5,p=0.1", "rdrop_alpha=0.5,p=0.3", "rdrop_alpha=8,p=0.1", "rdrop_alpha=8,p=0.3"],
    }
    assert list(plan.variants) == [name for members in plan.families.values() for name in members]
    assert [*alphas(plan).values()] == [2, 2, 0.5, 0.5, 8, 8]
    network = plan.variants["rdrop_alpha=8,p=0.3"]["model"]["init_args"]["network"]
    assert network["init_args"]["p"] == 0.3
    assert planned(grids=["model.rdrop_alpha=1,4"]).families == {"grid": ["rdrop_alpha=1", "rdrop_alpha=4"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "x=--model.rdrop_alhpa=1"], "Classifier has no argument rdrop_alhpa. Did you mean rdrop_alpha?"),
        (["--variant", "x=--modle.rdrop_alpha=1"], "no option --modle.rdrop_alpha. Did you mean --model.rdrop_alpha?"),
        (["--variant", "x=--callbacks.alpha.rmp=1"], "AlphaScheduler has no argument rmp. Did you mean ramp?"),
        (
            ["--variant", "x=--model.network.pp=1"],
            "Dropout has no argument pp. Did you mean p?",
        ),
        (["--variant", "x=wrong.yaml"], "Classifier has no argument rdrop_alhpa. Did you mean rdrop_alpha?"),
        (["--variant", "x=missing.yaml"], "missing.yaml"),
        (["--variant", "x=--model.rdrop_alpha=much"], "rdrop_alpha"),
        (["--variant", "x=--callbacks.best=null", "--variant", "y="], "select checkpoints by different metrics"),
        (["--variant", "x"], "write NAME=FILE.yaml"),
        (["--variant", "../x="], "The name becomes a folder"),
        (["--variant", "x=", "--variant", "x="], "two with the name x"),
        (["--variant", "x=", "--seed-to", "model.rdrop_vews"], "--seed-to .* Did you mean rdrop_views?"),
        (["--grid", "model.rdrop_alhpa=1,2"], "--grid .* Did you mean rdrop_alpha?"),
        (["--grid", "model.rdrop_alpha="], "with different values"),
        (["--grid", "model.rdrop_alpha=1,1"], "with different values"),
        (["--variant", "x=", "--grid", "y:model.rdrop_alpha=1,2"], "there is no variant y among x"),
        (["--variant", "x=--callbacks.best=null", "--grid", "x:model.rdrop_alpha=1,2"], "chooses on validation"),
        (["--variant", "x=", "--equal-cost"], "pass a variant besides the reference: none"),
        (["--variant", "x=", "--variant", "y=", "--equal-cost", "x"], "pass a variant besides the reference: y"),
        (["--variant", "x=", "--workers", "0"], "--workers must be at least 1"),
        (["--variant", "x=", "--seeds", "0"], "--seeds must be"),
        (["--variant", "x=", "--seeds", "[1,1]"], "--seeds must be"),
        ([], "pass --config, --out, and --variant"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_found_before_anything_runs(folder, capsys, arguments, message):
    (folder / "wrong.yaml").write_text("model: {init_args: {rdrop_alhpa: 1}}")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", "base.yaml", *arguments, "--out", "out"])
    assert stopped.value.code == 1
    assert re.search(message.replace("?", r"\?"), capsys.readouterr().err)
    assert not (folder / "out").exists()


def test_another_config_under_the_same_name_is_refused(folder):
    planned("plain=plain.yaml", "rdrop=").write(folder)
    earlier = Plan.read(folder)
    assert planned("plain=plain.yaml", "rdrop=").continues(earlier, earlier.variants) == earlier
    with pytest.raises(ValueError, match=r"variant rdrop has another config .*\.rdrop_alpha: 2\.0 -> 3"):
        planned("rdrop=--model.rdrop_alpha=3").continues(earlier, earlier.variants)
    changed = planned("rdrop=--model.rdrop_alpha=3")
    assert changed.continues(earlier, ["plain"]).variants["rdrop"] == changed.variants["rdrop"]  # all its runs failed
    with pytest.raises(ValueError, match="--seed-to was"):
        planned("rdrop=", seed_to=["model.num_classes"]).continues(earlier, earlier.variants)


@pytest.mark.parametrize(
    ("status", "is_planned", "message"),
    [
        (None, True, "has another config than its existing runs"),  # it is running
        ("done", True, "has another config than its existing runs"),
        ("done", False, "comparison.yaml with their configs is missing"),
        ("failed: KeyError: 'x'", True, "accepted"),
    ],
)
def test_a_run_that_outlived_its_command_keeps_its_config(folder, capsys, monkeypatch, status, is_planned, message):
    grid = "trainer.default_root_dir=here/there"  # a slash makes a folder within a folder
    monkeypatch.setattr("lightning_rdrop.compare.command.work", lambda *arguments: sys.exit("accepted"))
    run = folder / "out/runs/default_root_dir=here/there/1"
    run.mkdir(parents=True)
    (run / "lock").touch()
    if status:
        (run / "result.json").write_text(json.dumps({"status": status}))
    if is_planned:
        planned(grids=[grid]).write(folder / "out")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", "base.yaml", "--config", "many.yaml", "--grid", grid, "--out", "out"])
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


def test_an_argument_that_a_newer_version_has_added_is_no_change(folder):
    earlier = planned("rdrop=")
    del earlier.variants["rdrop"]["callbacks"]["alpha"]["init_args"]["delay"]
    assert planned("rdrop=").continues(earlier, earlier.variants).variants == planned("rdrop=").variants


def test_variants_are_added_to_those_of_an_earlier_command(folder):
    earlier = planned("plain=plain.yaml", grids=["model.rdrop_alpha=1,4"])
    later = planned("more=many.yaml", grids=["model.rdrop_alpha=4,8"]).continues(earlier, earlier.variants)
    assert {*later.variants} == {"plain", "more", "rdrop_alpha=1", "rdrop_alpha=4", "rdrop_alpha=8"}
    assert {*later.families["grid"]} == {"rdrop_alpha=1", "rdrop_alpha=4", "rdrop_alpha=8"}


def test_the_reference_changes_only_if_a_command_has_it_after_another_variant(folder):
    earlier = planned("plain=plain.yaml", "rdrop=")
    for variants, order in (
        (["plain=plain.yaml", "more=many.yaml"], ["plain", "more", "rdrop"]),
        (["more=many.yaml"], ["plain", "rdrop", "more"]),
        (["more=many.yaml", "rdrop="], ["plain", "rdrop", "more"]),
        (["rdrop=", "plain=plain.yaml"], ["rdrop", "plain"]),
    ):
        later = planned(*variants).continues(earlier, earlier.variants)
        assert [*later.families] == [*later.variants] == order


def test_an_earlier_command_chose_by_another_metric(folder):
    earlier = planned("plain=plain.yaml")
    with pytest.raises(ValueError, match=r"select checkpoints by different metrics: .*val/accuracy.*val/ce"):
        planned("rdrop=--callbacks.best.monitor=val/ce").continues(earlier, earlier.variants)


def test_a_part_of_a_grid_goes_on(folder):
    earlier = planned("plain=plain.yaml", "rdrop=", grids=["rdrop:model.rdrop_alpha=1,4"])
    later = planned("plain=plain.yaml", "rdrop=", grids=["rdrop:model.rdrop_alpha=4"])
    assert [*later.variants] == ["plain", "rdrop:rdrop_alpha=4"]
    assert sorted(later.continues(earlier, earlier.variants).families["rdrop"]) == sorted(earlier.families["rdrop"])


def test_an_error_that_is_no_message_has_its_traceback(folder):
    planned("plain=plain.yaml").write(folder)
    (folder / "results.csv").write_text("variant,seed,status\nplain,one,done\n")
    with pytest.raises(ValueError, match="invalid literal for int"):
        main(["compare", "--report", "."])


def test_a_report_needs_a_comparison(folder, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--report", "."])
    assert "there is no comparison.yaml in it" in capsys.readouterr().err
