import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from conftest import Small, Two
from torch.utils.data import DataLoader

from lightning_rdrop import AdaptiveAlpha, AlphaScheduler, Categorical, MaskedConsistency
from lightning_rdrop.callbacks import UnlabeledWeightScheduler


class Watch(pl.Callback):
    """Alpha, kl and rows of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rows = float(pl_module.rdrop_denominators["kl"])
        self.seen.append((pl_module.rdrop_alpha, float(pl_module.rdrop_kl), rows))

    @property
    def alphas(self):
        return [alpha for alpha, *_ in self.seen]


def ziegler(alpha, kl, target, steps, horizon):
    """Ziegler et al. 2019, section 2.2, written out."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return alpha * (1 + error * steps / horizon)


def by_hand(seen, target, every, horizon, accumulate=1):
    alphas, alpha, window = [], seen[0][0], []
    for i, (_, kl, rows) in enumerate(seen):
        if len(window) == every * accumulate and i % accumulate == 0:
            mean = sum(kl * rows for kl, rows in window) / sum(rows for _, rows in window)
            alpha, window = ziegler(alpha, mean, target, every, horizon), []
        alphas.append(alpha)
        window.append((kl, rows))
    return alphas


def test_numbers_by_hand():
    adaptive = AdaptiveAlpha(target_kl=0.5, horizon=10, minimum=0.5, maximum=5.0)
    assert adaptive.after(4.0, kl=0.55, steps=5) == pytest.approx(4 * 1.05, rel=1e-12)  # a tenth above, half of the way
    assert adaptive.after(4.0, kl=0.45, steps=10) == pytest.approx(4 * 0.9, rel=1e-12)
    assert adaptive.after(4.0, kl=9.0, steps=10) == pytest.approx(4.8, rel=1e-12)  # a fifth at most
    assert adaptive.after(4.0, kl=0.0, steps=10) == pytest.approx(3.2, rel=1e-12)
    assert adaptive.after(4.9, kl=math.inf, steps=10) == 5.0
    assert adaptive.after(0.51, kl=0.0, steps=10) == 0.5
    assert adaptive.after(4.0, kl=math.nan, steps=10) == 4.0
    assert adaptive.after(4.0, kl=0.0, steps=50) == pytest.approx(3.2, rel=1e-12)  # as far as in a whole horizon


@pytest.mark.parametrize("accumulate", [1, 2])
def test_alpha_follows_the_kl_of_the_rows_since_its_last_change_and_is_put_back(fit, small, rows, accumulate):
    watch, module = Watch(), small(rdrop_alpha=4.0)
    trainer = {"max_epochs": 2, "precision": "64-true", "accumulate_grad_batches": accumulate}
    fit(module, rows, [AdaptiveAlpha(0.02, horizon=4, every=3), watch], **trainer)
    expected = by_hand(watch.seen, 0.02, 3, 4, accumulate)  # the last batch of an epoch has two rows instead of four
    assert watch.alphas == pytest.approx(expected, rel=1e-12)
    assert len(set(watch.alphas)) == len(watch.seen) // (3 * accumulate) + 1
    assert module.rdrop_alpha == 4.0


def test_it_changes_when_the_trainer_logs(fit, small, rows):
    watch = Watch()
    fit(small(), rows, [AdaptiveAlpha(1e3, horizon=2), watch], log_every_n_steps=2)
    assert watch.alphas == pytest.approx([4, 4, 3.2, 3.2, 2.56, 2.56, 2.048, 2.048])


@pytest.mark.parametrize(("every", "said"), [(None, 1), (8, 1), (7, 0)])  # of 8 steps
def test_a_training_too_short_for_a_change_is_a_warning(fit, small, rows, every, said, recwarn):
    watch = Watch()
    fit(small(), rows, [AdaptiveAlpha(1e3, horizon=9, every=every), watch])
    texts = [str(warning.message) for warning in recwarn if "AdaptiveAlpha never changes alpha" in str(warning.message)]
    assert len(texts) == said == (len(set(watch.alphas)) == 1)
    message = f"every {every or 50} steps, but the training has only 8. Pass a smaller AdaptiveAlpha("
    assert all(message in text for text in texts)


