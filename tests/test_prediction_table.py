"""Predictions as a table: by name, beside their input, in its order."""

import csv
import json
import math
from datetime import date

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_rdrop.cli import main
from lightning_rdrop.data import (
    MultilabelTextDataModule,
    TextDataModule,
    TextRegressionDataModule,
    TextToTextDataModule,
    TokenDataModule,
)
from lightning_rdrop.lightning_cli.prediction_table import PredictionTable
from lightning_rdrop.modules import (
    CausalLM,
    Classifier,
    MultilabelClassifier,
    Regressor,
    SequenceClassifier,
    TokenClassifier,
)

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Letters(TextDataModule):
    """Texts as the numbers of their letters."""

    def encode(self, texts, pairs):
        return {"x": torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts])}


class Count(nn.Module):
    """The logit of a class is the number of its letter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


def write(path, rows):
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def read(path):
    with path.open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


def predict(module, data, path, **options):
    trainer = pl.Trainer(**QUIET, callbacks=[PredictionTable(path, **options)])
    trainer.predict(module, datamodule=data, return_predictions=False)


ROWS = [{"id": str(n), "sentence": text} for n, text in enumerate(["aab", "c", "bb, b", '"c"', "a"])]


def classifier():
    module = Classifier(Count(), 3)
    module.classes = ["A", "B", "C"]
    return module


def test_a_table_of_classes(tmp_path):
    data = Letters("none", predict=write(tmp_path / "in.csv", ROWS), batch_size=2)
    predict(classifier(), data, tmp_path / "new/out.csv")
    rows = read(tmp_path / "new/out.csv")
    assert [{column: row[column] for column in ("id", "sentence")} for row in rows] == ROWS
    assert [row["prediction"] for row in rows] == ["A", "C", "B", "C", "A"]
    e = torch.tensor(1.0).exp()
    assert float(rows[0]["probability"]) == pytest.approx(float(e**2 / (e**2 + e + 1)))
    assert set(rows[0]) == {"id", "sentence", "prediction", "probability"}
    assert not list(tmp_path.glob("**/.*"))  # nothing unfinished stays


@pytest.mark.parametrize("name", ["out.csv", "OUT.JSONL"])
def test_all_probabilities(tmp_path, name):
    data = Letters("none", predict=write(tmp_path / "in.csv", ROWS))
    predict(classifier(), data, tmp_path / name, all_probabilities=True)
    if name == "out.csv":
        found = {letter: float(read(tmp_path / name)[0][f"probability of {letter}"]) for letter in "ABC"}
    else:
        found = json.loads((tmp_path / name).read_text().splitlines()[0])["probabilities"]
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(0).tolist()
    assert found == pytest.approx(dict(zip("ABC", expected, strict=True)))


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_what_json_cannot_hold_is_no_hindrance(tmp_path, name):
    class Own(Letters):
        def rows(self, split):
            cells = {"on": date(2024, 1, 2), "days": [date(2024, 1, 3)], "price": math.nan, "prices": [0.5, -math.inf]}
            return [{"sentence": "a", "cut": "\ud83d"} | cells]  # half of an emoji, as in a text cut by UTF-16 units

    predict(classifier(), Own("none"), tmp_path / name)
    if name == "out.csv":
        (row,) = read(tmp_path / name)
        assert row["price"] == "nan"
        row |= {"days": json.loads(row["days"]), "prices": json.loads(row["prices"])}
    else:
        row = json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
        assert row["price"] is None
    assert (row["on"], row["days"], row["prices"]) == ("2024-01-02", ["2024-01-03"], [0.5, None])
    assert row["cut"] == ("\\ud83d" if name == "out.csv" else "\ud83d")
    assert row["prediction"] == "A"


def test_several_labels(tmp_path):
    class Several(MultilabelTextDataModule):
        encode = Letters.encode

    module = MultilabelClassifier(Count(), 3)
    module.classes = ["A", "B", "C"]
    predict(module, Several("none", predict=write(tmp_path / "in.csv", ROWS)), tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [["A", "B"], ["C"], ["B"], ["C"], ["A"]]
    assert rows[0]["probability"] == pytest.approx(torch.tensor([2.0, 1.0]).sigmoid().tolist())


class First(nn.Module):
    def forward(self, x):
        return x[:, 0]


class Pairs(nn.Module):
    def forward(self, x):
        return x[:, :2]


def test_numbers(tmp_path):
    from lightning_rdrop import Gaussian

    class Numbers(TextRegressionDataModule):
        encode = Letters.encode

    table = write(tmp_path / "in.csv", ROWS)
    predict(Regressor(First()), Numbers("none", predict=table), tmp_path / "out.csv")
    assert [float(row["prediction"]) for row in read(tmp_path / "out.csv")] == [2, 0, 0, 0, 1]
    module = Regressor(Pairs(), rdrop_distance=Gaussian(log_variance=True))
    predict(module, Numbers("none", predict=table), tmp_path / "out.csv")  # in the place of the other
    found = [(float(row["prediction"]), float(row["log_variance"])) for row in read(tmp_path / "out.csv")]
    assert found == [(2, 1), (0, 0), (0, 3), (0, 0), (1, 0)]


class Masked(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.network(x))


def test_a_model_average_says_how_far_its_passes_agree(tmp_path):
    from lightning_rdrop import Gaussian

    class Numbers(TextRegressionDataModule):
        encode = Letters.encode

    table = write(tmp_path / "in.csv", ROWS)
    module = Classifier(Masked(Count()), 3, mc_passes=8)
    predict(module, Letters("none", predict=table), tmp_path / "out.csv", all_probabilities=True)
    for row in read(tmp_path / "out.csv"):
        mean = torch.tensor([float(row[f"probability of {index}"]) for index in range(3)])
        assert row["prediction"] == str(int(mean.argmax()))
        assert float(row["entropy"]) == pytest.approx(float(torch.special.entr(mean).sum()), abs=1e-5)
        assert 0 < float(row["mutual_information"]) < float(row["entropy"])
    module = Regressor(Masked(Pairs()), rdrop_distance=Gaussian(log_variance=True), mc_passes=8)
    predict(module, Numbers("none", predict=table), tmp_path / "out.csv")
    rows = read(tmp_path / "out.csv")
    assert set(rows[0]) == {"id", "sentence", "prediction", "std"}
    assert float(rows[0]["std"]) > 0


def test_texts(tmp_path, bart):
    from lightning_rdrop.modules import Seq2Seq

    rows = [{"sentence": "a b"}, {"sentence": "c"}]
    data = TextToTextDataModule(bart, predict=write(tmp_path / "in.csv", rows))
    predict(Seq2Seq(bart, [], max_new_tokens=3), data, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["sentence"] for row in found] == ["a b", "c"]
    assert all(isinstance(row["prediction"], str) for row in found)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_class_for_each_word(tmp_path, bert, side):
    rows = [{"words": list("abc")}, {"words": ["d"]}, {"words": list("abcdefgh")}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = TokenDataModule(bert, predict=str(tmp_path / "in.jsonl"), text="words", label="tags", max_length=6)
    data.tokens._tokenizer.padding_side = side
    module = TokenClassifier(bert, 20)
    module.classes = [str(index) for index in range(20)]
    module.rdrop_predict = lambda inputs: nn.functional.one_hot(inputs["input_ids"], 20).float()  # its own token
    predict(module, data, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    letters = dict(zip("abcdefgh", map(str, range(4, 12)), strict=True))
    assert [row["prediction"] for row in found[:2]] == [[letters[word] for word in row["words"]] for row in rows[:2]]
    assert found[2]["prediction"] == [*(letters[word] for word in "abcdef"), None, None]  # beyond max_length
    assert len(found[2]["probability"]) == 8


def test_what_no_table_can_hold(tmp_path, gpt2):
    data = TextDataModule(gpt2, predict=write(tmp_path / "in.csv", ROWS))
    with pytest.raises(TypeError, match="CausalLM predicts the logits of all tokens, which a table cannot hold"):
        predict(CausalLM(gpt2), data, tmp_path / "out.csv")
    with pytest.raises(TypeError, match=r"Mine\.predict_step returned a dict, not one prediction for each example"):
        type("Mine", (Regressor,), {})(First()).readable({})
    assert not (tmp_path / "out.csv").exists()


def test_an_input_is_never_overwritten(tmp_path):
    table = write(tmp_path / "in.csv", ROWS)
    with pytest.raises(ValueError, match="is the input table"):
        predict(classifier(), Letters("none", predict=table), tmp_path / "in.csv")
    assert read(tmp_path / "in.csv") == ROWS
    write(tmp_path / "in.csv", [row | {"prediction": "x"} for row in ROWS])
    with pytest.raises(ValueError, match="The input has a column 'prediction'"):
        predict(classifier(), Letters("none", predict=table), tmp_path / "out.csv")


@pytest.mark.parametrize("column", ["entropy", "mutual_information", "std"])
def test_an_input_column_is_never_overwritten(tmp_path, column):
    table = write(tmp_path / "in.csv", [row | {column: "x"} for row in ROWS])
    module = classifier()
    predict(module, Letters("none", predict=table), tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0][column] == "x"
    module.mc_passes = 2
    with pytest.raises(ValueError, match=f"The input has a column '{column}'"):
        predict(module, Letters("none", predict=table), tmp_path / "out.csv")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.arange(6.0).view(3, 2))


@pytest.mark.parametrize("data", [torch.arange(6.0).view(3, 2), Stream()])
def test_a_module_and_data_of_one_s_own(tmp_path, data):
    class Mine(pl.LightningModule):
        def predict_step(self, batch, batch_idx):
            return batch.sum(-1)

    trainer = pl.Trainer(**QUIET, callbacks=[PredictionTable(tmp_path / "out.csv")])
    trainer.predict(Mine(), torch.utils.data.DataLoader(data, batch_size=2))
    assert [row["prediction"] for row in read(tmp_path / "out.csv")] == ["1.0", "5.0", "9.0"]


def shared(table, path):
    trainer = pl.Trainer(**QUIET, devices=2, strategy="ddp", callbacks=[PredictionTable(path)])
    trainer.predict(classifier(), datamodule=Letters("none", predict=table, batch_size=2), return_predictions=False)


def test_two_processes_write_one_table(pair, tmp_path):
    rows = [{"id": str(n), "sentence": "abc"[n % 3]} for n in range(7)]  # an odd number: one rank has a row more
    pair.run(shared, write(tmp_path / "in.csv", rows), tmp_path / "out.csv", seconds=120)
    found = read(tmp_path / "out.csv")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["prediction"].lower() for row in found] == [row["sentence"] for row in rows]


@pytest.fixture
def trained(tmp_path, monkeypatch, bert, capsys):
    """A checkpoint that the command made, in a folder that has no training table any more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-rdrop"])
    rows = [{"sentence": text, "label": label} for text, label in zip("abcdef", [10, 9, 10, 9, 10, 9], strict=True)]
    write(tmp_path / "train.csv", rows)
    main(
        [
            "fit", *MODEL, f"--model.pretrained={bert}", "--model.warmup=0.5", *DATA, f"--data.tokenizer={bert}",
            "--data.train=train.csv", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
            "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.enable_progress_bar=false",
            "--trainer.log_every_n_steps=1",
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    (checkpoint,) = tmp_path.glob("logs/**/*.ckpt")
    assert f"CSVLogger: {checkpoint.parents[1].relative_to(tmp_path)}" in printed
    assert "checkpoint: logs/" in printed
    (tmp_path / "train.csv").rename(tmp_path / "test.csv")
    return str(checkpoint), bert


MODEL, DATA = ["--model=SequenceClassifier"], ["--data=TextDataModule", "--data.batch_size=2"]
REST = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def test_without_a_training_table(trained, tmp_path, capsys, caplog):
    checkpoint, bert = trained
    assert torch.load(checkpoint, weights_only=True)["classes"] == ["9", "10"]
    main(["test", *MODEL, f"--model.pretrained={bert}", *DATA, f"--data.tokenizer={bert}", "--data.test=test.csv",
          *REST, f"--ckpt_path={checkpoint}"])  # fmt: skip
    assert "test/accuracy" in capsys.readouterr().out
    main(["predict", *MODEL, f"--model.pretrained={bert}", *DATA, f"--data.tokenizer={bert}",
          "--data.predict=test.csv", *REST, f"--ckpt_path={checkpoint}", "--predictions=out.csv"])  # fmt: skip
    assert {row["prediction"] for row in read(tmp_path / "out.csv")} <= {"9", "10"}
    assert [row["sentence"] for row in read(tmp_path / "out.csv")] == list("abcdef")
    assert not (tmp_path / "config.yaml").exists()
    assert "eval mode" not in caplog.text.rpartition("Restoring states")[2]


def test_a_checkpoint_of_another_number_of_classes(trained, capsys):
    checkpoint, bert = trained
    with pytest.raises(SystemExit):
        main(["test", *MODEL, f"--model.pretrained={bert}", "--model.num_classes=3", *DATA, f"--data.tokenizer={bert}",
              "--data.test=test.csv", *REST, f"--ckpt_path={checkpoint}"])  # fmt: skip
    assert "error: num_classes is 3, but the checkpoint was trained for 2 classes.\n" in capsys.readouterr().err
    trainer = pl.Trainer(**QUIET)
    data = TextDataModule(bert, test="test.csv")
    with pytest.raises(ValueError, match=r"num_classes is 3, but the checkpoint was trained for 2 classes \(9, 10\)"):
        trainer.test(SequenceClassifier(bert, 3), data, ckpt_path=checkpoint)
    with pytest.raises(ValueError, match=r"The model has the classes \(10, 9\), but .* trained for \(9, 10\)"):
        trainer.test(SequenceClassifier(bert, 2), TextDataModule(bert, test="test.csv", labels=["10", "9"]),
                     ckpt_path=checkpoint)  # fmt: skip


def test_a_loaded_module_tells_the_data_its_classes(trained):
    checkpoint, bert = trained
    module = SequenceClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert (module.classes, module.num_classes) == (["9", "10"], 2)
    data = TextDataModule(bert, test="test.csv")
    pl.Trainer(**QUIET).test(module, data, verbose=False)
    assert data.labels == ["9", "10"]


def test_without_a_checkpoint_the_model_is_untrained(trained, caplog):
    _, bert = trained
    caplog.set_level("INFO")
    main(["predict", *MODEL, f"--model.pretrained={bert}", "--model.num_classes=2", *DATA, f"--data.tokenizer={bert}",
          "--data.predict=test.csv", *REST, "--predictions=out.jsonl"])  # fmt: skip
    assert "predict without --ckpt_path: the model is untrained" in caplog.text
