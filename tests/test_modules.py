import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop.modules import Classifier, SequenceClassifier


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


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
    assert again.hparams == {"pretrained": pretrained, "num_classes": 3, "learning_rate": 1e-4, "weight_decay": 0.01}
    torch.testing.assert_close(again.state_dict(), module.state_dict())
