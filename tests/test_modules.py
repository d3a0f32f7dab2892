"""The ready modules but the language models: each in a real Trainer, and each loss against a formula."""

import json
import math
import sys
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from conftest import texts, trained_on
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from scipy.stats import pearsonr, spearmanr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import Bernoulli, Categorical, Focal, FromDistribution, Gaussian, Together, Weighted
from lightning_rdrop.callbacks import DropoutProbability
from lightning_rdrop.data import TextDataModule
from lightning_rdrop.lightning_cli.prediction_table import PredictionTable
from lightning_rdrop.modules import (
    Classifier,
    MultilabelClassifier,
    Regressor,
    SequenceClassifier,
    SequenceMultilabelClassifier,
    SequenceRegressor,
    TokenClassifier,
)
from lightning_rdrop.modules._frozen import freeze_below
from lightning_rdrop.modules.task import Task


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


@pytest.fixture
def trainer():
    return partial(pl.Trainer, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)


def test_evaluation_by_hand(fit, rows):
    module = Classifier(network(), 3, learning_rate=0.05)
    module.val_dataloader = lambda: rows
    trainer = fit(module, rows, max_epochs=3)
    x, y = rows.dataset.tensors
    with torch.no_grad():
        logits = module.eval()(x)
    predicted = logits.argmax(-1)
    f1 = [2 * ((predicted == c) & (y == c)).sum() / ((predicted == c).sum() + (y == c).sum()) for c in range(3)]
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["val/ce"], F.cross_entropy(logits, y))
    torch.testing.assert_close(metrics["val/accuracy"], (predicted == y).float().mean())
    torch.testing.assert_close(metrics["val/f1"], torch.stack(f1).mean())
    tested = trainer.test(module, rows, verbose=False)[0]
    assert tested["test/accuracy"] == pytest.approx(metrics["val/accuracy"].item())
    assert tested["test/ce"] == pytest.approx(metrics["val/ce"].item())


TASKS = {
    "classes": (lambda: Classifier(network(), 3), lambda x: x.argmax(-1)),
    "labels": (lambda: MultilabelClassifier(network(), 3), lambda x: (x > 0).float()),
    "numbers": (lambda: Regressor(network()), lambda x: x + 3),
}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_computed_in_float32(trainer, task, precision, monkeypatch):
    make, target = TASKS[task]
    module, x = make(), torch.randn(256, 8)
    rows = DataLoader(TensorDataset(x, target(x[:, :3])), 8)
    expected = trainer().validate(module, rows, verbose=False)[0]
    seen, measure = [], module.measure

    def watched(metrics, batch, prediction, target):
        seen.extend([prediction.dtype, module.val_loss[module.rdrop_distance.term_names[0]].mean_value.dtype])
        measure(metrics, batch, prediction, target)

    monkeypatch.setattr(module, "measure", watched)
    found = trainer(precision=precision).validate(module, rows, verbose=False)[0]
    assert found == pytest.approx(expected, rel=0.02, abs=0.02)
    assert set(seen) == {torch.float32}


class Projected(Categorical):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def to_target(self, prediction, target):
        return super().to_target(self.layer(prediction), target)


def test_half_precision_is_that_of_the_layers_of_a_distance_too(trainer, rows):
    module = Task(network(), None, rdrop_distance=Projected())  # and of a task without metrics
    assert trainer(precision="bf16-true").validate(module, rows, verbose=False)[0]["val/ce"] > 0


def test_an_interrupted_evaluation_is_forgotten(trainer, rows):
    class Interrupt(pl.Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError

    module = Classifier(network(), 3)
    expected = trainer().validate(module, rows, verbose=False)
    other = DataLoader([(torch.ones(9, 8), torch.zeros(9).long())], batch_size=None)
    with pytest.raises(RuntimeError):
        trainer(callbacks=[Interrupt()]).validate(module, other, verbose=False)
    assert trainer().validate(module, rows, verbose=False) == expected


def test_each_of_several_loaders_has_its_metrics(trainer, rows):
    module, other = Classifier(network(), 3), DataLoader(rows.dataset, 5, sampler=range(12))
    for run in ("validate", "test"):
        found = getattr(trainer(), run)(module, [rows, other], verbose=False)
        for number, loader in enumerate((rows, other)):
            alone = getattr(trainer(), run)(module, loader, verbose=False)[0]
            assert found[number] == {f"{name}/dataloader_idx_{number}": value for name, value in alone.items()}
    assert [len(each) for each in trainer().predict(module, [rows, other])] == [8, 3]


@pytest.mark.parametrize("kind", ["pair", "tensor", "mapping"])
def test_prediction_gives_probabilities(kind):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x)

    x = torch.randn(5, 8)
    module = Classifier(Named(), 3).eval()
    batch = {"pair": (x, torch.zeros(5)), "tensor": x, "mapping": {"x": x}}[kind]
    torch.testing.assert_close(module.predict_step(batch, 0), module(x).softmax(-1))


