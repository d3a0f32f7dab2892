import pytest
import pytorch_lightning as pl
import torch
from conftest import Small, ragged, train
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_rdrop import Categorical, RDropMixin
from lightning_rdrop.callbacks import ExactAccumulation


class Tagger(RDropMixin, pl.LightningModule):
    """Five tags for each token, under a noise that depends on the input and the view alone, not on the batch."""

    def __init__(self, **kwargs):
        super().__init__(rdrop_passes="separate", **kwargs)
        torch.manual_seed(7)
        self.network = nn.Linear(4, 5)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.network(x * (1 + 0.5 * torch.sin((10 + self.passes % 2) * x)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def trained(fit, batch_size, callbacks=(), **trainer):
    module = Tagger(rdrop_alpha=2.0)
    fit(module, DataLoader(ragged(5, 4), batch_size), callbacks, **trainer)
    return weights(module)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_micro_batches_are_the_one_big_batch(fit, clip):
    big = trained(fit, 8, gradient_clip_val=clip)
    plain = trained(fit, 2, accumulate_grad_batches=4, gradient_clip_val=clip)
    exact = trained(fit, 2, [ExactAccumulation()], accumulate_grad_batches=4, gradient_clip_val=clip)
    torch.testing.assert_close(exact, big)
    assert (plain - big).abs().max() > 1e-3


def test_several_steps_and_a_last_window_that_is_not_full(fit):
    big = trained(fit, 6, max_epochs=3)
    exact = trained(fit, 2, [ExactAccumulation()], accumulate_grad_batches=3, max_epochs=3)
    torch.testing.assert_close(exact, big)


@pytest.mark.parametrize(("accumulate", "skipped"), [(4, {1}), (2, {0, 1})], ids=["one", "a whole step"])
def test_a_skipped_micro_batch_counts_nothing(fit, accumulate, skipped):
    class Skipping(Tagger):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    data = ragged(5, 4)
    kept = [row for number, row in enumerate(data) if number // 2 not in skipped]
    skipping, big = Skipping(rdrop_alpha=2.0), Tagger(rdrop_alpha=2.0)
    fit(skipping, DataLoader(data, 2), [ExactAccumulation()], accumulate_grad_batches=accumulate)
    fit(big, DataLoader(kept, 8))
    torch.testing.assert_close(weights(skipping), weights(big))


def test_a_step_in_which_no_row_counts_changes_nothing(fit):
    module, before = Tagger(), weights(Tagger())
    batch = torch.randn(2, 8, 4), torch.full((2, 8), -100)
    fit(module, DataLoader([batch] * 2, batch_size=None), [ExactAccumulation()], accumulate_grad_batches=2)
    assert torch.equal(weights(module), before)


class Failing(pl.Callback):
    def on_train_batch_end(self, *args):
        raise OSError("disk full")


def test_the_rows_of_a_training_that_broke_off_are_forgotten(fit):
    exact, data = ExactAccumulation(), DataLoader(ragged(5, 4), 2)
    with pytest.raises(OSError, match="disk full"):
        fit(Tagger(), data, [exact, Failing()], accumulate_grad_batches=4)  # after one micro-batch of four
    torch.testing.assert_close(trained(fit, 2, [exact], accumulate_grad_batches=4), trained(fit, 8))


def of_a_rank():
    """The weights after a training, the batches of which Lightning shares out."""
    ranks = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2, "max_epochs": 2}
    return trained(train, 2, [ExactAccumulation()], **ranks).tolist()


def test_two_ranks_are_the_one(fit, pair):
    big = trained(fit, 8, max_epochs=2)
    for found in pair.run(of_a_rank):
        torch.testing.assert_close(torch.tensor(found), big)


def test_the_loss_of_the_big_batch_is_the_weighted_mean_of_the_small_ones():
    x, y = (torch.stack(column) for column in zip(*ragged(5, 4), strict=True))
    terms = [Tagger().rdrop_step((x[i : i + 2], y[i : i + 2])) for i in range(0, 8, 2)]
    whole = Tagger().rdrop_step((x, y))
    assert [int(term.rows) for term in terms] == [9, 5, 8, 9]
    torch.testing.assert_close(sum(term.loss * term.rows for term in terms) / 31, whole.loss)


def test_what_has_two_denominators_is_refused(fit):
    module = Tagger(rdrop_distance=Categorical(weight=torch.ones(5)))
    with pytest.raises(ValueError, match=r"class weights.*without Categorical\(weight"):
        fit(module, DataLoader(ragged(5, 4), 2), [ExactAccumulation()])


def test_manual_optimization_is_refused(fit):
    module = Tagger()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="works in automatic optimization"):
        fit(module, DataLoader(ragged(5, 4), 2), [ExactAccumulation()])


class KeepsGradients(SingleDeviceStrategy):
    """As an engine does that has buffers of its own for them."""

    def backward(self, *args, **kwargs):
        loss = super().backward(*args, **kwargs)
        for parameter in self.lightning_module.parameters():
            parameter.grad = None
        return loss


def test_gradients_out_of_reach_are_refused(fit):
    with pytest.raises(ValueError, match="KeepsGradients hides gradients, as DeepSpeed does"):
        fit(Tagger(), DataLoader(ragged(5, 4), 2), [ExactAccumulation()], strategy=KeepsGradients(torch.device("cpu")))


def test_a_step_that_does_not_log_its_terms_is_told_so(fit, rows):
    class LogsItself(Small):
        def training_step(self, batch, batch_idx):
            loss = self.rdrop_step(batch).loss
            self.log("train/own", loss)
            return loss

    with pytest.raises(ValueError, match=r"call self\.rdrop_log\(terms\)"):
        fit(LogsItself(), rows, [ExactAccumulation()])
