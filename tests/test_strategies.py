"""Two processes on the CPU, connected by gloo, train as one does that has both their rows."""

import json
import os
import re
from pathlib import Path
from statistics import mean

import pytest
import pytorch_lightning as pl
import torch
from conftest import TOKEN_IDS, ragged
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MetricCollection

from lightning_rdrop import AdaptiveAlpha, Head, RDropMixin, SimCSEMixin, Views, WithLosses
from lightning_rdrop.callbacks import ConsistencyMonitor
from lightning_rdrop.callbacks.consistency_monitor import LOGGED
from lightning_rdrop.data import ChatDataModule
from lightning_rdrop.metrics import (
    AverageGap,
    DropoutDisagreement,
    DropoutKL,
    average_gap,
    dropout_disagreement,
    dropout_kl,
)
from lightning_rdrop.modules import CausalLM

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


class Noise(nn.Module):
    """In the place of dropout: it depends on a row and its view alone, not on the batch or the process."""

    def __init__(self, joint):
        super().__init__()
        self.joint = joint
        self.passes = 0

    def forward(self, x):
        if not self.training:
            return x
        view = torch.arange(len(x)) * 2 // len(x) if self.joint else torch.full((len(x),), self.passes % 2)
        self.passes += 1
        return x * (1 + 0.5 * torch.sin((10 + view.view(-1, *[1] * (x.dim() - 1))) * x))


class Network(RDropMixin, pl.LightningModule):
    """Three classes for eight numbers, or for each token of eight numbers."""

    def __init__(self, passes="joint", *, reentrant=None, unused=False, norm=False, fused=False, lr=0.5, **kwargs):
        super().__init__(rdrop_passes=passes, **kwargs)
        torch.manual_seed(7)
        self.first = nn.Linear(8, 8)
        self.noise = Noise(passes == "joint")
        self.block = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Tanh())
        self.head = nn.Linear(16, 3)
        self.never = nn.Linear(2, 2) if unused else None
        self.reentrant = reentrant
        self.fused = fused
        self.lr = lr

    def forward(self, x):
        return self.head(self.rdrop_hidden(x))

    def rdrop_hidden(self, inputs):
        x = self.noise(self.first(inputs))
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)

    def rdrop_head(self):
        return Head(self.head.weight, self.head.bias) if self.fused else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Sharded(Network):
    """Its parameters lie on both ranks, half and half."""

    def configure_model(self):
        if self.device_mesh is not None:  # by ModelParallelStrategy
            for part in (self.first, self.block, self.head, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Steps(pl.Callback):
    """The terms of each step, and the number of rows that they are means over."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(
            [float(outputs["ce"]), float(outputs["kl"]), float(pl_module.rdrop_denominators.get("ce", 0))]
        )


def train(module, rows, batch_size, strategy="auto", callbacks=(), **trainer):
    """Two epochs; the weights, the metrics and the terms of each step."""
    steps = Steps()
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "precision": "64-true", "max_epochs": 2} | trainer,
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[steps, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's own sampler would shuffle them
    share = None if strategy == "auto" else DistributedSampler(rows, 2, int(os.environ["LOCAL_RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(rows, batch_size, sampler=share))
    weights = [getattr(part, "full_tensor", lambda part=part: part)().detach() for part in module.parameters()]
    return {
        "weights": torch.cat([part.flatten() for part in weights]).tolist(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "steps": steps.steps,
    }


def ddp(arguments, rows, batch_size, options=None, epochs=2):
    return train(Network(**arguments), rows, batch_size, DDPStrategy(**options or {}), max_epochs=epochs)


def examples(number=16):
    x = torch.randn(number, 8, generator=torch.Generator().manual_seed(1))
    return list(zip(x, x[:, :3].argmax(-1), strict=True))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"passes": "joint"}, {}),
        ({"passes": "separate"}, {}),
        ({"passes": "joint"}, {"static_graph": True}),
        ({"passes": "separate"}, {"static_graph": True}),
        ({"passes": "joint", "unused": True}, {"find_unused_parameters": True}),
        ({"passes": "separate", "unused": True}, {"find_unused_parameters": True}),
        ({"passes": "joint", "reentrant": True}, {}),
        ({"passes": "joint", "reentrant": False}, {}),
        ({"passes": "separate", "reentrant": True}, {"static_graph": True}),
        ({"passes": "separate", "reentrant": False}, {}),
        ({"passes": "joint", "fused": True}, {}),
        ({"passes": "joint", "rdrop_duplicate_at": "noise"}, {}),
    ],
    ids=str,
)
def test_ddp_of_two_batches_is_one_batch_of_both(pair, arguments, options):
    one = train(Network(**arguments), examples(), 8)
    two = pair.run(ddp, arguments, examples(), 4, options)
    assert two[0]["weights"] == two[1]["weights"] == pytest.approx(one["weights"], rel=1e-9)


class GivenViews(Network):
    """Two crops of each example, and a loss of the network's own."""

    def rdrop_unpack(self, batch):
        x, target = batch
        return Views(x, x.flip(1)), target

    def rdrop_predict_with_losses(self, inputs):
        output = self(inputs)
        return WithLosses(output, {"size": output.square().mean()})


class Supervised(SimCSEMixin, pl.LightningModule):
    """Embeddings of anchors, positives and hard negatives."""

    def __init__(self, passes):
        super().__init__(rdrop_passes=passes)
        torch.manual_seed(7)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x):
        return self.network(x)

    def rdrop_unpack_unlabeled(self, batch):
        x, _ = batch
        return Views(x, x + 0.1 * x.cos(), x.flip(1)), None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def ddp_of(kind, passes):
    return train(kind(passes), examples(), 4, "ddp")


