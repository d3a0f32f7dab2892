from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import Small, Two
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_rdrop import plots
from lightning_rdrop.callbacks import AlphaScheduler, ConsistencyMonitor, Curves, curves
from lightning_rdrop.plots import read_csv

pytest.importorskip("matplotlib")


def test_the_callback_draws_at_the_end(fit, small, rows, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="run")
    fit(small(), rows, [AlphaScheduler(), Curves("picture.png")], logger=logger, log_every_n_steps=1)
    picture = tmp_path / "run" / "version_0" / "picture.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


def test_a_dry_run_draws_nothing(fit, small, rows, tmp_path):
    fit(small(), rows, [Curves()], fast_dev_run=True, logger=CSVLogger(tmp_path))
    assert not list(tmp_path.glob("**/*.png"))


class Validated(Small):
    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())


@pytest.fixture
def kept(monkeypatch):
    """What the callback draws, run by run."""
    drawn = []

    def draw(runs, panels=None):
        drawn.append({run: read_csv(each) if isinstance(each, Path) else each for run, each in runs.items()})
        return plots.curves(runs, panels)

    monkeypatch.setattr(curves, "curves", draw)
    return drawn


def test_the_callback_keeps_what_a_csv_logger_writes(fit, rows, tmp_path, kept):
    """Without one the picture is the same: the same quantities at the same steps."""

    def train(name, **trainer):
        torch.manual_seed(3)
        module = Validated()
        module.val_dataloader = lambda: rows
        callbacks = [AlphaScheduler(), ConsistencyMonitor(2, every_n_epochs=2), Curves(str(tmp_path / f"{name}.png"))]
        fit(module, rows, callbacks, max_epochs=3, log_every_n_steps=3, **trainer)

    train("csv", logger=CSVLogger(tmp_path))
    train("kept")
    (csv,), (own,) = (each.values() for each in kept)
    assert set(own) == set(csv) - {"epoch", "step"}
    for name, points in own.items():
        assert [step for step, _ in points] == [step for step, _ in csv[name]], name
        assert [value for _, value in points] == pytest.approx([value for _, value in csv[name]]), name
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_logged_in_some_batches_only(fit, rows, tmp_path, kept):
    class Some(Validated):
        def training_step(self, batch, batch_idx):
            for name in {1: ["second"], 4: ["fifth"], 7: ["last"]}.get(batch_idx, []):
                self.log(name, float(self.current_epoch))
            return super().training_step(batch, batch_idx)

    for logger in (CSVLogger(tmp_path), False):
        module = Some()
        module.val_dataloader = lambda: rows
        fit(module, rows, [Curves()], logger=logger, log_every_n_steps=3, max_epochs=2, val_check_interval=4)
    (csv,), (own,) = (each.values() for each in kept)
    assert own["second"] == [(2, 0.0), (5, 0.0), (11, 1.0), (14, 1.0)]
    assert set(own) == set(csv) - {"epoch", "step"}
    for name, points in own.items():
        assert [step for step, _ in points] == [step for step, _ in csv[name]], name


def test_accumulated_batches_are_one_step(fit, rows, tmp_path, kept):
    for logger in (CSVLogger(tmp_path), False):
        fit(Small(), rows, [Curves()], logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    (csv,), (own,) = (each.values() for each in kept)
    assert [step for step, _ in own["train/kl"]] == [step for step, _ in csv["train/kl"]] == [1, 3]


def test_without_a_csv_logger_the_picture_is_in_the_folder_of_the_trainer(fit, small, rows, tmp_path):
    fit(small(), rows, [Curves()], log_every_n_steps=1)
    assert (tmp_path / "curves.png").exists()
    fit(small(), rows, [Curves("plots/curves.png")], log_every_n_steps=1, default_root_dir=tmp_path / "new")
    assert (tmp_path / "new/plots/curves.png").exists()


def test_tensorboard_gets_a_figure(fit, small, rows, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(small(), rows, [Curves()], logger=logger, log_every_n_steps=1)
    folder = tmp_path / "run" / "version_0"
    assert (folder / "curves.png").exists()
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["curves"]


def test_without_matplotlib_nothing_is_trained(fit, small, rows, tmp_path, monkeypatch):
    module = small()
    before = module.network[0].weight.detach().clone()
    monkeypatch.setattr(curves, "find_spec", lambda name: None if name == "matplotlib" else pytest.fail(name))
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        fit(module, rows, [Curves()], logger=CSVLogger(tmp_path))
    assert torch.equal(module.network[0].weight, before)


def test_what_is_logged_last_is_drawn(fit, small, rows, tmp_path, recwarn):
    class Last(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            for logger in trainer.loggers:
                logger.log_metrics({"last": 1.0}, step=8)

    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="run")]
    fit(small(), rows, [Curves(panels={"means": ["train/ce_epoch", "last"]}), Last()], logger=loggers)
    assert (tmp_path / "run" / "version_0" / "curves.png").exists()
    assert not [warning for warning in recwarn if "Curves" in str(warning.message)]


@pytest.mark.parametrize("every", [50, 9, 0])
def test_a_training_that_ends_before_the_first_log_is_said_before(fit, small, rows, tmp_path, every):
    seen = []

    class Watched(small):
        def training_step(self, batch, batch_idx):
            seen.append(len(warned))
            return super().training_step(batch, batch_idx)

    message = f"the Trainer logs every {every} steps, but makes only 8. Use Trainer\\(log_every_n_steps=1\\)"
    with pytest.warns(UserWarning, match=message) as warned:
        fit(Watched(), rows, [Curves()], logger=CSVLogger(tmp_path), log_every_n_steps=every)
    assert seen[0] > 0
    # the means of the epoch are logged all the same, but are no default panel
    assert any("Curves could not plot. ValueError" in str(warning.message) for warning in warned)


def test_a_training_that_logs_is_no_warning(fit, small, rows, tmp_path, recwarn):
    for every in (1, 8):
        logger = CSVLogger(tmp_path, name=f"{every}")
        fit(small(), rows, [Curves()], logger=logger, log_every_n_steps=every)
        assert (tmp_path / f"{every}" / "version_0" / "curves.png").exists()
    fit(small(), rows, [Curves()], logger=CSVLogger(tmp_path), fast_dev_run=True)
    assert not [warning for warning in recwarn if "Curves" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"panels": {"f1": ["val/f1"]}}, r"ValueError: .*nothing was logged as \['val/f1'\]"),
        ({"filename": "curves.doc"}, "ValueError: Format 'doc' is not supported"),
        ({"filename": "metrics.csv/curves.png"}, "FileExistsError: .*metrics.csv"),
    ],
)
def test_a_picture_that_fails_is_a_warning_and_the_training_is_over(fit, small, rows, tmp_path, arguments, message):
    with pytest.warns(UserWarning, match=f"Curves could not plot. {message}"):
        trainer = fit(small(), rows, [Curves(**arguments)], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert trainer.state.finished


def test_manual_optimization_counts_batches(fit, rows, tmp_path, kept):
    for logger in (CSVLogger(tmp_path), False):
        fit(Two(), rows, [Curves()], logger=logger, log_every_n_steps=2)
    (csv,), (own,) = (each.values() for each in kept)
    assert [step for step, _ in own["train/kl"]] == [step for step, _ in csv["train/kl"]] == [1, 3, 5, 7]
