"""Cost of the monitor: the time of a validation with it, relative to the same validation without:

    python examples/benchmarks/monitor.py

Medians over rounds in which all settings take turns. Counting forward passes, the ratio for K passes is K + 2: the K
passes, one with dropout off, and the validation's own. Prints a table.
"""

import random
import statistics
import sys
import time
import warnings

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_rdrop.callbacks import ConsistencyMonitor
from lightning_rdrop.modules import Classifier

WAYS = {
    "without": [],
    "without, again": [],
    "2 passes": [ConsistencyMonitor(passes=2)],
    "4 passes": [ConsistencyMonitor(passes=4)],
    "8 passes": [ConsistencyMonitor(passes=8)],
    "8 passes, a quarter of the batches": [ConsistencyMonitor(passes=8, batches=0.25)],
}


def encoder(layers=4, classes=15):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 2000}
    return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=layers, num_labels=classes))


def texts(batches=12, rows=32, length=48):
    for _ in range(batches):
        yield {"input_ids": torch.randint(2000, (rows, length)), "labels": torch.randint(15, (rows,))}


class Clock(pl.Callback):
    def on_validation_start(self, trainer, pl_module):
        self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.start


def seconds(module, batches, callbacks):
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[clock, *callbacks],
    )  # fmt: skip
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    return clock.seconds


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.manual_seed(0)
    module, batches = Classifier(encoder(), 15), list(texts())
    found = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way in random.sample(list(WAYS), len(WAYS)):
            taken = seconds(module, batches, WAYS[way])
            if turn:  # the first round warms up
                found[way].append(taken)
    plain = statistics.median(found["without"])
    print(f"{torch.get_num_threads()} threads\n\n| monitor | seconds | ratio |\n|---|---|---|")
    for way, each in found.items():
        print(f"| {way} | {statistics.median(each):.2f} | {statistics.median(each) / plain:.2f} |")
