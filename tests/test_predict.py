"""Monte Carlo dropout: the average of several passes, and a network that is left as it was."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import Net, Small
from torch import nn
from torch.distributions import Categorical as CategoricalDistribution

from lightning_rdrop import Bernoulli, Cosine, Gaussian, SimCSEMixin, dropout_passes, mc_predict
from lightning_rdrop.dropout import set_dropout_modes
from lightning_rdrop.modules import Classifier, MultilabelClassifier, Regressor
from lightning_rdrop.nesting import tensors_of


class Given(Net):
    """Predicts what it is given, one pass after the other."""

    def __init__(self, passes, **kwargs):
        super().__init__(nn.Identity(), rdrop_passes="separate", **kwargs)
        self.passes = iter(passes)

    def forward(self, x):
        return next(self.passes)


def logits(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_classes():
    passes = logits(5, 6, 4)
    found = mc_predict(Given(passes), None, passes=5)
    p = passes.softmax(-1)
    average = CategoricalDistribution(probs=p.mean(0))
    torch.testing.assert_close(found.mean, p.mean(0))
    torch.testing.assert_close(found.std, p.std(0))
    torch.testing.assert_close(found.entropy, average.entropy())
    each = torch.stack([CategoricalDistribution(logits=one).entropy() for one in passes])
    torch.testing.assert_close(found.mutual_information, average.entropy() - each.mean(0))
    torch.testing.assert_close(found.average.softmax(-1), p.mean(0))


def test_a_forward_that_changes_its_inputs_in_place():
    class InPlace(Small):
        def forward(self, x):
            return self.network(x.mul_(10))

    x = torch.ones(4, 8)
    assert not mc_predict(InPlace(p=0.0), x, passes=3).std.any()
    assert (x == 1).all()
    separate = InPlace(p=0.0, rdrop_passes="separate")
    assert not mc_predict(separate, x, passes=3).std.any()
    assert (x == 1).all()


def test_two_sure_models_that_contradict_each_other():
    """By hand: all of ln 2 is disagreement."""
    passes = torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]]])
    found = mc_predict(Given(passes), None, passes=2)
    assert found.mean.tolist() == [[0.5, 0.5]]
    assert found.entropy.item() == found.mutual_information.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert found.std.tolist() == [[pytest.approx(0.5**0.5), pytest.approx(0.5**0.5)]]


def test_labels_and_numbers():
    passes = logits(5, 6, 3)
    labels = mc_predict(Given(passes, rdrop_distance=Bernoulli()), None, passes=5)
    torch.testing.assert_close(labels.mean, passes.sigmoid().mean(0))
    p = passes.sigmoid().mean(0)
    torch.testing.assert_close(labels.entropy, -p * p.log() - (1 - p) * (1 - p).log())
    numbers = mc_predict(Given(passes, rdrop_distance=Gaussian()), None, passes=5)
    assert (numbers.entropy, numbers.mutual_information) == (None, None)
    torch.testing.assert_close(numbers.mean, passes.mean(0))
    torch.testing.assert_close(numbers.std, passes.std(0))


def test_several_predictions_by_name():
    passes = [{"one": each, "other": each[:, 0]} for each in logits(5, 6, 3)]
    found = mc_predict(Given(passes, rdrop_distance={"one": Bernoulli(), "other": Gaussian()}), None, passes=5)
    assert found["one"].mean.shape == (6, 3)
    assert found["other"].mean.shape == (6,)


class Random(nn.Module):
    """Draws from the generators of Python and numpy as well."""

    def forward(self, x):
        return x * (1 + random.random() + np.random.rand()) if self.training else x


def state(module):
    return {
        "modes": [part.training for part in module.modules()],
        "buffers": [buffer.clone() for buffer in module.buffers()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training):
    module = Net(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Random(), nn.Linear(8, 3)))
    module.train(training)
    before = state(module)
    predictions = dropout_passes(module, torch.randn(5, 8, generator=torch.Generator()), passes=4)
    after = state(module)
    assert not predictions.requires_grad
    assert not torch.equal(predictions[0], predictions[1])
    for (_, one), (_, other) in zip(tensors_of(before), tensors_of(after), strict=True):
        assert torch.equal(one, other)
    for name in ("modes", "python", "numpy"):
        assert before[name] == after[name]


def test_batch_norm_uses_its_running_statistics():
    norm = nn.BatchNorm1d(8)
    norm.running_mean.fill_(3.0)
    module = Net(nn.Sequential(norm, nn.Dropout(0.0)))
    x = torch.randn(5, 8)
    expected = module.eval()(x)
    assert all(torch.equal(each, expected) for each in dropout_passes(module.train(), x, passes=2))


def test_a_network_frozen_for_prediction_drops():
    module = Small()
    module.freeze()
    predictions = dropout_passes(module, torch.randn(5, 8), passes=2)
    assert not torch.equal(*predictions)


def test_a_part_that_was_not_trained_does_not_drop():
    module = Net(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Linear(8, 3)))
    module.network[0].requires_grad_(False)
    x = torch.randn(5, 8)
    assert torch.equal(*dropout_passes(module, x, passes=2))
    trained_in = dict.fromkeys(module.modules(), True)  # but its dropout was on in training
    assert not torch.equal(*dropout_passes(module, x, passes=2, training=trained_in))


def test_modes_of_training_without_batch_norm():
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Dropout(0.5))
    set_dropout_modes(network, {network[0]: True, network[1]: True, network[2]: False})
    assert [part.training for part in network] == [False, True, False]


@pytest.mark.parametrize("most", [40, 17, 5])
def test_as_many_passes_at_once_as_memory_allows(most):
    rows = []

    class Full(Small):
        def forward(self, x):
            if len(x) > most:
                raise torch.OutOfMemoryError
            rows.append(len(x))
            return super().forward(x)

    predictions = dropout_passes(Full(), torch.randn(5, 8), passes=7)
    assert predictions.shape == (7, 5, 3)
    assert len({tuple(each.flatten().tolist()) for each in predictions}) == 7
    assert rows == {40: [35], 17: [10, 10, 10, 5], 5: [5] * 7}[most]


def test_one_pass_that_is_too_large_is_an_error():
    class Full(Small):
        def forward(self, x):
            raise torch.OutOfMemoryError

    for passes in ("joint", "separate"):
        with pytest.raises(torch.OutOfMemoryError):
            dropout_passes(Full(rdrop_passes=passes), torch.randn(5, 8))


class Embeddings(SimCSEMixin, pl.LightningModule):
    pass


@pytest.mark.parametrize(
    ("module", "passes", "error", "message"),
    [
        (Small, 1, ValueError, "passes must be an int >= 2, got 1"),
        (lambda: Small(rdrop_distance=Cosine()), 2, TypeError, "Cosine has no expectation"),
        (Embeddings, 2, TypeError, "Embeddings learns embeddings by SimCSE"),
    ],
)
def test_what_cannot_be_averaged_is_said(module, passes, error, message):
    with pytest.raises(error, match=message):
        mc_predict(module(), torch.randn(5, 8), passes)


def network(outputs):
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(8, outputs), *([nn.Flatten(0)] if outputs == 1 else []))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **kwargs: Classifier(network(3), 3, **kwargs), (5, 3)),
        (lambda **kwargs: MultilabelClassifier(network(4), 4, **kwargs), (5, 4)),
        (lambda **kwargs: Regressor(network(1), **kwargs), (5,)),
    ],
    ids=["classes", "labels", "numbers"],
)
def test_the_ready_modules(make, shape):
    module, x = make(mc_passes=8).eval(), torch.randn(5, 8)
    torch.manual_seed(3)
    found = module.predict_step(x, 0)
    torch.manual_seed(3)
    torch.testing.assert_close(found.mean, mc_predict(module, x, 8).mean, rtol=0, atol=0)
    torch.manual_seed(3)
    torch.testing.assert_close(found.mean, module.predict_step([x], 0).mean)  # of a TensorDataset without targets
    assert found.mean.shape == found.std.shape == shape
    assert (found.std > 0).all()
    once = make().eval().predict_step(x, 0)
    assert isinstance(once, torch.Tensor)
    assert once.shape == shape


def test_by_a_trainer():
    module = Classifier(network(3), 3, mc_passes=8)
    loader = torch.utils.data.DataLoader(torch.randn(10, 8), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    found = pl.Trainer(accelerator="cpu", **quiet).predict(module, loader)
    assert [len(each.entropy) for each in found] == [4, 4, 2]


def test_passes_of_a_ready_module_are_checked(bart):
    from lightning_rdrop.modules import Seq2Seq

    for wrong in (1, -1, True, 2.0):
        with pytest.raises(ValueError, match="mc_passes must be an int >= 2, or 0"):
            Regressor(network(1), mc_passes=wrong)
    with pytest.raises(ValueError, match="Seq2Seq predicts texts"):
        Seq2Seq(bart, mc_passes=4)