def test_a_single_view_leaves_alpha_alone(fit, small, rows):
    watch = Watch()
    with pytest.warns(UserWarning, match=r"never changes alpha: Small has rdrop_views=1.*Set rdrop_views=2"):
        fit(small(rdrop_views=1), rows, [AdaptiveAlpha(0.02, horizon=4, every=3), watch])
    assert watch.alphas == [4.0] * 8


def test_manual_optimization(fit, rows):
    watch = Watch()
    trainer = fit(Two(), rows, [AdaptiveAlpha(1e3, horizon=4, every=4), watch])
    assert trainer.global_step == 16
    assert watch.alphas == pytest.approx([4] * 4 + [3.2] * 4)


@pytest.mark.parametrize("stop", [5, 6, 11])  # within a change, just before one, and within the second epoch
def test_resumed_training_takes_the_same_alphas_to_the_bit(fit, small, rows, tmp_path, stop):
    batches = DataLoader([next(iter(rows))] * 8, batch_size=None)  # resuming begins with the first batch of an epoch

    def callbacks(watch):
        save = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
        return [AdaptiveAlpha(0.02, horizon=4, every=3), watch, save]

    whole, resumed = Watch(), Watch()
    options = {"max_epochs": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    module = small(p=0.9, rdrop_alpha=2.0)

    def seed_each(batch, batch_idx):
        torch.manual_seed(module.global_step)  # the same masks, whether resumed or not
        return type(module).training_step(module, batch, batch_idx)

    module.training_step = seed_each
    fit(module, batches, callbacks(whole), **options)
    module.load_state_dict(small().state_dict())  # what counts comes from the checkpoint
    fit(module, batches, callbacks(resumed), resume=tmp_path / f"step={stop}.ckpt", **options)
    assert resumed.seen == whole.seen[stop:]
    assert len(set(whole.alphas)) == 6


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sums_of_another_number_of_ranks_are_counted_once(ranks):
    sums = []
    for rank in range(ranks):
        adaptive = AdaptiveAlpha(0.1, 10)
        adaptive.load_state_dict({"alpha": 4.0, "changed_at": 0, "sums": [[1.0, 2.0], [3.0, 4.0]]})
        trainer = SimpleNamespace(world_size=ranks, global_rank=rank)
        adaptive.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
        sums.append(adaptive._sums)
    assert torch.stack(sums).sum(0).tolist() == [4.0, 6.0]


def test_kl_is_weighed_by_its_own_rows(fit, rows):
    class Masked(Small):
        def rdrop_unpack(self, batch):
            mask = torch.zeros(len(batch[1]))
            mask[: 1 + (len(self.kl) % 4)] = 1  # 1, 2, 3 or 4 rows of kl, and all of ce
            return batch[0], (batch[1], mask)

        def on_train_batch_end(self, *args):
            self.kl.append((float(self.rdrop_kl), float(self.rdrop_denominators["kl"])))

    module, adaptive = Masked(rdrop_distance=MaskedConsistency(Categorical())), AdaptiveAlpha(1.0, horizon=9, every=100)
    module.kl = []
    fit(module, DataLoader(rows.dataset, 4, drop_last=True), [adaptive])
    total, weight = adaptive._sums.tolist()
    assert weight == sum(rows for _, rows in module.kl)
    assert total == pytest.approx(sum(kl * rows for kl, rows in module.kl))


def test_a_second_training_begins_anew(fit, small, rows):
    adaptive, module = AdaptiveAlpha(1e3, horizon=2, every=2), small()
    for _ in range(2):
        watch = Watch()
        fit(module, rows, [adaptive, watch])
        assert watch.alphas[0] == 4.0


def test_a_training_that_is_resumed_without_it_counts_from_there(fit, small, rows, tmp_path):
    fit(small(), rows, max_epochs=2).save_checkpoint(tmp_path / "plain.ckpt")
    watch, callback = Watch(), AdaptiveAlpha(1e3, horizon=4, every=4)
    fit(small(), rows, [callback, watch], max_epochs=3, resume=tmp_path / "plain.ckpt")
    assert watch.alphas == pytest.approx([4] * 4 + [3.2] * 4)


@pytest.mark.parametrize("module", [Small, Two])
def test_a_second_fit_of_the_same_trainer_continues(fit, rows, module):
    whole, continued, module, another = Watch(), Watch(), module(), module()
    fit(another, rows, [AdaptiveAlpha(1e3, horizon=9, every=3), whole], max_epochs=2)
    trainer = fit(module, rows, [AdaptiveAlpha(1e3, horizon=9, every=3), continued])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, rows)
    assert continued.alphas == pytest.approx(whole.alphas, rel=1e-12)
    assert len(set(whole.alphas)) == 6


