"""Cost of a whole training step, with the batch duplicated early or late, compared with hand-written steps:

    python examples/benchmarks/step.py
    python examples/benchmarks/step.py --device cuda

Seconds of a Lightning step, as a median over rounds in which all variants take turns, and the peak memory that each
adds, on a CPU in a separate process. The ideal of a late split is plain training on twice the rows with a forward
written for it: the layers before the split run once and without gradient, the others on twice the rows. Prints the
tables, and writes step.csv and step.png.
"""

import argparse
import csv
import itertools
import logging
import multiprocessing
import random
import resource
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import RDropMixin

ALPHA = 4.0
SPLITS = (0.0, 0.25, 0.5, 0.75)


def encoder(layers):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 2000}
    return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=layers, num_labels=15))


def texts():
    tokens = torch.randint(2000, (32, 64))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.randint(15, (32,))}


class Image(nn.Module):
    """Convolutions without dropout, and a head with dropout."""

    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 64]
        blocks = (
            nn.Sequential(nn.Conv2d(one, two, 3, stride=2, padding=1), nn.ReLU())
            for one, two in itertools.pairwise(widths)
        )
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.body(x))


def images():
    return {"x": torch.randn(32, 3, 64, 64), "labels": torch.randint(10, (32,))}


def seq2seq():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 3, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 512}
    return BartForConditionalGeneration(BartConfig(vocab_size=2000, d_model=128, max_position_embeddings=80, **sizes))


def pairs():
    tokens = torch.randint(3, 2000, (32, 48))
    return {"input_ids": tokens, "decoder_input_ids": tokens[:, :32], "labels": torch.randint(3, 2000, (32, 32))}


def layers_of(network):
    """The embeddings, the layers, of which the lower ones can run once, and the name of these layers."""
    if hasattr(network, "bert"):
        return [network.bert.embeddings], network.bert.encoder.layer, "encoder.layer"
    encoder = network.model.encoder
    return (
        [network.model.shared, encoder.embed_positions, encoder.layernorm_embedding],
        encoder.layers,
        "encoder.layers",
    )


def frozen(network, share):
    """Freeze a share of the layers, without dropout; returns the index of the first layer above."""
    embeddings, layers, _ = layers_of(network)
    first = round(share * len(layers))
    for part in [*embeddings, *layers[:first]] if share else []:
        part.eval().requires_grad_(False)
    return first


def predict(model, inputs):
    output = model(**inputs) if not isinstance(model, Image) else model(inputs["x"])
    return getattr(output, "logits", output)


def unpack(batch):
    return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]


class Step(pl.LightningModule):
    """The common part of all variants."""

    def __init__(self, network, **rdrop):
        super().__init__(**rdrop)
        self.network = network

    def forward(self, **inputs):
        return predict(self.network, inputs)

    def log_terms(self, loss, ce, kl, examples):
        self.log("train/loss", loss, batch_size=examples)
        terms = {"ce": ce.detach(), "kl": kl.detach()}
        for name, value in (terms | {"alpha": ALPHA}).items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=examples)
        for name, value in terms.items():
            self.log(f"train/{name}_epoch", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=examples)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Plain(Step):
    """Cross-entropy, on the batch or on twice its rows."""

    views = 1

    def training_step(self, batch, batch_idx):
        inputs, labels = unpack(batch)
        inputs = {key: torch.cat([value] * self.views) for key, value in inputs.items()}
        return self.log_step(self(**inputs), labels)

    def log_step(self, logits, labels):
        loss = F.cross_entropy(logits.flatten(0, -2), labels.repeat(self.views, *[1] * (labels.dim() - 1)).flatten())
        self.log_terms(loss, loss, loss, len(labels))
        return loss


class Doubled(Plain):
    views = 2


class Official(Step):
    """Two forward passes, as in the README of the official repository."""

    def training_step(self, batch, batch_idx):
        inputs, labels = unpack(batch)
        p, q = (self(**inputs).flatten(0, -2) for _ in range(2))
        labels = labels.flatten()
        ce = 0.5 * (F.cross_entropy(p, labels) + F.cross_entropy(q, labels))
        one = F.kl_div(F.log_softmax(p, -1), F.softmax(q, -1), reduction="none").sum()
        other = F.kl_div(F.log_softmax(q, -1), F.softmax(p, -1), reduction="none").sum()
        kl = (one + other) / 4 / len(labels)
        loss = ce + ALPHA * kl
        self.log_terms(loss, ce, kl, len(batch["labels"]))
        return loss


class ByHand(Doubled):
    """Cross-entropy on twice the rows, doubled late in a forward written for this network."""

    def __init__(self, network, first):
        super().__init__(network)
        self.first = first

    def forward(self, input_ids, decoder_input_ids=None, **_):
        network = self.network
        _, layers, _ = layers_of(network)
        if decoder_input_ids is None:
            hidden = network.bert.embeddings(input_ids)
        else:
            encoder = network.model.encoder
            hidden = encoder.embed_tokens(input_ids) + encoder.embed_positions(input_ids)
            hidden = F.dropout(encoder.layernorm_embedding(hidden), 0.1, self.first == 0)
        for number, layer in enumerate(layers):
            hidden = layer(torch.cat([hidden, hidden]) if number == self.first else hidden, None)
        if decoder_input_ids is None:
            return network.classifier(network.dropout(network.bert.pooler(hidden)))
        tokens = torch.cat([decoder_input_ids, decoder_input_ids])
        states = network.model.decoder(tokens, encoder_hidden_states=hidden, use_cache=False).last_hidden_state
        return network.lm_head(states)

    def training_step(self, batch, batch_idx):
        inputs, labels = unpack(batch)
        return self.log_step(self(**inputs), labels)