def test_frozen_parameters_are_left_out_of_the_optimizer():
    module = Classifier(network(), 3, learning_rate=0.5, weight_decay=0.25)
    module.network[0].requires_grad_(False)
    optimizer = module.configure_optimizers()
    assert [group["params"] for group in optimizer.param_groups] == [list(module.network[3].parameters())]
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, 0.25)


@pytest.fixture
def pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_a_pretrained_model_trains_with_its_dropout_on(fit, pretrained, tmp_path):
    module = SequenceClassifier(pretrained, num_classes=3, learning_rate=1e-4)
    batch = {
        "input_ids": torch.arange(20).view(4, 5),
        "attention_mask": torch.ones(4, 5, dtype=torch.long),
        "labels": torch.tensor([0, 1, 2, 0]),
    }
    trainer = fit(module, DataLoader([batch] * 3, batch_size=None))
    assert trainer.callback_metrics["train/kl"] > 0
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    given = {"pretrained": pretrained, "num_classes": 3, "learning_rate": 1e-4}
    tuning = {"peft": None, "quantization": None, "gradient_checkpointing": False, "frozen_below": None}
    assert again.hparams == given | tuning | {"weight_decay": 0.01, "warmup": None, "mc_passes": 0}
    torch.testing.assert_close(again.state_dict(), module.state_dict())


