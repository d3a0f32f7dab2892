import pytest
import torch
from torch.nn import functional as F

from lightning_rdrop import Categorical, symmetric_kl


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_to_target_is_torchs_cross_entropy(smoothing, weighted, class_dim):
    logits = torch.randn(4, 6, 5, dtype=torch.float64)  # (N, T, C)
    target = torch.randint(5, (4, 6))
    target[0, 3:] = -100
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64) if weighted else None
    distance = Categorical(class_dim=class_dim, label_smoothing=smoothing, weight=weight)
    prediction = logits if class_dim == -1 else logits.movedim(-1, 1)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(distance.to_target(prediction, target).mean, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_as_targets(weighted):
    logits, target = torch.randn(4, 5), torch.rand(4, 5).softmax(-1)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0]) if weighted else None
    average = Categorical(weight=weight).to_target(logits, target)
    torch.testing.assert_close(average.mean, F.cross_entropy(logits, target, weight=weight))
    assert average.weight == 4


def test_between_is_the_symmetric_kl_of_the_rows_that_count():
    first, second = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    target = torch.randint(5, (4, 6))
    target[1, 2:] = -100
    rows = symmetric_kl(first, second)
    distance = Categorical()
    torch.testing.assert_close(distance.between(first, second).mean, rows.mean())
    counted = distance.between(first, second, target)
    torch.testing.assert_close(counted.mean, rows[target != -100].mean())
    assert counted.weight == 20
    torch.testing.assert_close(distance.between(second, first, target).total, counted.total)
    assert distance.between(first, first).total == 0
    images = Categorical(class_dim=1).between(first.movedim(-1, 1), second.movedim(-1, 1), target)
    torch.testing.assert_close(images.mean, counted.mean)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), "at least 2 classes.*has 1.*Bernoulli"),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), r"\(4, 3\).*target of shape \(5,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long), r"target of shape \(4, 1\)"),
        (torch.zeros(4, 3), torch.zeros(4), r"target of shape \(4,\), torch.float32"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long), r"target of shape \(4, 3\), torch.int64"),
    ],
)
def test_shapes_that_do_not_match_are_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        Categorical().to_target(prediction, target)


def test_label_smoothing_is_a_share():
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.0"):
        Categorical(label_smoothing=1.0)


def test_weights_stay_out_of_checkpoints():
    assert Categorical(weight=torch.ones(3)).state_dict() == {}
