"""R-Drop and the methods it is compared with, on five draws of 200 or 1000 labels: python -m examples.few_labels

Each method is run with a few values of one hyper-parameter. The value with the best mean validation accuracy is the one
whose test accuracy is reported.
"""

import json
import logging
import warnings
from statistics import mean, stdev
from time import perf_counter

from lightning_rdrop.cli import RDropCLI

SIZES, DRAWS = (200, 1000), range(1, 6)
BASE = ["--config", "examples/quickstart.yaml", "--config", "examples/few_labels.yaml"]
QUIET = [
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false",
    "--trainer.enable_checkpointing=false", "--callbacks.curves=null", "--test_after_fit=false",
]  # fmt: skip


def with_rdrop(alpha: float) -> list[str]:
    return [f"--model.init_args.rdrop_alpha={alpha}"]


def with_term(name: str, **arguments: float) -> list[str]:
    return [f"--model.init_args.rdrop_regularizers={json.dumps([{'class_path': name, 'init_args': arguments}])}"]


METHODS = {
    "none": ("plain", "", {None: []}),
    "R-Drop": ("quickstart", "alpha", {alpha: with_rdrop(alpha) for alpha in (1, 4, 16)}),
    "R-Drop, and the rest unlabelled": ("unlabeled", "alpha", {alpha: with_rdrop(alpha) for alpha in (1, 4, 16)}),
    "VAT": ("vat", "epsilon", {epsilon: with_term("VAT", epsilon=epsilon) for epsilon in (0.03, 0.1, 0.3)}),
    "FGM": ("fgm", "epsilon", {epsilon: with_term("FGM", epsilon=epsilon) for epsilon in (0.01, 0.03, 0.1)}),
    "gradient penalty": (
        "gradient_penalty", "weight",
        {weight: with_term("GradientPenalty", weight=weight) for weight in (0.001, 0.01, 0.1)},
    ),
}  # fmt: skip


def train(size: int, draw: int, config: str, arguments: list[str]) -> tuple[float, float, float]:
    """Validation and test accuracy in per cent, and seconds a step."""
    labels = [f"--data.init_args.train_size={size}", f"--data.init_args.draw={draw}", f"--seed_everything={draw}"]
    method = [] if config == "quickstart" else ["--config", f"examples/{config}.yaml"]
    cli = RDropCLI(args=[*BASE, *method, *QUIET, *labels, *arguments], run=False, save_config_callback=None)
    start = perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = perf_counter() - start
    validation = cli.trainer.callback_metrics["val/accuracy"].item()
    (tested,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return 100 * validation, 100 * tested["test/accuracy"], seconds / cli.trainer.global_step


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(
        "| labels | method | chosen | validation, % | test, % | sd | seconds a step |",
        "|---|---|---|---|---|---|---|",
        sep="\n",
    )
    for size in SIZES:
        for method, (config, name, values) in METHODS.items():
            runs = {value: [train(size, draw, config, given) for draw in DRAWS] for value, given in values.items()}
            chosen = max(runs, key=lambda value: mean(validation for validation, _, _ in runs[value]))
            validation, tested, seconds = zip(*runs[chosen], strict=True)
            cells = [f"{mean(validation):.1f}", f"{mean(tested):.1f}", f"{stdev(tested):.1f}", f"{mean(seconds):.4f}"]
            print("", size, method, f"{name} {chosen}" if name else "", *cells, "", sep=" | ", flush=True)
