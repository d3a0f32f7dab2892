"""Cost of the loss, forward and backward, compared with cross-entropy and other implementations of R-Drop:

    python examples/benchmarks/loss.py
    python examples/benchmarks/loss.py --quick    # two minutes: only times, one thread, without the largest size
    python examples/benchmarks/loss.py --device cuda    # a larger head, in bfloat16; also Liger's, if installed

Median times relative to ``F.cross_entropy`` on the same 2N rows, with all implementations taking turns in one process,
and the peak memory that each adds, on a CPU in a separate process. Prints the tables and the machine, and writes
loss.csv and loss.png.
"""

import argparse
import csv
import datetime
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from lightning_rdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except ImportError:
    LigerFusedLinearCrossEntropyLoss = None

ALPHA = 4.0
SIZES = [(64, 15), (512, 119), (4096, 1000), (2048, 8000), (512, 32000), (2048, 32000)]
HEAD = {"cpu": (2048, 512, 32000), "cuda": (8192, 4096, 128256)}
"""N, D, C; on a GPU the sizes of a Llama, in bfloat16."""
LEAST = 3
"""Minimum number of rounds, however long they take."""


def plain(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.repeat(2))


def official(logits, target):
    """The README of the official repository, with alpha on our scale."""
    p, q = logits
    ce = 0.5 * (F.cross_entropy(p, target) + F.cross_entropy(q, target))
    one = F.kl_div(F.log_softmax(p, dim=-1), F.softmax(q, dim=-1), reduction="none").sum()
    other = F.kl_div(F.log_softmax(q, dim=-1), F.softmax(p, dim=-1), reduction="none").sum()
    return ce + ALPHA * (one + other) / 4 / len(target)


def paddlenlp(logits, target):
    """PaddleNLP's RDropLoss plus one cross-entropy, with alpha on our scale."""
    p, q = logits
    one = F.kl_div(F.log_softmax(p, dim=-1), F.softmax(q, dim=-1), reduction="batchmean")
    other = F.kl_div(F.log_softmax(q, dim=-1), F.softmax(p, dim=-1), reduction="batchmean")
    return F.cross_entropy(logits.flatten(0, 1), target.repeat(2)) + ALPHA * (one + other) / 2 / 2


def composite(logits, target):
    """The formula in log space, with a single log-softmax and without underflow."""
    log_p = logits.log_softmax(-1)
    (p, q), gap = log_p.exp(), log_p[0] - log_p[1]
    ce = F.nll_loss(log_p.flatten(0, 1), target.repeat(2))
    return ce + ALPHA * ((p - q) * gap).sum(-1).mean() / 4


def ours(logits, target):
    return rdrop_cross_entropy(logits, target, ALPHA).loss


def ours_compiled(logits, target):
    return rdrop_cross_entropy(logits, target, ALPHA, compile=True).loss


def plain_head(hidden, weight, target):
    return plain(hidden @ weight.T, target)


def official_head(hidden, weight, target):
    return official(hidden @ weight.T, target)


def chunked_head(hidden, weight, target):
    """torch's own head, with plain cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden.flatten(0, 1), weight, target.repeat(2), options=options)


def ours_head(hidden, weight, target):
    return linear_rdrop_cross_entropy(hidden, weight, target, ALPHA).loss


def liger_head(hidden, weight, target):
    """Liger's head, with plain cross-entropy."""
    return LigerFusedLinearCrossEntropyLoss()(weight, hidden.flatten(0, 1), target.repeat(2))


def ours_compiled_head(hidden, weight, target):
    return linear_rdrop_cross_entropy(hidden, weight, target, ALPHA, compile=True).loss


LOSSES = {"plain": plain, "official": official, "PaddleNLP": paddlenlp, "composite": composite, "ours": ours}
if shutil.which("g++"):
    LOSSES |= {"composite, compiled": torch.compile(composite, dynamic=False), "ours, compiled": ours_compiled}
HEADS = {"plain": plain_head, "official": official_head, "ours": ours_head}
if shutil.which("g++"):
    HEADS["ours, compiled"] = ours_compiled_head
if hasattr(F, "linear_cross_entropy"):
    HEADS["torch's chunked head"] = chunked_head
if LigerFusedLinearCrossEntropyLoss is not None and torch.cuda.is_available():
    HEADS["Liger, plain"] = liger_head


def arguments(size, device):
    """Leaf tensors and target: logits (2, N, C), or hidden states (2, N, D) and a weight (C, D)."""
    torch.manual_seed(0)
    rows, *_, classes = size
    target = torch.randint(classes, (rows,), device=device)
    dtype = torch.bfloat16 if device == "cuda" and len(size) == 3 else torch.float32
    states = torch.randn(2, rows, size[1], device=device, dtype=dtype)
    states[1].mul_(0.5).add_(states[0])  # in place, so that no copy raises the peak before it is measured
    if len(size) == 2:
        return [states.requires_grad_()], target
    weight = torch.randn(classes, size[1], device=device, dtype=dtype).div_(size[1] ** 0.5)
    return [states.requires_grad_(), weight.requires_grad_()], target


