import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml

from lightning_rdrop import RDropMixin
from lightning_rdrop.cli import RDropCLI, main

NETWORK = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import pytorch_lightning as pl

class Network(nn.Sequential):
    def __init__(self, p: float = 0.3):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 3))

class Data(pl.LightningDataModule):
    def __init__(self, rows: int = 32):
        super().__init__()
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
        self.rows = TensorDataset(x, x[:, :3].argmax(-1))
    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8)
    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""

CONFIG = {
    "model": {
        "class_path": "Classifier",
        "init_args": {"network": {"class_path": "mine.Network"}, "num_classes": 3, "rdrop_alpha": 2.0},
    },
    "data": {"class_path": "mine.Data"},
    "callbacks": {
        "alpha": {"class_path": "AlphaScheduler", "init_args": {"shape": "linear", "ramp": 4}},
        "best": {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/accuracy", "mode": "max"}},
        "curves": {"class_path": "Curves"},
    },
    "test_after_fit": True,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "run"}},
    },
}


@pytest.fixture
def folder(tmp_path):
    """A folder of a user's own, with a network and a configuration."""
    (tmp_path / "mine.py").write_text(NETWORK)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def run(folder, *arguments, command=None, fails=False):
    script = Path(sys.executable).with_name("lightning-rdrop")
    start = [str(script)] if script.exists() and command is None else [sys.executable, "-m", "lightning_rdrop"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200"}
    done = subprocess.run([*start, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def here(folder, monkeypatch):
    """That folder as the current one, and as that of the module ``mine``, which other tests have too."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sys.argv", ["lightning-rdrop"])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield folder
    sys.modules.pop("mine", None)


@pytest.fixture
def run_here(here, capsys):
    """Like ``run``, in this process, which has all imported already."""

    def run(*arguments):
        main([*arguments])
        said = capsys.readouterr()
        return said.out + said.err

    return run


def alphas(folder, version=0):
    with (folder / f"logs/run/version_{version}/metrics.csv").open() as file:
        return [float(row["train/alpha"]) for row in csv.DictReader(file) if row["train/alpha"]]


def test_fit_from_another_folder_trains_tests_and_draws(folder, run_here):
    printed = run(folder, "fit", "--config", "experiment.yaml")
    assert alphas(folder) == [0, 0.5, 1, 1.5, 2, 2, 2, 2]
    assert "test/accuracy" in printed
    assert (folder / "logs/run/version_0/curves.png").stat().st_size > 10_000

    # a callback is overridden by its name, in a second config and on the command line
    (folder / "later.yaml").write_text("callbacks: {alpha: {init_args: {delay: 2}}, curves: null}")
    override = "--callbacks.alpha.init_args.ramp=2"
    run(folder, "fit", "--config", "experiment.yaml", "--config", "later.yaml", override, command="module")
    assert alphas(folder, 1) == [0, 0, 0, 1, 2, 2, 2, 2]
    saved = yaml.safe_load((folder / "logs/run/version_1/config.yaml").read_text())["callbacks"]
    assert saved["best"]["init_args"]["monitor"] == "val/accuracy"  # what the second config does not name is kept
    assert not (folder / "logs/run/version_1/curves.png").exists()

    checkpoint = next((folder / "logs/run/version_0/checkpoints").glob("*.ckpt"))
    for subcommand in ("validate", "test", "predict"):
        printed = run_here(subcommand, "--config", "experiment.yaml", "--ckpt_path", str(checkpoint))
        assert subcommand == "predict" or "accuracy" in printed


def test_the_command_line_goes_before_a_checkpoint_and_that_before_a_config(here, caplog):
    fit = ["fit", "--config", "experiment.yaml", "--trainer.max_epochs=1", "--trainer.logger=false"]
    trained = RDropCLI(args=[*fit, "--model.rdrop_alpha=1", "--model.rdrop_views", "3"])
    given = ["--ckpt_path", trained.trainer.checkpoint_callback.best_model_path, "--callbacks.curves=null"]
    cli = RDropCLI(args=["predict", *fit[1:], *given, "--model.init_args.rdrop_views=2", "--model.mc_passes", "5"])
    assert (cli.model.mc_passes, cli.model.rdrop_views, cli.model.rdrop_alpha) == (5, 2, 1.0)
    assert "--model.rdrop_views=2 replaces the checkpoint's 3" in caplog.text


def test_a_model_of_ones_own_takes_the_command_line_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heads = ["--model.rdrop_distance.kind=Categorical", "--model.rdrop_distance.size=Gaussian"]
    quiet = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false", *heads]
    RDropCLI(TwoHeads, KindsAndSizes, args=["fit", *quiet, "--model.rdrop_alpha=1"])
    (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
    again = ["--ckpt_path", str(checkpoint), "--model.rdrop_alpha=3", "--trainer.max_epochs=2"]
    assert RDropCLI(TwoHeads, KindsAndSizes, args=["fit", *quiet, *again]).model.rdrop_alpha == 3.0


def test_plot_draws_runs_over_each_other(tmp_path, capsys, monkeypatch):
    for name, kl in (("plain", 0.0), ("rdrop", 0.1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,train/ce,train/kl\n0,1.0,{kl}\n1,0.5,{kl}\n")
    monkeypatch.chdir(tmp_path)
    main(["plot", "plain", "rdrop", "--output", "both.png"])
    assert "curves: both.png" in capsys.readouterr().out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    main(["plot", "."])
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: There is no metrics.csv of a CSVLogger in nowhere"),
        (["."], "error: .*nothing was logged as"),
        ([], "error: the following arguments are required: logdir"),
    ],
)
def test_plot_says_what_it_cannot_draw_in_a_line(tmp_path, capsys, monkeypatch, arguments, message):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["plot", *arguments])
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert len(printed.splitlines()) == 2  # usage, and what is wrong


def test_errors_reach_the_user(folder, run_here, capsys):
    dead = run(folder, "fit", "--config", "experiment.yaml", "--model.init_args.network.init_args.p=0", fails=True)
    assert "network.2" in dead
    with pytest.raises(SystemExit):
        run_here("fit", "--config", "experiment.yaml", "--model.init_args.rdrop_alhpa=1")
    assert "rdrop_alhpa" in capsys.readouterr().err


def test_a_checkpoint_that_is_missing_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    # a module of its own name, which no other test finds imported
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(CONFIG).replace("mine.", "failing."))
    (tmp_path / "failing.py").write_text(NETWORK.replace("super().__init__()", "raise RuntimeError('loaded')"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for subcommand in ("fit", "test"):
        with pytest.raises(SystemExit):
            RDropCLI(args=[subcommand, "--config", "experiment.yaml", "--ckpt_path", "none.ckpt"])
        assert f"ckpt_path: there is no 'none.ckpt' in {tmp_path}." in capsys.readouterr().err
    for path in ("best", "last", "s3://bucket/one.ckpt"):
        with pytest.raises(ValueError, match="loaded"):
            RDropCLI(args=["fit", "--config", "experiment.yaml", "--ckpt_path", path])


def test_a_pretrained_model_from_a_folder_with_nothing_but_the_command_line(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"好坏很不吃看"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf8")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    rows = [
        {"sentence": text, "label": label} for text, label in (("很好", 1), ("不好吃", 0), ("好看", 1), ("很坏", 0))
    ]
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    printed = run(
        tmp_path, "fit", "--model=SequenceClassifier", "--model.pretrained=bert", "--model.num_classes=2",
        "--data=TextDataModule", "--data.tokenizer=bert", "--data.train=train.json", "--data.val=train.json",
        "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=logs", "--trainer.logger.name=run", "--trainer.accelerator=cpu",
    )  # fmt: skip
    assert "bert was loaded in eval mode. Switched on for training: 8 dropout layers" in printed
    assert "network" not in (tmp_path / "logs/run/version_0/hparams.yaml").read_text()
    with (tmp_path / "logs/run/version_0/metrics.csv").open() as file:
        assert all(float(row["train/kl"]) > 0 for row in csv.DictReader(file) if row["train/kl"])


class OnlyTrains(RDropMixin, pl.LightningModule):
    def configure_optimizers(self):
        return pytest.fail("trained")


class OnlyTraining(pl.LightningDataModule):
    def train_dataloader(self):
        return pytest.fail("trained")


class WithTest(OnlyTraining):
    def test_dataloader(self):
        return torch.utils.data.DataLoader([0])


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (OnlyTrains, OnlyTraining, "no test_dataloader in OnlyTraining or OnlyTrains. Add one, or leave test_after"),
        (OnlyTrains, None, "no test_dataloader in OnlyTrains"),
        (OnlyTrains, WithTest, "no test_step in OnlyTrains"),
    ],
)
def test_a_test_that_cannot_be_made_is_found_before_training(model, data, message):
    with pytest.raises(ValueError, match=f"test_after_fit is true, but there is {message}"):
        RDropCLI(model, data, args=["fit", "--test_after_fit=true", "--trainer.accelerator=cpu"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "There is no test table. Pass test="),
        (["--data.test=tset.json"], FileNotFoundError, "tset.json"),
        (
            ["--data.test=other.json"],
            ValueError,
            r"other\.json: no column 'label', only 'sentence'\. Name .* label=\.\.\.",
        ),
    ],
)
def test_a_test_table_that_is_missing_is_found_before_training(tmp_path, monkeypatch, given, error, message):
    (tmp_path / "train.json").write_text('{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 1}')
    (tmp_path / "other.json").write_text('{"sentence": "a"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl.Trainer, "fit", lambda *arguments, **more: pytest.fail("trained"))
    model = ["--model=Classifier", "--model.network=torch.nn.Identity", "--model.num_classes=2"]
    data = ["--data=TextDataModule", "--data.tokenizer=none", "--data.train=train.json", *given]
    with pytest.raises(error, match=message):
        RDropCLI(args=["fit", "--test_after_fit=true", "--trainer.accelerator=cpu", *model, *data])


class TwoHeads(RDropMixin, pl.LightningModule):
    def __init__(self, width: int = 16, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.network = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Dropout(0.3))
        self.kind, self.size = torch.nn.Linear(width, 3), torch.nn.Linear(width, 1)

    def forward(self, x):
        hidden = self.network(x)
        return {"kind": self.kind(hidden), "size": self.size(hidden)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KindsAndSizes(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        rows = [(row, {"kind": row[:3].argmax(), "size": row[:1]}) for row in x]
        return torch.utils.data.DataLoader(rows, batch_size=4)


KIND = {"class_path": "Categorical", "init_args": {"label_smoothing": 0.1}}
BY_NAME = {"kind": KIND, "size": {"class_path": "Gaussian"}}


@pytest.mark.parametrize(
    ("distance", "arguments", "weights", "alphas"),
    [
        (BY_NAME, [], (1.0, 1.0), (1.0, 1.0)),
        (
            None,
            ["kind=Categorical", "kind.init_args.label_smoothing=0.1", "size=Gaussian"],
            (1.0, 1.0),
            (1.0, 1.0),
        ),
        (
            {
                "class_path": "Together",
                "init_args": {"distances": BY_NAME, "weights": {"size": 0.5}, "alphas": {"kind": 2.0}},
            },
            ["init_args.weights.size=0.25"],
            (1.0, 0.25),
            (2.0, 1.0),
        ),
    ],
    ids=["yaml", "command line", "weights"],
)
def test_several_distances_by_name(tmp_path, monkeypatch, distance, arguments, weights, alphas):
    monkeypatch.chdir(tmp_path)
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    model = {"rdrop_alpha": 2.0} | ({} if distance is None else {"rdrop_distance": distance})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
    arguments = [f"--model.rdrop_distance.{argument}" for argument in arguments]
    cli = RDropCLI(TwoHeads, KindsAndSizes, args=["fit", "--config=mine.yaml", *arguments])
    together = cli.model.rdrop_distance
    assert together.part("kind").label_smoothing == 0.1
    assert tuple(together.weights.values()) == weights
    assert tuple(together.alphas.values()) == alphas
    value = {name.removeprefix("train/"): float(one) for name, one in cli.trainer.callback_metrics.items()}
    assert value["ce"] == pytest.approx(weights[0] * value["kind_ce"] + weights[1] * value["size_mse"])
    assert value["kl"] == pytest.approx(
        weights[0] * alphas[0] * value["kind_kl"] + weights[1] * alphas[1] * value["size_kl"]
    )
    assert value["loss"] == pytest.approx(value["ce"] + 2.0 * value["kl"])

    (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
    loaded = TwoHeads.load_from_checkpoint(checkpoint).rdrop_distance
    assert loaded.part("kind").label_smoothing == 0.1
    assert loaded.weights == together.weights


@pytest.mark.parametrize("distance", ["Categorical", "Focal", "JensenShannon"])
def test_class_weights_on_the_command_line(folder, run_here, distance):
    given = ["--model.rdrop_distance", distance, "--model.rdrop_distance.weight", "[1.0,2.0,3.0]"]
    run_here("fit", "--config=experiment.yaml", "--callbacks.curves=null", "--test_after_fit=false", *given)
    (checkpoint,) = folder.glob("logs/run/version_0/checkpoints/*.ckpt")
    described = torch.load(checkpoint, weights_only=True)["rdrop"]["rdrop_distance"]
    assert described["class"].endswith(distance)
    assert described["init_args"]["weight"] == [1.0, 2.0, 3.0]


def test_a_second_run_in_the_same_folder(here):
    quiet = ["--trainer.logger=false", "--trainer.max_steps=1", "--test_after_fit=false", "--callbacks.curves=null"]
    (here / "config.yaml").write_text("# somebody's own")
    for _ in range(2):
        main(
            ["fit", "--config=experiment.yaml", *quiet, "--callbacks.best=null", "--trainer.enable_checkpointing=false"]
        )
    assert (here / "config.yaml").read_text() == "# somebody's own"
    for number in (1, 2):
        assert yaml.safe_load((here / f"config_{number}.yaml").read_text())["trainer"]["max_steps"] == 1


@pytest.mark.parametrize("monitored", [True, False])
def test_what_is_tested_is_the_best_by_a_metric_or_the_last(here, capsys, monitored):
    first = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3}}
    best = {"best": CONFIG["callbacks"]["best"]} if monitored else {}
    (here / "two.yaml").write_text(yaml.safe_dump(CONFIG | {"callbacks": {"first": first} | best}, sort_keys=False))
    trainer = RDropCLI(args=["fit", "--config=two.yaml"]).trainer
    chosen = trainer.checkpoint_callbacks[-1].best_model_path
    assert trainer.ckpt_path == (chosen if monitored else None)
    assert f"checkpoint: {chosen}\n" in capsys.readouterr().out


def test_a_quickstart_without_a_clone(here, capsys):
    pytest.importorskip("snownlp")
    main(["quickstart", "start"])
    assert capsys.readouterr().out.endswith("    cd start\n    lightning-rdrop fit --config quickstart.yaml\n")
    assert sorted(path.name for path in (here / "start").iterdir()) == ["fasttext.py", "quickstart.yaml", "reviews.py"]
    written = [(here / "start" / name).read_text() for name in ("fasttext.py", "quickstart.yaml", "reviews.py")]
    assert not any("examples" in text for text in written)
    config = yaml.safe_load(written[1])
    assert config["model"]["init_args"]["network"]["class_path"] == "fasttext.FastText"
    (here / "start/reviews.py").write_text("mine")
    with pytest.raises(SystemExit):
        main(["quickstart", "start"])
    assert "reviews.py already exists with other content" in capsys.readouterr().err
    assert (here / "start/reviews.py").read_text() == "mine"


def test_the_wheel_has_what_the_quickstart_writes():
    import tomllib

    from lightning_rdrop.quickstart import FILES

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"examples/{name}": f"lightning_rdrop/quickstart_files/{name}" for name in sorted(FILES)}


def test_windows_has_all_commands_but_compare(tmp_path):
    script = "import sys; sys.modules['fcntl'] = None; from lightning_rdrop.cli import main; main(['quickstart'])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "quickstart.yaml").exists()


def test_an_optimizer_before_the_classes_are_known(here, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model=SequenceClassifier", "--model.pretrained=none", "--optimizer=SGD"])
    said = "error: --optimizer is created before the data give num_classes. Pass --model.num_classes as well.\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_bar_of_80_columns(here, monkeypatch, capsys):
    monkeypatch.setattr("lightning_rdrop.lightning_cli.rdrop_cli.find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "80")
    bare = ["--trainer.logger=false", "--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=false"]
    main(["fit", "--config=experiment.yaml", *bare, "--callbacks.curves=null", "--test_after_fit=false"])
    last = [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if "accuracy=" in line][-1]
    assert all(f"{name}=" in last[:80] for name in ("alpha", "ce", "kl", "accuracy"))
