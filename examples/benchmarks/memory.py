"""Memory and time of a training step of a language model, plain and with several settings of R-Drop.

    python examples/benchmarks/memory.py head   # LoRA with a vocabulary of 128,000: logits dominate the memory
    python examples/benchmarks/memory.py ways   # full training of a small model: settings that save memory
    python examples/benchmarks/memory.py head --device cuda --layers 8 --width 2048 --batch 4

A Llama with random weights. Each setting runs in a separate process. Peak memory is what the steps, including the guard
on the first batch, need in addition to model and batch; time is the median step without the first two. Prints a table,
and writes memory_head.csv or memory_ways.csv.
"""

import argparse
import csv
import logging
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.nn import functional as F

ALPHA = 1.0
LORA = {"peft": {"r": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}}
PLAIN = {"rdrop_views": 1}
CHECKPOINTS, FUSED, SEPARATE = {"gradient_checkpointing": True}, {"fused_head": True}, {"rdrop_passes": "separate"}
HEAD = {
    "plain": (LORA | PLAIN, 1),
    "usual R-Drop": (LORA, 1),
    "ours, with logits": (LORA, 1),
    "ours, fused_head": (LORA | FUSED, 1),
}
WAYS = {
    "plain": (PLAIN, 1),
    "R-Drop": ({}, 1),
    "separate passes": (SEPARATE, 1),
    "half the batch, accumulated twice": ({}, 2),
    "separate passes of half the batch, accumulated twice": (SEPARATE, 2),
    "gradient checkpointing": (CHECKPOINTS, 1),
    "fused_head": (FUSED, 1),
    "gradient checkpointing, fused_head": (CHECKPOINTS | FUSED, 1),
    "LoRA": (LORA, 1),
    "LoRA, gradient checkpointing, fused_head": (LORA | CHECKPOINTS | FUSED, 1),
}
TABLES = {"head": HEAD, "ways": WAYS}
"""Arguments of CausalLM and number of micro-batches per step, by the name of the setting."""
SIZES = {
    "head": {"vocabulary": 128_000, "width": 512, "layers": 2, "batch": 1, "lengths": [512, 1024]},
    "ways": {"vocabulary": 8_000, "width": 256, "layers": 6, "batch": 8, "lengths": [256]},
}


def write_model(folder, given):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=given.vocabulary, hidden_size=given.width, intermediate_size=2 * given.width, attention_dropout=0.1,
        num_hidden_layers=given.layers, num_attention_heads=max(1, given.width // 64), tie_word_embeddings=True,
        max_position_embeddings=max(given.lengths), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def usual(module, batch):
    """The usual code: the batch twice, two cross-entropies, F.kl_div in both directions, all on the full logits."""
    inputs, target = module.rdrop_unpack(batch)
    logits = module.rdrop_predict({name: torch.cat([value, value]) for name, value in inputs.items()})
    p, q = (part.flatten(0, 1) for part in logits.float().chunk(2))
    target = target.flatten()
    ce = (F.cross_entropy(p, target) + F.cross_entropy(q, target)) / 2
    one = F.kl_div(F.log_softmax(p, -1), F.softmax(q, -1), reduction="sum")
    other = F.kl_div(F.log_softmax(q, -1), F.softmax(p, -1), reduction="sum")
    return ce + ALPHA * (one + other) / 4 / len(target)


def measure(folder, way, length, given):
    """Bytes that steps add, and the seconds of each step after the first two."""
    from lightning_rdrop.modules import CausalLM

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    settings, micro = TABLES[given.table][way]
    module = CausalLM(folder, rdrop_alpha=ALPHA, **settings).to(given.device)
    optimizer = torch.optim.AdamW([parameter for parameter in module.parameters() if parameter.requires_grad])
    tokens = torch.randint(3, given.vocabulary, (given.batch, length), device=given.device)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.chunk(micro)]
    autocast = torch.autocast(given.device, torch.bfloat16, enabled=given.device == "cuda")
    before, times = begin(given.device), []
    for _ in range(given.steps):
        start = time.perf_counter()
        for batch in batches:
            with autocast:
                loss = usual(module, batch) if way == "usual R-Drop" else module.rdrop_step(batch).loss
            (loss / micro).backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()
        if given.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return peak(given.device) - before, times[2:]


def begin(device):
    """Reset the peak memory; returns the memory in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux only
    return resident("VmRSS")


def peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(SIZES))
    for name in ("vocabulary", "width", "layers", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--lengths", type=int, nargs="+", help="of the texts, in tokens")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("."), help="for the CSV")
    given = parser.parse_args()
    for name, size in SIZES[given.table].items():
        setattr(given, name, getattr(given, name) or size)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    rows = []
    print("| length | way | peak memory, MiB | step, s | of plain |", "|---" * 5 + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, given)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for length in given.lengths:
                for way in TABLES[given.table]:
                    added, times = pool.apply(measure, (folder, way, length, given))
                    rows.append({"length": length, "way": way, "bytes": added, "seconds": statistics.median(times)})
                    plain = next(row["seconds"] for row in rows if row["length"] == length)
                    memory, seconds = added / 2**20, rows[-1]["seconds"]
                    print(f"| {length} | {way} | {memory:.0f} | {seconds:.3f} | {seconds / plain:.2f} |", flush=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    with open(given.folder / f"memory_{given.table}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