def ways(size):
    return LOSSES if len(size) == 2 else HEADS


def step(loss, leaves, target):
    torch.autograd.grad(loss(*leaves, target), leaves)


def clocked(loss, leaves, target, calls=1):
    """Seconds of a step."""
    start = time.perf_counter()
    for _ in range(calls):
        step(loss, leaves, target)
    if target.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def times(size, device, threads, rounds, seconds):
    """The median time of a step for each implementation; they take turns."""
    leaves, target = arguments(size, device)
    torch.compiler.reset()  # compile each size as if it were the only one
    torch.set_num_threads(threads)
    found, calls, end = {}, {}, time.monotonic() + seconds
    for name, loss in ways(size).items():
        clocked(loss, leaves, target)  # warm-up, and compilation
        found[name] = [clocked(loss, leaves, target)]
        calls[name] = max(1, int(5e-3 / found[name][0]))
    while len(found["plain"]) < LEAST or (len(found["plain"]) < rounds and time.monotonic() < end):
        for name, loss in ways(size).items():
            found[name].append(clocked(loss, leaves, target, calls[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def peak(name, size, device):
    """Bytes that a step needs in addition to its arguments."""
    (states, *head), target = arguments(size, device)
    leaves = [states, *head]
    step(ways(size)[name], [states[:, :64].detach().requires_grad_(), *head], target[:64])  # compiles as well
    before = resident(device, reset=True)
    step(ways(size)[name], leaves, target)
    return resident(device) - before


def resident(device, reset=False):
    """Peak memory of this process in bytes, since the last reset if the system supports it."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset and (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")
    if (status := Path("/proc/self/status")).exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks(size, device):
    if device == "cuda":
        return {name: peak(name, size, device) for name in ways(size)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_rdrop"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(peak, (name, size, device)) for name in ways(size)}


def measure(sizes, given):
    for size in sizes:
        added = dict.fromkeys(ways(size), 0) if given.quick else peaks(size, given.device)
        for count in given.threads:
            found = times(size, given.device, count, given.rounds, given.seconds)
            yield [
                {
                    "size": " x ".join(map(str, size)),
                    "threads": count,
                    "way": name,
                    "seconds": value,
                    "ratio": value / found["plain"],
                    "bytes": added[name],
                }
                for name, value in found.items()
            ]


def table(sizes, title, given):
    """Measure, and print row by row."""
    names, rows = list(ways(sizes[0])), []
    peak = [] if given.quick else [f"peak memory, MiB: {', '.join(names)}"]
    columns = [f"{title}, threads", "plain, ms", *names[1:], *peak]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for group in measure(sizes, given):
        first = group[0]
        cells = [f"{first['size']}, {first['threads']}", f"{1e3 * first['seconds']:.3g}"]
        cells += [f"{row['ratio']:.2f}" for row in group[1:]]
        cells += [", ".join(f"{row['bytes'] / 2**20:.0f}" for row in group)] if peak else []
        print(f"| {' | '.join(cells)} |", flush=True)
        rows += group
    return rows


def machine(device):
    """Date, hardware and version of torch."""
    if device == "cuda":
        return f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    processor = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        fields = dict(line.partition("\t")[::2] for line in file.read_text().splitlines())
        processor = fields.get("model name", ": " + processor).lstrip(": ")
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{datetime.date.today()}, {processor}, {vectors}, {os.cpu_count()} cores, torch {torch.__version__}"


def draw(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("seconds", "bytes"), ("ns", "bytes"), strict=True):
        for name in dict.fromkeys(row["way"] for row in rows):
            own = [row for row in rows if row["way"] == name and row["threads"] == rows[0]["threads"]]
            each = [2 * int(row["size"].split(" x ")[0]) * int(row["size"].split(" x ")[-1]) for row in own]
            scale = 1e9 if key == "seconds" else 1
            axes.plot(
                [row["size"] for row in own],
                [scale * r[key] / n for r, n in zip(own, each, strict=True)],
                "o-",
                label=name,
            )
        axes.set(xlabel="N x C", ylabel=f"{label} per logit", yscale="log")
        axes.tick_params(axis="x", labelrotation=20)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1 and 2, on a GPU 1")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20, help="per size, after its minimum rounds")
    parser.add_argument("--quick", action="store_true", help="about two minutes")
    parser.add_argument("--folder", type=Path, default=Path("."), help="for loss.csv and loss.png")
    given = parser.parse_args()
    if given.quick:
        given.threads, given.seconds, LEAST = [1], 2, 1
    given.threads = given.threads or ([1] if given.device == "cuda" else [1, 2])
    print(machine(given.device))
    losses = table(SIZES[:-1] if given.quick else SIZES, "N x C", given)
    heads = table([HEAD[given.device]], "head, N x D x C", given)
    if not given.quick:
        given.folder.mkdir(parents=True, exist_ok=True)
        with open(given.folder / "loss.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, losses[0])
            writer.writeheader()
            writer.writerows(losses + heads)
        draw(losses, given.folder / "loss.png")
