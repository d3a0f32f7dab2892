"""A compiled network, or a whole compiled module, trains as the eager one does."""

import shutil

import pytest
import pytorch_lightning as pl
import torch
import torch._inductor.config
from conftest import Small
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import VAT, AlphaScheduler

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"])


def even():
    """Seven full batches: another size would be another graph."""
    x = torch.randn(28, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=4)


def trained(fit, compile, **arguments):
    torch.manual_seed(0)
    module, watch = compile(Small(**arguments)), Losses()
    trainer = fit(module, even(), [AlphaScheduler("linear", ramp=14), watch], max_epochs=2)
    assert trainer.callback_metrics["train/alpha"] == pytest.approx(4.0 * 13 / 14)
    return torch.stack(watch.losses)


def whole(backend):
    return lambda module: torch.compile(module, backend=backend)


def network(backend):
    def compile(module):
        module.network = torch.compile(module.network, backend=backend)
        return module

    return compile


@pytest.mark.parametrize(
    ("arguments", "graphs"),
    [
        ({}, 3),  # the network, and the loss twice: for the first alpha, and then for any
        ({"rdrop_passes": "separate", "rdrop_views": 3}, 3),
        ({"rdrop_guard": "off"}, 3),
    ],
)
def test_the_whole_module_with_one_recompilation_as_alpha_moves(fit, arguments, graphs):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = trained(fit, whole(counter), **arguments)
    assert counter.frame_count == graphs
    torch.testing.assert_close(compiled, trained(fit, nn.Identity(), **arguments))


def test_the_network_is_compiled_once(fit):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = trained(fit, network(counter))
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled, trained(fit, nn.Identity()))


def test_regularizers_stay_eager(fit):
    compiled = trained(fit, whole("aot_eager"), rdrop_regularizers=[VAT()])
    torch.testing.assert_close(compiled, trained(fit, nn.Identity(), rdrop_regularizers=[VAT()]))


@pytest.mark.parametrize("compile", [whole, network])
def test_the_guard_works_behind_it(fit, compile):
    with pytest.raises(ValueError, match=r"p = 0: network.*\.2"):
        trained(fit, compile("aot_eager"), p=0.0)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("compile", [whole, network])
def test_inductor(fit, compile):
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers of eager mode, not its own
        compiled = trained(fit, compile("inductor"))
    torch.testing.assert_close(compiled, trained(fit, nn.Identity()))
