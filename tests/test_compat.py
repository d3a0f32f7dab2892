"""Says which private name of another package has moved: each is there, and answers both ways."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.tensor import DTensor

from lightning_rdrop import _compat


class Asks(torch.autograd.Function):
    """Notes on its way back what is asked."""

    @staticmethod
    def forward(ctx, x, asked, question):
        ctx.asked, ctx.question = asked, question
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        ctx.asked.append(ctx.question(upstream))
        return upstream, None, None


def test_whether_the_graph_is_kept():
    asked = []
    y = Asks.apply(torch.ones(2, requires_grad=True), asked, lambda _: _compat.graph_is_kept()).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert asked == [True, False]


def test_without_torchs_word_the_graph_is_kept(monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    asked = []
    Asks.apply(torch.ones(2, requires_grad=True), asked, lambda _: _compat.graph_is_kept()).sum().backward()
    assert asked == [True]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_whether_a_transform_is_active(transform):
    asked = []

    def function(x):
        asked.append(_compat.is_transformed())
        return x.sum()

    transform(function)(torch.ones(2, 2))
    assert asked == [True]
    assert not _compat.is_transformed()


def test_whether_values_can_be_read():
    x = torch.ones(2)
    assert _compat.is_readable(x)
    assert not _compat.is_traced()
    assert not _compat.is_readable(torch.ones(2, device="meta"))
    asked = []
    torch.func.vmap(lambda x: asked.append((_compat.is_readable(x), _compat.is_traced())) or x)(x)
    torch.compile(lambda x: asked.append((_compat.is_readable(x), _compat.is_traced())) or x, backend="eager")(x)
    assert asked == [(False, True), (False, True)]


def test_whether_a_gradient_is_batched():
    asked = []
    x = torch.ones(2, requires_grad=True)
    y = Asks.apply(x, asked, _compat.is_batched)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert asked == [True, False]


def test_whether_a_module_is_compiled():
    module = nn.Linear(2, 2)
    assert _compat.is_compiled(torch.compile(module))
    assert not _compat.is_compiled(module)
    assert not _compat.is_compiled(nn.Sequential(torch.compile(module)))


def test_whether_a_parameter_is_sharded():
    parameter = nn.Parameter(torch.ones(2))
    assert not _compat.is_sharded(parameter)
    _set_fsdp_flattened(parameter)
    assert _compat.is_sharded(parameter)
    assert hasattr(DTensor, "full_tensor")  # FSDP2; tests/test_strategies.py shards with either


def test_lightning_keeps_the_initial_hyperparameters_where_they_are_looked_for():
    class Module(pl.LightningModule):
        def __init__(self, width, network, parts, named):
            super().__init__()
            self.save_hyperparameters()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attribute '.*' is an instance of `nn.Module`")
        module = Module(3, nn.Linear(1, 1), [nn.Linear(1, 1)], {"head": nn.Linear(1, 1)})
    _compat.forget_hyperparameters(module, ["network", "parts", "named", "absent"])
    assert dict(module.hparams) == dict(module.hparams_initial) == {"width": 3}
