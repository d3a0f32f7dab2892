import pytest

pytest.importorskip("matplotlib")

from lightning_rdrop.plots import curves

METRICS = """step,train/ce,train/kl,train/alpha,val/accuracy
0,1.0,0.2,0.0,
1,0.5,0.1,4.0,
1,,,,0.75
"""


@pytest.fixture
def metrics(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    return tmp_path / "metrics.csv"


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