class Ours(RDropMixin, Step):
    pass


MODELS = {
    "encoder, 6 layers": (lambda: encoder(6), texts),
    "encoder, 12 layers": (lambda: encoder(12), texts),
    "images, dropout in the head": (Image, images),
    "seq2seq, 3 + 3 layers": (seq2seq, pairs),
}


def ways(name):
    """The variants of training a model, as functions that build the module."""
    make, _ = MODELS[name]

    def late(share, by_hand=False, at=None):
        network = make().train()
        first = frozen(network, share)
        if by_hand:
            return ByHand(network, first)
        return Ours(network, rdrop_duplicate_at=at or f"{layers_of(network)[2]}.{first}")

    found = {
        "plain, B rows": lambda: Plain(make().train()),
        "plain, 2B rows": lambda: Doubled(make().train()),
        "plain, 2B rows, again": lambda: Doubled(make().train()),
        "official, two passes": lambda: Official(make().train()),
        "ours, joint": lambda: Ours(make().train()),
        "ours, separate": lambda: Ours(make().train(), rdrop_passes="separate"),
    }
    if make is Image:
        return found | {"ours, auto": lambda: Ours(make().train(), rdrop_duplicate_at="auto")}
    for share in SPLITS:
        found |= {
            f"by hand, late at {share:.0%}": partial(late, share, by_hand=True),
            f"ours, late at {share:.0%}": partial(late, share),
        }
    return found | {"ours, auto, half of it frozen": partial(late, 0.5, at="auto")}


class Clock(pl.Callback):
    """Measure from the start of each step to the start of the next."""

    def __init__(self):
        self.times = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def train(module, batch, steps, device):
    """Seconds of each step after the first two."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        max_steps=steps,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return [after - before for before, after in itertools.pairwise(clock.times)][2:]


def seconds(name, rounds, steps, device):
    """The median step of each variant, over rounds in which all take turns."""
    torch.manual_seed(0)
    batch = MODELS[name][1]()
    modules = {way: build() for way, build in ways(name).items()}
    for module in modules.values():
        train(module, batch, 3, device)  # the guard, and the search for a split
    found = {way: [] for way in modules}
    for _ in range(rounds):
        # in random order, because a variant that follows a smaller one has to allocate memory again
        for way in random.sample(list(modules), len(modules)):
            found[way] += train(modules[way], batch, steps, device)
    return {way: statistics.median(times) for way, times in found.items()}


def peak(name, way, device):
    """Bytes that training needs in addition to module and batch."""
    torch.set_num_threads(2)
    logging.disable(logging.INFO)
    batch, module = MODELS[name][1](), ways(name)[way]()
    if device == "cuda":
        module.to(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(module, batch, 4, device)
        return torch.cuda.max_memory_allocated() - before
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(module, batch, 4, device)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def peaks(name, device):
    if device == "cuda":
        return {way: peak(name, way, device) for way in ways(name)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "lightning_rdrop.modules"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return {way: pool.apply(peak, (name, way, device)) for way in ways(name)}


def measure(name, rounds, steps, device):
    memory, found = peaks(name, device), seconds(name, rounds, steps, device)
    doubled = found["plain, 2B rows"]
    print(f"\n| {name} | ms | of plain 2B | of its ideal | peak memory, MiB |", "|---" * 5 + "|", sep="\n")
    for way, value in found.items():
        ideal = found.get(way.replace("ours, late", "by hand, late"))
        share = f"{value / ideal:.2f}" if ideal and ideal != value else ""
        print(
            f"| {way} | {1e3 * value:.1f} | {value / doubled:.2f} | {share} | {memory[way] / 2**20:.0f} |", flush=True
        )
        yield {"model": name, "way": way, "seconds": value, "ratio": value / doubled, "bytes": memory[way]}


def draw(rows, path):
    from matplotlib.figure import Figure

    names = [name for name in MODELS if any("late" in row["way"] for row in rows if row["model"] == name)]
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        ratios = {row["way"]: row["ratio"] for row in rows if row["model"] == name}
        for label, kind, style in (("rdrop_duplicate_at", "ours", "o-"), ("ideal: by hand", "by hand", "k--")):
            axes.plot(SPLITS, [ratios[f"{kind}, late at {share:.0%}"] for share in SPLITS], style, label=label)
        axes.axhline(ratios["plain, B rows"], color="gray", linestyle=":", label="plain, B rows")
        axes.set(
            title=name, xlabel="share of the layers that runs once", ylabel="time of plain 2B rows", ylim=(0, None)
        )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="per round, the first two of which are not counted")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folder", type=Path, default=Path("."), help="for step.csv and step.png")
    given = parser.parse_args()
    torch.set_num_threads(2)
    random.seed(0)
    logging.disable(logging.INFO)
    rows = [row for name in given.models for row in measure(name, given.rounds, given.steps, given.device)]
    given.folder.mkdir(parents=True, exist_ok=True)
    with open(given.folder / "step.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, given.folder / "step.png")
