import pytest

pytest.importorskip("matplotlib")

from pytorch_lightning.loggers import CSVLogger

from lightning_rdrop.callbacks import AlphaScheduler, Curves
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


def test_the_callback_draws_at_the_end(fit, small, rows, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="run")
    fit(small(), rows, [AlphaScheduler(), Curves("picture.png")], logger=logger, log_every_n_steps=1)
    picture = tmp_path / "run" / "version_0" / "picture.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


def test_the_callback_needs_a_csv_logger_but_in_a_dry_run(fit, small, rows, tmp_path):
    with pytest.raises(ValueError, match="add one, Trainer"):
        fit(small(), rows, [Curves()])
    fit(small(), rows, [Curves()], fast_dev_run=True, logger=CSVLogger(tmp_path))
