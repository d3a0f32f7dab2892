import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_rdrop.callbacks import AlphaScheduler, Curves, curves

pytest.importorskip("matplotlib")


def test_the_callback_draws_at_the_end(fit, small, rows, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="run")
    fit(small(), rows, [AlphaScheduler(), Curves("picture.png")], logger=logger, log_every_n_steps=1)
    picture = tmp_path / "run" / "version_0" / "picture.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


def test_the_callback_needs_a_csv_logger_but_in_a_dry_run(fit, small, rows, tmp_path):
    module = small()
    before = module.network[0].weight.detach().clone()
    with pytest.raises(ValueError, match="add one, Trainer"):
        fit(module, rows, [Curves()], log_every_n_steps=1)
    assert torch.equal(module.network[0].weight, before)
    fit(small(), rows, [Curves()], fast_dev_run=True, logger=CSVLogger(tmp_path))


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

    message = f"the Trainer logs every {every} steps and makes 8. Write Trainer\\(log_every_n_steps=1\\)"
    with pytest.warns(UserWarning, match=message) as warned:
        fit(Watched(), rows, [Curves()], logger=CSVLogger(tmp_path), log_every_n_steps=every)
    assert seen[0] > 0
    # the means of the epoch are logged all the same, but are no default panel
    assert any("Curves made no picture. ValueError" in str(warning.message) for warning in warned)


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
        ({"filename": "nowhere/curves.png"}, "FileNotFoundError: .*nowhere"),
    ],
)
def test_a_picture_that_fails_is_a_warning_and_the_training_is_over(fit, small, rows, tmp_path, arguments, message):
    with pytest.warns(UserWarning, match=f"Curves made no picture. {message}"):
        trainer = fit(small(), rows, [Curves(**arguments)], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert trainer.state.finished
