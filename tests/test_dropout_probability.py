import pytest
import pytorch_lightning as pl
import torch

from lightning_rdrop.callbacks import DropoutProbability


def test_it_holds_during_the_training_and_not_after(fit, small, rows, tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.network[2].p)

        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    module = small(p=0.1)
    fit(module, rows, [DropoutProbability(0.4), Watch()])
    assert seen == [0.4] * 8
    assert module.network[2].p == 0.1
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["DropoutProbability"] == {"p": 0.4}


def test_evaluation_has_it_too_and_the_users_own_comes_back(fit, small, rows):
    seen = []

    class Evaluated(small):
        def evaluate(self, batch, batch_idx):
            seen.append(self.network[2].p)

        validation_step = test_step = predict_step = evaluate

    module, callback = Evaluated(p=0.1), DropoutProbability(0.4)
    trainer = fit(module, rows, [callback])
    for run in (trainer.validate, trainer.test, trainer.predict):
        module.network[2].p = 0.2  # the user's, after the training
        run(module, rows)
        assert module.network[2].p == 0.2
    assert set(seen) == {0.4}
    assert len(seen) == 3 * len(rows)


def test_no_dropout_at_all(fit, small, rows):
    seen = []

    class Watched(small):
        def on_train_batch_end(self, *args):
            seen.append(self.network[2].p)

    fit(Watched(rdrop_views=1), rows, [DropoutProbability(0)])
    assert seen == [0.0] * 8


def test_it_is_put_back_when_training_fails(fit, small, rows):
    class Failing(pl.Callback):
        def on_train_batch_end(self, *args):
            raise OSError("disk full")

    module = small(p=0.1)
    with pytest.raises(OSError, match="disk full"):
        fit(module, rows, [DropoutProbability(0.4), Failing()])
    assert module.network[2].p == 0.1


@pytest.mark.parametrize("p", [-0.1, 1.0, 30, True, "0.3", None])
def test_a_probability_is_one(p):
    with pytest.raises(ValueError, match="p must be a probability"):
        DropoutProbability(p)


def test_a_module_without_dropout_is_refused(fit, small, rows):
    module = small()
    module.network[2] = torch.nn.Identity()
    with pytest.raises(ValueError, match="Small has no dropout whose probability"):
        fit(module, rows, [DropoutProbability()])