def test_the_frozen_layers_of_a_pretrained_model_run_once(fit, pretrained):
    upper = "encoder.layer.1"
    module = SequenceClassifier(pretrained, 3, frozen_below=upper, rdrop_duplicate_at=upper, weight_decay=0.0)
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    rows = {0: [], 1: []}
    for number, seen in rows.items():
        layer = module.network.bert.encoder.layer[number]
        layer.register_forward_hook(lambda part, x, y, seen=seen: seen.append(len(y)))
    batch = {"input_ids": torch.arange(20).view(4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    # a probability for all of the network does not reach what is frozen, which stays in eval mode
    trainer = fit(module, DataLoader([batch] * 3, batch_size=None), callbacks=[DropoutProbability(0.3)])
    assert (rows[0][-1], rows[1][-1]) == (4, 8)
    assert trainer.callback_metrics["train/kl"] > 0
    changed = {name for name, value in module.network.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name in before if name.startswith(("bert.encoder.layer.1", "bert.pooler", "classifier"))}
    assert trained - changed <= {f"bert.{upper}.attention.self.key.bias"}  # whose gradient is 0
    assert changed <= trained


def test_an_adapter_and_frozen_layers_exclude_each_other(pretrained):
    pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"frozen_below='encoder\.layer\.1' freezes a part .* but peft freezes all of it"
    ):
        SequenceClassifier(pretrained, 3, frozen_below="encoder.layer.1", peft={"r": 2})


def written(folder, name, labels):
    text = "sentence,label\n" + "".join(
        f"{letter},{label}\n" for letter, label in zip("abcdefgh", labels, strict=False)
    )
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_data_tell_how_many_classes_there_are(fit, bert, tmp_path):
    data = TextDataModule(bert, written(tmp_path, "train.csv", "xyzxyz"), batch_size=2)
    module = SequenceClassifier(bert)
    assert module.network is None
    fit(module, data)
    assert (module.num_classes, module.classes) == (3, ["x", "y", "z"])
    assert module.network.classifier.out_features == 3
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (again.num_classes, again.classes) == (3, ["x", "y", "z"])
    torch.testing.assert_close(again.state_dict(), module.state_dict())
    with pytest.raises(ValueError, match=r"The model has the classes \(x, y, z\), but the data have \(a, b, c\)"):
        fit(again, TextDataModule(bert, written(tmp_path, "other.csv", "abcabc"), batch_size=2))


def test_a_number_of_classes_is_compared_with_the_data(fit, bert, tmp_path):
    data = TextDataModule(bert, written(tmp_path, "train.csv", "xyzxyz"))
    with pytest.raises(ValueError, match=r"num_classes is 2, but the data have 3 classes \(x, y, z\)"):
        fit(SequenceClassifier(bert, 2), data)
    with pytest.raises(ValueError, match=r"Classifier does not know the number of classes\. Pass num_classes="):
        fit(Classifier(network()), [(torch.randn(2, 8), torch.tensor([0, 1]))])


@pytest.mark.parametrize("kind", [SequenceClassifier, TokenClassifier, SequenceMultilabelClassifier, SequenceRegressor])
def test_pretrained_models_are_fine_tuned_slowly(bert, kind):
    module = kind(bert) if kind is SequenceRegressor else kind(bert, 2)
    assert module.configure_optimizers().defaults["lr"] == 2e-5


def test_a_missing_extra_names_itself(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs transformers: pip install "lightning-rdrop\[huggingface\]"'):
        SequenceClassifier(bert, 2)


class Rates(pl.Callback):
    seen = ()

    def on_train_batch_start(self, trainer, *_):
        self.seen = (*self.seen, trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("warmup", [2, 1 / 3])
def test_warmup_and_linear_decay(fit, rows, warmup):
    rates = Rates()
    fit(Classifier(network(), 3, learning_rate=0.4, warmup=warmup), rows, [rates], limit_train_batches=3, max_epochs=2)
    assert rates.seen == pytest.approx([0, 0.2, 0.4, 0.3, 0.2, 0.1])  # and 0 after the sixth step


def test_warmup_under_a_schedule_of_accumulation(fit, rows):
    rates = Rates()
    callbacks = [GradientAccumulationScheduler({0: 4, 1: 2}), rates]  # 1 + 2 steps
    fit(Classifier(network(), 3, learning_rate=0.3, warmup=1), rows, callbacks, limit_train_batches=4, max_epochs=2)
    assert rates.seen == pytest.approx([0] * 4 + [0.3] * 2 + [0.15] * 2)


def test_whole_warmups_are_steps():
    """A parser that has met ``float | int | None`` before makes 400.0 of 400 here: typing takes both for the same."""
    assert Classifier(network(), 3, warmup=400.0).warmup == 400


def test_wrong_warmups(fit, rows):
    with pytest.raises(
        ValueError, match=r"warmup must be an int >= 0, a number of optimizer steps, or a float in \[0, 1\]"
    ):
        Classifier(network(), 3, warmup=1.5)
    with pytest.raises(
        ValueError, match=r"warmup=0\.1 decays .* until the end of training, but its number of steps is"
    ):
        fit(Classifier(network(), 3, warmup=0.1), rows, max_epochs=-1)


def test_token_classifier(fit, bert):
    batch = texts(labels=False)
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    module = TokenClassifier(bert, num_classes=3, learning_rate=1e-2)
    metrics = trained_on(fit, module, batch, batch)
    assert metrics["train/kl"] > 0
    logits = module.eval().network(batch["input_ids"], batch["attention_mask"]).logits
    right = (logits.argmax(-1) == batch["labels"])[batch["labels"] != -100].float().mean()
    torch.testing.assert_close(metrics["val/accuracy"], right)
    torch.testing.assert_close(module.predict_step(batch, 0), logits.softmax(-1))


def test_sequence_regressor(fit, bert):
    batch = texts(labels=False) | {"labels": torch.tensor([0.0, 1.0, 2.0, 5.0])}
    module = SequenceRegressor(bert, learning_rate=1e-3)
    metrics = trained_on(fit, module, batch)
    assert metrics["train/mse"] > 0
    assert metrics["train/kl"] > 0
    prediction = module.eval().predict_step(batch, 0)
    assert prediction.shape == (4,)
    torch.testing.assert_close(metrics["val/mse"], F.mse_loss(prediction, batch["labels"]))


def test_sequence_multilabel_classifier(fit, bert, tmp_path):
    batch = texts(labels=False) | {"labels": torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]])}
    module = SequenceMultilabelClassifier(bert, num_labels=3, learning_rate=1e-3)
    metrics = trained_on(fit, module, batch)
    assert metrics["train/kl"] > 0
    probabilities = module.eval().predict_step(batch, 0)
    torch.testing.assert_close(metrics["val/bce"], F.binary_cross_entropy(probabilities, batch["labels"].float()))
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = SequenceMultilabelClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), module.state_dict())


