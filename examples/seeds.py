"""The quickstart without R-Drop, with views but no KL, and with R-Drop, five seeds each: python -m examples.seeds"""

from statistics import mean, stdev
from time import perf_counter

from lightning_rdrop.cli import RDropCLI

VARIANTS = {
    "plain: rdrop_views 1": ["--model.init_args.rdrop_views=1"],
    "doubled rows, no kl: rdrop_alpha 0": ["--model.init_args.rdrop_alpha=0"],
    "R-Drop: rdrop_alpha 4": [],
}
SEEDS = range(1, 6)
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--callbacks.curves=null"]

if __name__ == "__main__":
    rows = []
    for variant, arguments in VARIANTS.items():
        accuracies, seconds = [], []
        for seed in SEEDS:
            start = perf_counter()
            config = ["--config", "examples/quickstart.yaml", f"--seed_everything={seed}"]
            cli = RDropCLI(args=["fit", *config, *QUIET, *arguments])
            accuracies.append(100 * cli.trainer.callback_metrics["test/accuracy"].item())
            seconds.append(perf_counter() - start)
        each = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        rows.append(f"| {variant} | {mean(accuracies):.2f} | {stdev(accuracies):.2f} | {each} | {mean(seconds):.0f} |")
    print("| variant | test accuracy, % | sd | each seed | seconds |", "|---|---|---|---|---|", *rows, sep="\n")