@pytest.mark.parametrize("kind", [GivenViews, Supervised])
@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_views_of_the_data_on_two_ranks_are_those_of_one_batch(pair, kind, passes):
    one, two = train(kind(passes), examples(), 8), pair.run(ddp_of, kind, passes)
    assert two[0]["weights"] == two[1]["weights"] == pytest.approx(one["weights"], rel=1e-9)
    losses = [[step[0] for step in run["steps"]] for run in (one, *two)]
    assert losses[0] == pytest.approx([sum(both) / 2 for both in zip(*losses[1:], strict=True)])


class Alphas(pl.Callback):
    def __init__(self):
        self.alphas = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.alphas.append(pl_module.rdrop_alpha)


def adapted(strategy, batch_size, folder, resume=None):
    """The alphas of a training with AdaptiveAlpha, which is saved within a change."""
    watch = Alphas()
    save = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, strategy=strategy, precision="64-true",
        max_epochs=5, callbacks=[AdaptiveAlpha(6.6e-5, horizon=4, every=3), save, watch], logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    rank = int(os.environ.get("LOCAL_RANK", 0))
    rows = examples(14)
    rows = rows if strategy == "auto" else rows[:4] + rows[8:12] if rank == 0 else rows[4:8] + rows[12:]
    trainer.fit(Network(lr=0.0), DataLoader(rows, batch_size), ckpt_path=resume)
    return watch.alphas


def test_adaptive_alpha_is_the_same_on_both_ranks_and_that_of_all_rows(pair, tmp_path):
    one = adapted("auto", 8, tmp_path / "one")
    first, second = pair.run(adapted, "ddp", 4, tmp_path / "two")
    assert first == second
    assert len(set(first)) == 4
    assert first == pytest.approx(one, rel=1e-9)
    # a resumed one has the sums of each rank: those of rank 0 alone would give other alphas
    for resumed in pair.run(adapted, "ddp", 4, tmp_path / "two", tmp_path / "two" / "step=4.ckpt"):
        assert resumed == first[4:]


