import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lightning_rdrop import distance
from lightning_rdrop.plots import curves, find_runs, heat_map, read_csv
from lightning_rdrop.plots.curves import is_plain

METRICS = """step,train/ce,train/kl,train/alpha,val/accuracy
0,1.0,0.2,0.0,
1,0.5,0.1,4.0,
1,,,,0.75
"""


@pytest.fixture
def metrics(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    return tmp_path / "metrics.csv"


def test_a_heat_map_has_a_cell_for_each_pair():
    values = {("1", "0.1"): 1.0, ("4", "0.1"): 2.0, ("1", "0.3"): 3.0}  # and none for ("4", "0.3")
    (panel,) = heat_map(values, ("alpha", "p"), "accuracy", chosen=("4", "0.1")).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1", "4"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.1", "0.3"]
    assert {text.get_position(): text.get_text() for text in panel.texts} == {(0, 0): "1", (0, 1): "2", (1, 0): "3"}
    assert np.ma.filled(panel.images[0].get_array(), -1).tolist() == [[1, 3], [2, -1]]
    assert panel.patches[0].get_xy() == (-0.5, 0.5)


def test_a_panel_for_each_quantity(metrics):
    panels = curves(metrics).axes
    assert [panel.get_title() for panel in panels] == ["train/ce", "train/kl", "train/alpha", "val/accuracy"]
    assert [panel.lines[0].get_xydata().tolist() for panel in panels] == [
        [[0, 1.0], [1, 0.5]],
        [[0, 0.2], [1, 0.1]],
        [[0, 0.0], [1, 4.0]],
        [[1, 0.75]],
    ]


def test_panels_of_ones_own(metrics):
    (panel,) = curves(metrics, {"terms": ["train/ce", "train/kl"]}).axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["train/ce", "train/kl"]


def test_what_was_never_logged_is_named(metrics):
    with pytest.raises(ValueError, match=r"nothing was logged as \['val/f1'\], only \['step', 'train/alpha'"):
        curves(metrics, {"f1": ["val/f1"]})


def run(number=100, alpha=4.0, **others):
    steps = range(number)
    return {
        "train/ce": [(step, 1.0 + (-1) ** step) for step in steps],
        "train/kl": [(step, 0.1) for step in steps],
        "train/alpha": [(step, alpha) for step in steps],
        **others,
    }


def test_the_monitor_lies_beside_the_training():
    gap = {"val/dropout_kl": [(9, 0.2)], "val/average_gap": [(9, 0.01)], "val/f1": [(9, 0.5)]}
    figure = curves({"a run": run(**gap)})
    assert [panel.get_title() for panel in figure.axes] == [
        "train/ce",
        "kl",
        "train/alpha",
        "val/f1",
        "val/average_gap",
    ]
    assert len({panel.get_position().y0 for panel in figure.axes}) == 2  # lines of panels
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["train/kl", "val/dropout_kl"]


@pytest.mark.parametrize(
    ("logged", "title"),
    [
        (["val/mae", "val/accuracy"], "val/accuracy"),
        (["val/dropout_kl", "val_acc"], "val_acc"),
        (["val/average_gain", "val/intent_dropout_kl"], None),
    ],
)
def test_the_validation_metric(logged, title):
    figure = curves({"a run": run(**{name: [(9, 0.5)] for name in logged})})
    titles = {panel.get_title() for panel in figure.axes} - {"train/ce", "train/kl", "kl", "train/alpha"}
    assert titles == {title} - {None}


def test_other_tasks_and_distances():
    figure = curves({"a run": {"train/mse": [(0, 1.0)], "train/consistency": [(0, 1.0)], "val/mae": [(0, 1.0)]}})
    assert [panel.get_title() for panel in figure.axes] == ["train/mse", "train/consistency", "val/mae"]


def test_the_task_loss_of_every_distance_has_a_panel():
    kinds = (getattr(distance, name) for name in distance.__all__)
    named = {kind.term_names[0] for kind in kinds if hasattr(kind, "term_names")}
    assert named > {"ce", "focal", "ctc"}
    for name in named | {"mse"}:
        figure = curves({"a run": {f"train/{name}": [(0, 1.0)]}})
        assert [panel.get_title() for panel in figure.axes] == [f"train/{name}"]


def test_many_points_are_faint_under_a_smooth_line():
    (axes,) = curves({"a run": run()}, {"ce": ["train/ce"]}).axes
    points, line = axes.lines
    assert [*zip(*points.get_data(), strict=True)] == run()["train/ce"]
    assert points.get_alpha() < 0.5
    assert points.get_color() == line.get_color()
    middle = line.get_ydata()[20:80]
    assert max(abs(middle - 1.0)) <= 0.1  # eleven of values that alternate between 0 and 2
    assert line.get_ydata()[0] == pytest.approx(1.0)  # the first six, and no zeros from outside


def test_few_points_are_seen_themselves():
    (axes,) = curves({"a run": run(20)}, {"ce": ["train/ce"]}).axes
    (line,) = axes.lines
    assert line.get_marker() == "."


def test_plain_training_is_grey_among_others():
    one_view = {**run(), "train/kl": [(step, 0.0) for step in range(100)]}
    runs = {"rdrop": run(), "no alpha": run(alpha=0.0), "plain": one_view, "more": run(alpha=16.0)}
    assert [is_plain(each) for each in runs.values()] == [False, True, True, False]
    figure = curves(runs)
    (legend,) = figure.legends
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.get_lines(), strict=True)}
    assert list(colours) == list(runs)
    assert colours["plain"] == colours["no alpha"] == "grey"
    assert len({colours["rdrop"], colours["more"], "grey"}) == 3
    for axes in figure.axes:
        assert {line.get_color() for line in axes.lines} == set(colours.values())


def test_a_run_without_one_of_the_quantities():
    figure = curves({"one": run(), "other": run(**{"val/accuracy": [(9, 0.5)]})})
    assert len(figure.axes[-1].lines) == 1


def test_nothing_at_all():
    with pytest.raises(ValueError, match=r"a run: nothing was logged as \['train/ce'.*only \['loss'\]"):
        curves({"a run": {"loss": [(0, 1.0)]}})


def test_runs_below_folders(tmp_path):
    for folder in ("logs/plain/version_0", "logs/rdrop/version_0", "logs/rdrop/version_1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.csv").write_text(METRICS)
    logs = tmp_path / "logs"
    assert list(find_runs([logs / "plain"])) == ["version_0"]
    assert list(find_runs([logs / "rdrop"])) == ["version_0", "version_1"]
    names = ["rdrop/version_1", "plain/version_0"]
    assert list(find_runs([logs / "rdrop/version_1", logs / "plain"])) == names
    assert list(find_runs([logs, logs / "plain"])) == ["plain/version_0", "rdrop/version_0", "rdrop/version_1"]
    assert read_csv(find_runs([logs])["plain/version_0"])["train/kl"] == [(0, 0.2), (1, 0.1)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv of a CSVLogger in .*empty"):
        find_runs([logs, tmp_path / "empty"])
