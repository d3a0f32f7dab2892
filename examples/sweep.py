"""Search for alpha with Optuna; each trial is a run of the command line:

    python -m examples.sweep --config examples/quickstart.yaml --trials 20 --trainer.max_epochs 3

All options except --trials and --metric go to `lightning-rdrop fit`. Prints the best alpha and its metric.
"""

import argparse

import optuna

from lightning_rdrop.cli import RDropCLI


def search(arguments, trials, metric, *, lowest=0.25, highest=16.0):
    """Maximize a validation metric over alpha; returns the study."""

    def run(trial):
        alpha = trial.suggest_float("alpha", lowest, highest, log=True)
        # a test after training would replace the validation metrics
        cli = RDropCLI(args=["fit", *arguments, f"--model.rdrop_alpha={alpha}", "--test_after_fit=false"])
        return float(cli.trainer.callback_metrics[metric])

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial({"alpha": 4.0})  # the default first
    study.optimize(run, trials)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--metric", default="val/accuracy", help="to maximize")
    given, arguments = parser.parse_known_args()
    study = search(arguments, given.trials, given.metric)
    print(f"alpha {study.best_params['alpha']:.3g}: {given.metric} {study.best_value:.4f}")