def test_alpha_is_put_back_when_training_fails(fit, small, rows):
    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 6:
                assert pl_module.rdrop_alpha != 4.0
                raise OSError("disk full")

    module = small()
    with pytest.raises(OSError, match="disk full"):
        fit(module, rows, [AdaptiveAlpha(1e3, horizon=2, every=2), Failing()])
    assert module.rdrop_alpha == 4.0


def test_two_callbacks_cannot_both_set_alpha(fit, small, rows):
    both = [AdaptiveAlpha(0.1, 100), AlphaScheduler()]
    for callbacks in (both, both[::-1]):
        with pytest.raises(ValueError, match="both set rdrop_alpha"):
            fit(small(), rows, callbacks)
    fit(small(), rows, [AdaptiveAlpha(0.1, 100), UnlabeledWeightScheduler()])


def test_a_training_step_without_kl_is_named(fit, small, rows):
    class Silent(small):
        def training_step(self, batch, batch_idx):
            return self.rdrop_step(batch).loss

    with pytest.raises(ValueError, match=r"rdrop_log\(terms\)"):
        fit(Silent(), rows, [AdaptiveAlpha(0.1, 100)])


def test_a_skipped_batch_counts_nothing(fit, small, rows):
    class Skipping(small):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                self.rdrop_kl = self.rdrop_kl * torch.nan
            return None if batch_idx in (1, 2) else outputs

    watch = Watch()
    fit(Skipping(), rows, [AdaptiveAlpha(1e3, horizon=4, every=4), watch])
    assert watch.alphas == pytest.approx([4] * 4 + [3.2] * 4)


class Now(Two):
    """Manual optimization of some batches only."""

    trained = ()

    def training_step(self, batch, batch_idx):
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.completed in self.trained:
            super().training_step(batch, batch_idx)


class Alphas(pl.Callback):
    """Alpha at every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(pl_module.rdrop_alpha)


def test_manual_optimization_may_skip_batches(fit, rows):
    module, alphas = Now(), Alphas()
    module.trained = {1, 3, *range(80, 88)}
    fit(module, rows, [AdaptiveAlpha(1e3, horizon=8, every=4), alphas], max_epochs=11)
    assert alphas.seen == pytest.approx([4] * 4 + [3.6] * 80 + [3.24] * 4)  # a tenth, of four steps each


def test_manual_optimization_without_any_kl_is_named(fit, rows):
    module, alphas = Now(), Alphas()
    with pytest.raises(ValueError, match=r"training_step of Now has to call self\.rdrop_log\(terms\)"):
        fit(module, rows, [alphas, AdaptiveAlpha(1e3, horizon=8, every=4)], max_epochs=8)
    assert len(alphas.seen) == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_kl": 0.0, "horizon": 9}, "target_kl must be > 0"),
        ({"target_kl": -1.0, "horizon": 9}, "target_kl must be a finite number"),
        ({"target_kl": 0.1, "horizon": 0}, "horizon must be an int >= 1"),
        ({"target_kl": 0.1, "horizon": 0.5}, "horizon must be an int >= 1"),
        ({"target_kl": 0.1, "horizon": 9, "every": 0}, "every must be an int >= 1"),
        ({"target_kl": 0.1, "horizon": 9, "minimum": 0}, "0 < minimum <= maximum"),
        ({"target_kl": 0.1, "horizon": 9, "minimum": 2, "maximum": 1}, "0 < minimum <= maximum"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveAlpha(**arguments)


@pytest.mark.parametrize("alpha", [0.0, 200.0])
def test_an_alpha_out_of_bounds_is_no_beginning(fit, small, rows, alpha):
    with pytest.raises(ValueError, match=r"is not between minimum=0\.01 and maximum=100"):
        fit(small(rdrop_alpha=alpha), rows, [AdaptiveAlpha(0.1, 100)])