def test_uneven_last_batches(pair):
    rows = examples(13)  # seven a rank, for which the first one is taken twice
    one = train(Network(), [*rows, rows[0]], 8)
    two = pair.run(ddp, {}, rows, 4)
    assert [step[2] for step in two[0]["steps"]] == [4, 3, 4, 3]
    assert two[0]["weights"] == two[1]["weights"] == pytest.approx(one["weights"], rel=1e-9)


def test_batch_norm(pair):
    """Each rank has statistics of its own, over the rows of both views."""
    two = pair.run(ddp, {"norm": True}, examples(), 4)
    assert two[0]["weights"] == two[1]["weights"]
    assert all(kl > 0 for rank in two for _, kl, _ in rank["steps"])


def test_reentrant_checkpoints_in_separate_passes_need_a_static_graph(pair):
    with pytest.raises(RuntimeError, match="marked as ready twice"):
        pair.run(ddp, {"passes": "separate", "reentrant": True}, examples(), 4)


def test_epoch_means_count_the_tokens_of_all_ranks(pair):
    """Without learning, so that one process sees what two see."""
    one = train(Network(lr=0.0), ragged(3, 8), 8, max_epochs=1)
    two = pair.run(ddp, {"lr": 0.0}, ragged(3, 8), 1, {}, 1)
    counted = [rows for rank in two for _, _, rows in rank["steps"]]
    assert counted == [8, 3, 7, 5, 1, 2, 1, 4]  # 31: an odd number, and unlike ones a rank
    for index, name in enumerate(("train/ce", "train/kl")):
        by_hand = sum(step[index] * step[2] for rank in two for step in rank["steps"]) / 31
        for rank in two:
            assert rank["metrics"][f"{name}_epoch"] == pytest.approx(by_hand) == one["metrics"][f"{name}_epoch"]
            assert rank["metrics"][name] == rank["steps"][-1][index]  # a step is the rank's own


