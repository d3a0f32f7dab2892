"""The gap that R-Drop closes: the quickstart plain and with three values of alpha, three seeds each:

    python -m examples.gap

Dropout trains an average of many networks, but inference uses one network with averaged weights. Measured on the test
reviews, with the best weights on validation: how much 64 dropout passes differ, the gap between the two averages, and
the accuracy and calibration of each. Prints a table, and writes gap.csv and gap.png to examples/results/gap.
"""

import csv
from pathlib import Path
from statistics import mean, stdev

import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from lightning_rdrop import dropout_passes
from lightning_rdrop.cli import RDropCLI
from lightning_rdrop.divergence import log_probabilities
from lightning_rdrop.metrics import AverageGap, DropoutDisagreement, DropoutKL
from lightning_rdrop.plots import curves

VARIANTS = {
    "plain": "rdrop_views=1",
    "alpha 1": "rdrop_alpha=1",
    "alpha 4": "rdrop_alpha=4",
    "alpha 16": "rdrop_alpha=16",
}
SEEDS = range(1, 4)
PASSES = 64
RESULTS = Path("examples/results/gap")
QUIET = [
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--callbacks.curves=null", "--test_after_fit=false"),
]
COLUMNS = {
    "kl": ("dropout_kl", "{:.4f}"),
    "disagreement, %": ("dropout_disagreement", "{:.2%}"),
    "gap": ("average_gap", "{:.5f}"),
    "accuracy, one network, %": ("weight_average_accuracy", "{:.2%}"),
    "accuracy, average, %": ("model_average_accuracy", "{:.2%}"),
    "NLL, one network": ("weight_average_nll", "{:.4f}"),
    "NLL, average": ("model_average_nll", "{:.4f}"),
    "ECE, one network, %": ("weight_average_ece", "{:.2%}"),
    "ECE, average, %": ("model_average_ece", "{:.2%}"),
}


def train(variant, seed):
    """The trained module with its best weights, its data, and the path of its log."""
    logger = {"class_path": "CSVLogger", "init_args.save_dir": "logs/gap", "init_args.name": f"{variant}/{seed}"}
    arguments = [
        *("fit", "--config", "examples/quickstart.yaml", f"--seed_everything={seed}", *QUIET),
        *(f"--trainer.logger.{key}={value}" for key, value in logger.items()),
        *(f"--model.init_args.{VARIANTS[variant]}", "--callbacks.monitor.class_path=ConsistencyMonitor"),
    ]
    cli = RDropCLI(args=arguments, save_config_callback=None)
    best = torch.load(cli.trainer.checkpoint_callback.best_model_path, weights_only=True)
    cli.model.load_state_dict(best["state_dict"])
    return cli.model.eval(), cli.datamodule, Path(cli.trainer.logger.log_dir) / "metrics.csv"


@torch.no_grad()
def measure(module, data):
    data.setup("test")
    metrics = MetricCollection([DropoutKL(), DropoutDisagreement(), AverageGap()])
    calibration = {one: MulticlassCalibrationError(2) for one in ("weight_average_ece", "model_average_ece")}
    for batch in data.test_dataloader():
        inputs, target = module.rdrop_unpack(batch)
        passes, off = dropout_passes(module, inputs, PASSES), module.rdrop_predict(inputs)
        metrics.update(predictions=passes, weight_average=off, target=target)
        calibration["weight_average_ece"].update(log_probabilities(off).exp(), target)
        calibration["model_average_ece"].update(log_probabilities(passes).exp().mean(0), target)
    found = metrics.compute()
    found["dropout_disagreement"] = found.pop("DropoutDisagreement")
    return {name: value.item() for name, value in (found | {k: v.compute() for k, v in calibration.items()}).items()}


if __name__ == "__main__":
    rows, logs = [], {}
    for seed in SEEDS:
        for variant in VARIANTS:
            module, data, log = train(variant, seed)
            rows.append({"variant": variant, "seed": seed, **measure(module, data)})
            if seed == SEEDS[0]:
                logs[variant] = log

    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "gap.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    panels = {
        "kl": ["train/kl", "val/dropout_kl"],
        "gap between the averages": ["val/average_gap"],
        "disagreement of two passes": ["val/dropout_disagreement"],
        "validation accuracy": ["val/accuracy"],
    }
    curves(logs, panels).savefig(RESULTS / "gap.png", dpi=150)

    print(f"| {' | '.join(('', *COLUMNS))} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for variant in VARIANTS:
        cells = []
        for name, form in COLUMNS.values():
            values = [row[name] for row in rows if row["variant"] == variant]
            cells.append(f"{form.format(mean(values))} ({form.format(stdev(values))})".replace("%", ""))
        print(f"| {variant} | {' | '.join(cells)} |")