def test_regressor_on_diabetes(fit):
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(column, dtype=torch.float32) for column in datasets.load_diabetes(return_X_y=True))
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1), nn.Flatten(0))
    module = Regressor(network, learning_rate=1e-2, rdrop_alpha=1.0)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    module.val_dataloader = lambda: loader
    metrics = fit(module, loader, max_epochs=5, num_sanity_val_steps=0).callback_metrics
    prediction = module.eval()(x).detach()
    torch.testing.assert_close(metrics["val/mse"], F.mse_loss(prediction, y))
    assert metrics["val/mse"] < 0.6
    assert metrics["val/pearson"].item() == pytest.approx(pearsonr(prediction, y).statistic, abs=1e-4)
    assert metrics["val/spearman"].item() == pytest.approx(spearmanr(prediction, y).statistic, abs=1e-4)


def test_regressor_with_a_predicted_variance(fit):
    x = torch.randn(64, 8)
    network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 2))
    module = Regressor(network, rdrop_distance=Gaussian(log_variance=True))
    loader = DataLoader(TensorDataset(x, x[:, 0]), batch_size=16)
    module.val_dataloader = lambda: loader
    metrics = fit(module, loader).callback_metrics
    assert {"train/nll", "train/kl", "val/nll", "val/mae"} <= set(metrics)
    torch.testing.assert_close(metrics["val/mae"], F.l1_loss(module.eval()(x)[:, 0], x[:, 0]))


def test_multilabel(fit):
    x = torch.randn(64, 8)
    y = (x[:, :4] > 0).float()
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    module = MultilabelClassifier(network, 4, learning_rate=1e-2)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    module.val_dataloader = lambda: loader
    metrics = fit(module, loader, max_epochs=10).callback_metrics
    probabilities = module.eval().predict_step(x, 0)
    torch.testing.assert_close(metrics["val/bce"], F.binary_cross_entropy(probabilities, y))
    torch.testing.assert_close(metrics["val/accuracy"], ((probabilities > 0.5) == y.bool()).float().mean())
    assert module.double().predict_step(x.double(), 0).dtype == torch.float64
    assert metrics["val/accuracy"] > 0.8
    assert metrics["train/kl"] > 0