def monitored(strategy, batch_size, rows, kind=Network, **trainer):
    module = kind(passes="separate", lr=0.0)  # its two passes are known
    module.validation_step = lambda batch, batch_idx: None
    share = None if strategy == "auto" else DistributedSampler(rows, 2, int(os.environ["LOCAL_RANK"]), shuffle=False)
    module.val_dataloader = lambda: DataLoader(rows, batch_size, sampler=share)
    monitor = ConsistencyMonitor(passes=2)
    sharded = {"fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "fsdp": OnCPU}
    if strategy in sharded:
        strategy, trainer = sharded[strategy](), {"precision": "32-true"}
    found = train(module, rows, batch_size, strategy, [monitor], max_epochs=1, **trainer)
    return {name: value for name, value in found["metrics"].items() if name.startswith("val/")}


def test_the_monitor_of_two_processes_is_that_of_one(pair):
    """Rows of tokens, of which each rank and each batch has other numbers that count."""
    one = monitored("auto", 8, ragged(3, 8))
    two = pair.run(monitored, "ddp", 3, ragged(3, 8))
    assert set(one) == {f"val/{name}" for name in LOGGED}
    assert one["val/dropout_kl"] > 0
    assert two[0] == two[1] == pytest.approx(one, rel=1e-9)


def test_the_monitor_with_sharded_weights(pair):
    """The weights of FSDP2 are gathered wherever the module is called, those of FSDP in Lightning's steps only."""
    one = monitored("auto", 8, ragged(3, 8), precision="32-true")
    two = pair.run(monitored, "fsdp2", 3, ragged(3, 8), Sharded)
    assert two[0] == two[1] == pytest.approx(one, rel=1e-4, abs=1e-7)
    with pytest.raises(ValueError, match=r"train with DDP or ModelParallelStrategy \(FSDP2\)"):
        pair.run(monitored, "fsdp", 3, ragged(3, 8))


def measured(rows):
    """The metrics of this rank's share of the rows, in batches of three, as torchmetrics joins them."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    passes, off, target = (part[int(os.environ["LOCAL_RANK"]) :: 2] for part in rows)
    metrics = MetricCollection({"kl": DropoutKL(), "gap": AverageGap(), "disagreement": DropoutDisagreement()})
    for start in range(0, len(target), 3):
        batch = slice(start, start + 3)
        metrics.update(predictions=passes[batch].transpose(0, 1), weight_average=off[batch], target=target[batch])
    return {name: float(value) for name, value in metrics.compute().items()}


def test_metrics_of_two_processes_are_those_of_one(pair):
    generator = torch.Generator().manual_seed(0)
    passes, off = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((13, 4, 3), (13, 3)))
    target = torch.randint(3, (13,), generator=generator)
    target[[0, 2, 4, 5]] = -100  # three of one rank, one of the other
    two = pair.run(measured, (passes, off, target))
    every = passes.transpose(0, 1)
    one = dropout_kl(every, target) | average_gap(every, off, target)
    one["disagreement"] = dropout_disagreement(every, target)
    assert two[0] == two[1] == pytest.approx({name: float(value) for name, value in one.items()}, rel=1e-12)


class Plain(pl.LightningModule):
    """What one writes without R-Drop, and logs without collectives."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Collectives(pl.Callback):
    """The collectives of each step, by name, as the profiler saw them."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profiler.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.profiler.stop()
        self.steps.append(sorted(event.name for event in self.profiler.events() if event.name.startswith("c10d::")))


def collectives(kind, callbacks=()):
    watch = Collectives()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, watch],
    )  # fmt: skip
    trainer.fit(kind(), DataLoader(examples(32), 4))
    return watch.steps


def test_no_step_has_a_collective_that_plain_training_has_not(pair):
    plain, ours = pair.run(collectives, Plain)[0], pair.run(collectives, Network)[0]
    assert len(plain) == 4
    assert all(plain)
    assert ours[1:] == plain[1:]
    # on the first batch the guard decides whether views differ: a barrier and a reduction
    assert len(ours[0]) == len(plain[0]) + 2


class Synchronised(nn.Module):
    """Shifts rows to a mean of zero over all ranks, which takes a collective in each pass, as SyncBatchNorm does."""

    def forward(self, x):
        if not self.training:
            return x
        mean = x.detach().mean(0)
        torch.distributed.all_reduce(mean)
        return x - mean / 2


class Together(RDropMixin, pl.LightningModule):
    def __init__(self, p):
        super().__init__()
        self.network = nn.Sequential(nn.Dropout(p), Synchronised(), nn.Linear(8, 3))

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def guarded(p):
    rows = examples(16)
    for x, _ in rows[1:8:2]:
        x.zero_()  # the first batch of rank 1, whose views agree by chance
    return train(Together(p), rows, 4, "ddp")


def test_the_guard_of_all_ranks_decides_together(pair):
    """A rank that drew again alone would wait for the others in the collective of its network."""
    two = pair.run(guarded, 0.5, seconds=30)
    assert two[1]["steps"][0][1] == 0 < two[0]["steps"][0][1]  # kl
    assert two[0]["weights"] == two[1]["weights"]
    with pytest.raises(ValueError, match=r"p = 0: network\.0"):
        pair.run(guarded, 0.0, seconds=30)


class SemiSupervised(RDropMixin, pl.LightningModule):
    def __init__(self, p, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 3))

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def with_an_empty_part(p, arguments):
    """The unlabelled part of the first batch has no example on rank 1."""
    torch.manual_seed(0)
    module, steps = SemiSupervised(p, **arguments), Steps()
    sizes = (0, 4, 4) if os.environ["LOCAL_RANK"] == "1" else (4, 4, 4)
    labeled = DataLoader([(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))] * 3, batch_size=None)
    others = DataLoader([torch.randn(size, 8) for size in sizes], batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, callbacks=[steps],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module, {"labeled": labeled, "unlabeled": others})
    except ValueError as error:
        return str(error), len(steps.steps)
    return [part.tolist() for part in module.parameters()], [kl for _, kl, _ in steps.steps]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"rdrop_labeled_weight": 0.0}, {"rdrop_labeled_weight": 0.0, "rdrop_duplicate_at": "auto"}],
    ids=str,
)
def test_a_part_that_is_empty_on_one_rank(pair, arguments):
    """It takes part in what all ranks decide together on the first batch, for which the others would wait forever."""
    (weights, kl), (others, other_kl) = pair.run(with_an_empty_part, 0.3, arguments, seconds=30)
    assert weights == others
    assert len(kl) == len(other_kl) == 3
    assert all(value > 0 for value in kl + other_kl[1:])
    if "rdrop_duplicate_at" not in arguments:
        # views that cannot differ are found in the first step in which all have examples
        for reason, steps in pair.run(with_an_empty_part, 0.0, arguments, seconds=30):
            assert "p = 0: network.1" in reason
            assert steps == (1 if arguments else 0)


def fsdp2(kind, arguments):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return train(kind(**arguments), examples(), 4, strategy, precision="32-true")


class Zero(Sharded):
    """A head that starts at zero, as LoRA does, and hides the noise of the first batch."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)


class Dead(Zero):
    def forward(self, x):
        return self.head(self.block(self.first(x)))


class OnCPU(FSDPStrategy):
    """Lightning's FSDPStrategy, which asks for a GPU; FSDP itself does not, once it is told."""

    def __init__(self):
        super().__init__(auto_wrap_policy={nn.Linear}, process_group_backend="gloo")

    def _setup_model(self, model):
        policy = self.sharding_strategy
        return FullyShardedDataParallel(model, sharding_strategy=policy, device_id=torch.device("cpu"), **self.kwargs)


class Whole(pl.Callback):
    """The weights, gathered from all ranks."""

    def on_train_end(self, trainer, pl_module):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False):
            self.weights = torch.cat([part.detach().flatten() for part in pl_module.parameters()]).tolist()