class PackedLSTM(nn.Module):
    """Reads sentences of different lengths as a PackedSequence, which cannot be doubled."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, num_layers=2, dropout=0.3)
        self.head = nn.Linear(16, 3)

    def forward(self, packed):
        return self.head(self.lstm(packed)[1][0][-1])


def test_packed_sequences_under_separate_passes(fit):
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 8) for n in (5, 3, 2)])
    batch = (packed, torch.tensor([0, 1, 2]))
    loader = DataLoader([batch] * 3, batch_size=None)
    metrics = fit(Classifier(PackedLSTM(), 3, rdrop_passes="separate"), loader).callback_metrics
    assert metrics["train/kl"] > 0
    with pytest.raises(TypeError, match=r"a PackedSequence, cannot be duplicated.*rdrop_passes=\"separate\""):
        fit(Classifier(PackedLSTM(), 3), loader)


NAN = math.nan
SURE = torch.tensor([[0.0, 3.0, 1.0], [4.0, 0.0, 1.0], [0.0, 1.0, 5.0], [2.0, 0.0, 0.0]])
"""The classes 1, 0, 2 and 0."""


@pytest.mark.parametrize(
    ("distance", "prediction", "target"),
    [
        (Categorical(ignore_index=-1), SURE, torch.tensor([1, 0, -1, -1])),
        (Categorical(ignore_index=1), SURE, torch.tensor([1, 0, 2, 0])),
        (Weighted(Focal(ignore_index=-1)), SURE, (torch.tensor([1, 0, 2, -1]), torch.ones(4))),
        (Categorical(), SURE, torch.eye(3)[[1, 0, 2, 0]] * 0.8 + 0.2 / 3),
        (Categorical(class_dim=1), SURE[:3].T[None], torch.tensor([[1, 0, 2]])),
    ],
)
def test_what_a_distance_does_not_count_is_in_no_metric_of_classes(distance, prediction, target):
    """All that counts is right."""
    module = Classifier(nn.Dropout(0.3), 3, rdrop_distance=distance)
    module.measure(module.val_metrics, None, prediction, distance.unwrapped_target(target))
    assert module.val_metrics["accuracy"].compute() == 1
    expected = prediction.softmax(distance.unwrapped.class_dim)
    torch.testing.assert_close(module.eval().predict_step(prediction, 0), expected)


@pytest.mark.parametrize("mc_passes", [0, 2])
@pytest.mark.parametrize("distance", [Categorical(class_dim=1), Weighted(Categorical(class_dim=1))])
def test_a_table_has_the_classes_where_the_distance_has_them(fit, tmp_path, distance, mc_passes):
    """Three classes for each of three positions, so that the wrong dimension would be no error."""
    module = Classifier(nn.Dropout(0.0), 3, rdrop_distance=distance, mc_passes=mc_passes)
    table = PredictionTable(tmp_path / "found.jsonl", all_probabilities=True)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[table])
    trainer.predict(module, DataLoader(SURE[:3].T[None], 1))
    row = json.loads(table.path.read_text())
    probabilities = SURE[:3].softmax(-1)
    assert row["prediction"] == ["1", "0", "2"]
    assert row["probability"] == pytest.approx(probabilities.amax(-1).tolist())
    assert [list(one.values()) for one in row["probabilities"]] == pytest.approx(probabilities, abs=1e-6)


@pytest.mark.parametrize(
    ("distance", "target"),
    [
        (Bernoulli(ignore_value=-1), [1.0, -1.0, 0.0]),
        (Bernoulli(ignore_value=NAN), [1, NAN, 0]),
        (Bernoulli(), [0.9] * 3),
    ],
)
def test_labels_that_are_not_known_are_in_no_metric(distance, target):
    module = MultilabelClassifier(nn.Dropout(0.3), 3, rdrop_distance=distance)
    module.measure(module.val_metrics, None, torch.tensor([[2.0, 2.0, -2.0]]), torch.tensor([target]))
    right = 2 / 3 if target == [0.9] * 3 else 1.0  # a probable label is one
    assert module.val_metrics["accuracy"].compute() == pytest.approx(right)


@pytest.mark.parametrize("ignored", [-999.0, NAN])
def test_numbers_that_are_not_known_are_in_no_metric(ignored):
    module = Regressor(nn.Dropout(0.3), rdrop_distance=Gaussian(ignore_value=ignored))
    known, nothing = torch.tensor([1.5, 2.0, ignored]), torch.full((3,), ignored)
    for target in (known, nothing):
        module.measure(module.val_metrics, None, torch.tensor([1.0, 2.0, 3.0]), target)
    assert module.val_metrics["mae"].compute() == 0.25


def test_a_regressor_predicts_what_its_distribution_expects():
    poisson = FromDistribution(lambda prediction: torch.distributions.Poisson(prediction.exp()))
    module, rates = Regressor(nn.Dropout(0.3), rdrop_distance=poisson).eval(), torch.tensor([1.0, 5.0, 20.0])
    module.measure(module.val_metrics, None, rates.log(), rates)
    assert module.val_metrics["mae"].compute() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(module.predict_step(rates.log(), 0), rates)


def test_a_distance_out_of_a_checkpoint_names_the_loss(fit, rows, tmp_path):
    class Fixed(Classifier):
        def __init__(self, num_classes=3, **kwargs):
            super().__init__(network(), num_classes, **kwargs)

    fit(Fixed(rdrop_distance=Focal()), rows).save_checkpoint(tmp_path / "focal.ckpt")
    module = Fixed.load_from_checkpoint(tmp_path / "focal.ckpt")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    assert "val/focal" in trainer.validate(module, rows, verbose=False)[0]


def test_a_distance_that_a_subclass_assigns_names_and_weighs_the_losses(trainer, rows):
    class Assigned(Classifier):
        def __init__(self):
            super().__init__(network(), 3)
            self.rdrop_distance = Focal()

    assert "val/focal" in trainer().validate(Assigned(), rows, verbose=False)[0]
    parts = {"a": Categorical(), "b": Categorical()}
    module = Task(network(), None, rdrop_distance=Together(parts))
    module.rdrop_distance = Together(parts, weights={"b": 3.0})
    prediction, target = dict.fromkeys(parts, torch.zeros(2, 3)), dict.fromkeys(parts, torch.tensor([0, 1]))
    module.val_loss.add_batch(module.rdrop_distance, prediction, target)
    assert module.val_loss.compute()["val/ce"] == pytest.approx(4 * math.log(3))


def test_a_frozen_part_that_shares_its_config_leaves_the_dropout_above(pretrained):
    """Falcon's layers read their probabilities from one config in forward."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10, "num_labels": 2}
    model = transformers.FalconForSequenceClassification(
        transformers.FalconConfig(**size, hidden_dropout=0.1, attention_dropout=0.1, pad_token_id=0)
    ).train()
    freeze_below(model, "h.1")
    assert model.transformer.h[1].config.hidden_dropout == 0.1
    assert not model.transformer.h[0].training