def fsdp(kind, arguments):
    whole = Whole()
    trained = train(kind(**arguments), examples(), 4, OnCPU(), [whole], precision="32-true")
    return trained | {"weights": whole.weights}


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize(("sharded", "kind"), [(fsdp2, Sharded), (fsdp, Network)])
def test_sharded_training_on_two_batches_is_one_on_both(pair, sharded, kind, passes, reentrant):
    arguments = {"passes": passes, "reentrant": reentrant}
    one = train(Network(**arguments), examples(), 8, precision="32-true")
    two = pair.run(sharded, kind, arguments)
    assert two[0]["weights"] == two[1]["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("sharded", [fsdp2, fsdp])
def test_the_guard_on_sharded_weights(pair, sharded):
    one = train(Zero(), examples(), 8, precision="32-true")
    two = pair.run(sharded, Zero, {}, seconds=30)
    assert two[0]["steps"][0][1] == 0 < two[0]["steps"][1][1]
    assert two[0]["weights"] == two[1]["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="no stochastic layer"):
        pair.run(sharded, Dead, {}, seconds=30)


class Gathered(Sharded):
    def rdrop_head(self):
        parts = (self.head.weight, self.head.bias)
        if not isinstance(parts[0], DTensor):
            return Head(*parts)
        return Head(*(part.full_tensor(grad_placements=[Partial("avg")]) for part in parts))


def test_a_fused_head_under_fsdp2(pair):
    one = train(Network(), examples(), 8, precision="32-true")
    two = pair.run(fsdp2, Gathered, {})
    assert two[0]["weights"] == two[1]["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-6)
    with pytest.raises(TypeError, match=r"weight is a DTensor, sharded across ranks.*full_tensor\(grad_placements"):
        pair.run(fsdp2, Sharded, {"fused": True}, seconds=30)


class ShardedLM(CausalLM):
    def configure_model(self):
        if self.device_mesh is not None:
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


def language_model(folder, fused_head, strategy):
    options = {"data_parallel_size": 2, "tensor_parallel_size": 1} if strategy is ModelParallelStrategy else {}
    texts = torch.randint(20, (16, 7), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": text} for text in texts]
    return train(ShardedLM(folder, fused_head=fused_head), rows, 4, strategy(**options), precision="32-true")


def test_a_language_model_is_sharded_with_its_logits_only(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    for fused_head, strategy in ((False, ModelParallelStrategy), (True, DDPStrategy)):
        two = pair.run(language_model, tmp_path, fused_head, strategy)
        assert two[0]["weights"] == two[1]["weights"]
        assert all(kl > 0 for rank in two for _, kl, _ in rank["steps"])
    with pytest.raises(TypeError, match=r"the whole output layer, but that of .*GPT2LMHeadModel is sharded"):
        pair.run(language_model, tmp_path, True, ModelParallelStrategy, seconds=30)
    with pytest.raises(TypeError, match=r"the whole output layer, but that of .*GPT2LMHeadModel is sharded"):
        pair.run(language_model, tmp_path, True, OnCPU, seconds=30)


def by_fabric():
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy as FabricDDP

    fabric = Fabric(accelerator="cpu", devices=2, num_nodes=1, strategy=FabricDDP(process_group_backend="gloo"))
    fabric.launch()
    module = Network(rdrop_alpha=2.0)
    wrapped, optimizer = fabric.setup(module, module.configure_optimizers())
    wrapped.mark_forward_method("rdrop_step")
    losses = []
    for batch in examples(8)[fabric.global_rank :: 2]:
        terms = wrapped.rdrop_step(tuple(part.unsqueeze(0) for part in batch))
        fabric.backward(terms.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((float(terms.loss), float(terms.ce + 2.0 * terms.kl)))
    return losses, [parameter.detach().flatten().tolist() for parameter in module.parameters()]


def test_fabrics_ddp(pair):
    (losses, weights), (_, others) = pair.run(by_fabric)
    assert all(loss == pytest.approx(by_hand, rel=1e-6) for loss, by_hand in losses)
    assert weights == others


def loop_of_the_examples():
    from lightning_fabric import Fabric

    from examples.fabric_loop import train as loop

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    said = []
    fabric.print = said.append
    module, terms = loop(fabric)
    return (
        said,
        [parameter.tolist() for parameter in module.parameters()],
        module.rdrop_alpha,
        terms.prediction.tolist(),
    )


def test_the_loop_of_the_examples_by_fabric(pair):
    """The ranks saw other rows, and have the same weights."""
    (said, weights, alpha, rows), (_, others, _, other_rows) = pair.run(loop_of_the_examples)
    assert weights == others
    assert rows != other_rows
    assert alpha == 4.0
    (ce, kl), (last_ce, last_kl) = (map(float, re.findall(r"\d+\.\d+", line)) for line in (said[0], said[-1]))
    assert last_ce < ce
    assert min(kl, last_kl) > 0


class Seen(pl.Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch["attention_mask"].sum(1).tolist()))


def grouped(folder):
    data, seen = ChatDataModule(str(folder), str(folder / "train.jsonl"), batch_size=2), Seen()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[seen], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CausalLM(str(folder), learning_rate=0.0), data)
    return seen.batches


def test_two_ranks_have_batches_of_about_one_length(pair, folder):
    """Each conversation is in one batch of one rank, in every epoch in another order."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **TOKEN_IDS)
    path = Path(folder(transformers.GPT2LMHeadModel(settings)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m.content }} </s>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<s> {% endif %}"
    tokenizer.save_pretrained(path)
    rows = [{"prompt": "a " * length, "completion": "b c"} for length in range(1, 17)] * 4
    (path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    both = pair.run(grouped, path)
    orders = []
    for epoch in range(2):
        batches = [lengths for rank in both for number, lengths in rank if number == epoch]
        assert sorted(length for batch in batches for length in batch) == [
            length + 6 for length in range(1, 17) for _ in range(4)
        ]
        assert mean(abs(one - other) for one, other in batches) < 3  # shuffled, it would be 5.3
        orders.append(batches)
    assert orders[0] != orders[1]
