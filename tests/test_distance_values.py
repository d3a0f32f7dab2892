"""What counts, what a target cannot hold, and what is no prediction of logits."""

from functools import partial

import pytest
import torch
from test_distance import target_of
from torch import distributions, inf
from torch.nn import functional as F

from lightning_rdrop import (
    Bernoulli,
    Categorical,
    Cosine,
    Distance,
    FromDistribution,
    Gaussian,
    JensenShannon,
    RDropLoss,
)

NAN = float("nan")
UNKNOWN = {
    "Bernoulli": (Bernoulli(ignore_value=-1), (5,), -1.0),
    "Bernoulli, NaN": (Bernoulli(ignore_value=NAN), (5,), NAN),
    "Bernoulli, weighted": (Bernoulli(ignore_value=-100, pos_weight=torch.rand(5)), (5,), -100.0),
    "Gaussian": (Gaussian(ignore_value=NAN), (5,), NAN),
    "Gaussian, a number": (Gaussian(ignore_value=-9.5), (), -9.5),
    "Gaussian with variance": (Gaussian(log_variance=True, ignore_value=NAN), (2,), NAN),
    "Cosine": (Cosine(ignore_value=NAN), (5,), NAN),
    "FromDistribution": (FromDistribution(lambda x: distributions.Poisson(x.exp()), ignore_value=NAN), (), NAN),
    "FromDistribution of events": (
        FromDistribution(lambda x: distributions.MultivariateNormal(x, torch.eye(3, dtype=x.dtype)), ignore_value=NAN),
        (3,),
        NAN,
    ),
    "Categorical": (Categorical(), (5,), -100),
    "JensenShannon": (JensenShannon(ignore_index=3), (5,), 3),
}


@pytest.mark.parametrize("junk", [0.7, inf, NAN])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("distance", "shape", "value"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_counts_in_neither_term(distance, shape, value, views, junk):
    predictions = torch.randn(views, 4, *shape, dtype=torch.float64)
    predictions[:1, 1], predictions[:, 3] = junk, junk
    predictions.requires_grad_()
    target = target_of(distance, predictions[0])
    target = target.clamp(max=2) if isinstance(distance, Categorical) else target
    target[[1, 3]] = value
    terms = RDropLoss(distance)(predictions, target, 3.0)
    known = predictions.detach()[:, [0, 2]].requires_grad_()
    expected = RDropLoss(distance)(known, target[[0, 2]], 3.0)
    (found,) = torch.autograd.grad(terms.loss, predictions)
    torch.testing.assert_close((terms.loss, terms.ce, terms.kl), (expected.loss, expected.ce, expected.kl))
    torch.testing.assert_close(found[:, [0, 2]], torch.autograd.grad(expected.loss, known)[0])
    assert not found[:, [1, 3]].any()
    assert terms.rows == expected.rows
    assert distance.counted(predictions[0], target).reshape(4, -1).all(1).tolist() == [True, False, True, False]
    if views > 1:
        alone = RDropLoss(distance).consistency(predictions, 3.0, target)
        torch.testing.assert_close(alone.kl, expected.kl)
        directed = [
            distance.directed(first, second, y).mean
            for (first, second), y in ((predictions[:2], target), (known[:2], target[[0, 2]]))
        ]
        torch.testing.assert_close(*directed)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-999, -999.9, -99999.0])
@pytest.mark.parametrize("kind", [Gaussian, Bernoulli, Cosine, partial(FromDistribution, distributions.Poisson)])
def test_what_is_not_known_stays_so_in_another_precision(kind, value, stored, trained):
    """As ``precision="bf16-true"`` casts the batch; -99999 overflows in float16."""
    distance, predictions = kind(ignore_value=value), torch.rand(2, 4, 3, dtype=trained)
    target = torch.randint(2, (4, 3)).to(stored)
    target[[1, 3]] = value
    target = target.to(trained)
    terms = RDropLoss(distance)(predictions, target, 3.0)
    expected = RDropLoss(kind())(predictions[:, [0, 2]], target[[0, 2]], 3.0)
    torch.testing.assert_close((terms.ce, terms.kl), (expected.ce, expected.kl))
    assert not distance.has_invalid(predictions[0], target)


def test_an_unknown_label_that_a_small_type_cannot_hold_is_invalid():
    """-1 stored as 255 is neither unknown nor a label."""
    prediction, target = torch.zeros(1, 3), torch.tensor([[0, 1, -1]]).to(torch.uint8)
    distance = Bernoulli(ignore_value=-1)
    assert distance.counted(prediction, target).all()
    assert distance.has_invalid(prediction, target)
    with pytest.raises(ValueError, match="The target contains 255"):
        distance.check(prediction, target)


def test_a_label_of_an_example_may_be_unknown():
    """Elements count, not rows: two of three labels here, and one of two numbers."""
    prediction, target = torch.tensor([[0.0, 3.0, 5.0]]), torch.tensor([[1.0, -1.0, 0.0]])
    average = Bernoulli(ignore_value=-1).to_target(prediction, target)
    expected = F.binary_cross_entropy_with_logits(prediction[:, [0, 2]], target[:, [0, 2]])
    torch.testing.assert_close(average.mean, expected)
    assert average.weight == 2
    assert Gaussian(ignore_value=NAN).to_target(torch.tensor([1.0, 2.0]), torch.tensor([NAN, 5.0])).mean == 9


@pytest.mark.parametrize("value", [0, 1, 0.5, False])
def test_a_probability_cannot_stand_for_an_unknown_label(value):
    with pytest.raises(ValueError, match=r"ignore_value must lie outside \[0, 1\].*got"):
        Bernoulli(ignore_value=value)


SCORES = torch.tensor([[2.5, -1.0, 0.3], [0.2, 0.3, 0.5]])
MULTI_HOT = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
NOT_A_NUMBER = torch.tensor([[0.2, NAN, 0.3], [0.2, 0.3, 0.5]])
IMPOSSIBLE = {
    "a class too many": (
        Categorical(),
        torch.tensor([0, 3]),
        "contains the class 3, but.*3 classes, 0 to 2.*ignore_index=-100",
    ),
    "a negative class": (Categorical(ignore_index=0), torch.tensor([0, -100]), "class -100.*ignore_index=0"),
    "a class too many in uint8": (Categorical(), torch.tensor([0, 156], dtype=torch.uint8), "the class 156"),
    "multi-hot rows": (
        Categorical(),
        MULTI_HOT,
        r"\[1.0, 1.0, 0.0\], which are not probabilities.*got the sum 2\..*Bernoulli",
    ),
    "scores": (Categorical(), SCORES, "not probabilities: they must be >= 0"),
    "scores between views": (JensenShannon(), SCORES, "not probabilities: they must be >= 0"),
    "padding within a row": (
        Categorical(),
        torch.tensor([[-100.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        "sum -99.*all -100",
    ),
    "NaN among probabilities": (Categorical(), NOT_A_NUMBER, "not probabilities"),
    "-1 of Bernoulli": (Bernoulli(), torch.tensor([[0.0, -1.0, 1.0]]), r"contains -1.0; a label.*ignore_value=..."),
    "NaN of Bernoulli": (Bernoulli(), NOT_A_NUMBER, "The target contains nan; a label of Bernoulli"),
    "2 beside an unknown label": (Bernoulli(ignore_value=-1), torch.tensor([[-1.0, 2.0, 1.0]]), "target contains 2.0"),
    "NaN of Gaussian": (
        Gaussian(),
        NOT_A_NUMBER,
        r"The target contains nan; Gaussian takes finite.*ignore_value=float\('nan'\)",
    ),
    "infinity beside an unknown number": (
        Gaussian(ignore_value=NAN),
        torch.tensor([[NAN, inf, 1.0]]),
        "target contains inf",
    ),
    "NaN of Cosine": (Cosine(), NOT_A_NUMBER, "The target contains nan; Cosine takes vectors of finite numbers"),
    "a vector known in part": (Cosine(ignore_value=NAN), NOT_A_NUMBER, "The target contains nan; Cosine"),
    "a negative count": (
        FromDistribution(lambda x: distributions.Poisson(x.exp())),
        torch.tensor([[1.0, -2.0, 3.0]]),
        r"The target contains -2.0, outside the support of Poisson.*ignore_value",
    ),
    "no point of a simplex": (
        FromDistribution(lambda x: distributions.Dirichlet(x.exp(), validate_args=False)),
        torch.tensor([[0.5, 0.7, 0.1]]),
        r"The target contains \[0.5.*outside the support of Dirichlet",
    ),
}


@pytest.mark.parametrize(("distance", "target", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_target_that_cannot_be_is_named(distance, target, message):
    prediction = torch.zeros(len(target), 3, requires_grad=True)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        distance.check(prediction, target)
    flag = distance.has_invalid(prediction, target)
    assert flag.shape == ()
    assert flag.dtype == torch.bool
    assert flag


@pytest.mark.parametrize(
    ("distance", "target"),
    [
        (Categorical(), torch.tensor([0, 2, -100])),
        (Categorical(ignore_index=255), torch.tensor([0, 2, 255], dtype=torch.uint8)),
        (Categorical(), torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0], [-100.0, -100.0, -100.0]])),
        (Categorical(), torch.full((3, 3), 1 / 3).bfloat16()),
        (JensenShannon(ignore_index=1), torch.tensor([[0.1, 0.2, 0.7], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])),
        (Bernoulli(), torch.tensor([[0, 1, 1]])),
        (Bernoulli(), torch.tensor([[True, False, True]])),
        (Bernoulli(ignore_value=NAN), torch.tensor([[0.0, NAN, 0.3]])),
        (Gaussian(), torch.tensor([[-1.0, 1e9, 0.3]])),
        (Gaussian(ignore_value=NAN), torch.tensor([[NAN, NAN, 0.3]])),
        (Cosine(ignore_value=NAN), torch.tensor([[NAN, NAN, NAN], [0.0, 1.0, 2.0]])),
        (
            FromDistribution(lambda x: distributions.Poisson(x.exp()), ignore_value=-1),
            torch.tensor([[-1.0, -1, -1], [0, 1, 2]]),
        ),
        (FromDistribution(lambda x: distributions.StudentT(2.0, x)), torch.tensor([[-1.0, 0, 1]])),
    ],
)
def test_a_target_that_can_be_is_left_in_peace(distance, target):
    prediction = torch.ones(len(target), 3)
    distance.check(prediction, target)
    assert not distance.has_invalid(prediction, target)


def test_images_are_looked_at_along_their_classes():
    distance, prediction = Categorical(class_dim=1), torch.zeros(2, 3, 4, 5)
    soft = torch.rand(2, 3, 4, 5).softmax(1)
    assert not distance.has_invalid(prediction, soft)
    soft[1, :, 2, 3] = 0
    distance.check(prediction, soft)
    soft[1, 0, 2, 3] = 3
    with pytest.raises(ValueError, match=r"contains \[3.0, 0.0, 0.0\].*got the sum 3\."):
        distance.check(prediction, soft)


def test_a_distance_of_ones_own_takes_any_target():
    distance, prediction = Distance(), torch.zeros(2, 3)
    assert distance.counted(prediction, prediction) is None
    assert distance.has_invalid(prediction, prediction) is None
    assert distance.prediction_warning(prediction) is None
    assert distance.check(prediction, prediction) is None


def test_a_prediction_that_is_a_softmax_already_is_told_from_logits():
    logits = torch.randn(2, 4, 3)
    for distance in (Categorical(), JensenShannon()):
        name = type(distance).__name__
        assert f"already a softmax: its rows sum to 1. {name} takes logits" in distance.prediction_warning(
            logits.softmax(-1)
        )
        assert "already a softmax" in distance.prediction_warning(logits.bfloat16().softmax(-1))
        for right in (logits, logits.log_softmax(-1), torch.zeros(4, 3), logits.sigmoid(), logits.abs() / 5):
            assert distance.prediction_warning(right) is None
    images = Categorical(class_dim=1)
    assert images.prediction_warning(torch.randn(2, 3, 4).softmax(1))
    assert images.prediction_warning(torch.randn(2, 3, 4).softmax(2)) is None
    sums_to_one = torch.tensor([[2.0, -1.5, 0.5]])
    assert Categorical().prediction_warning(sums_to_one) is None


@pytest.mark.parametrize(
    "reach",
    [
        lambda rows: rows,
        lambda rows: rows.view(2, 4, 3)[1],
        lambda rows: rows.unflatten(0, (2, 4)).unbind(0)[0],
        lambda rows: torch.stack([rows, rows])[0].bfloat16(),
        lambda rows: rows.reshape(2, 4, 3)[0, :, 1:].squeeze().transpose(0, 1),
    ],
)
def test_a_prediction_that_comes_out_of_a_sigmoid_is_told_from_logits(reach):
    layer = torch.nn.Linear(5, 3)
    logits = layer(torch.randn(8, 5))
    assert "is the output of a sigmoid, but Bernoulli takes logits" in Bernoulli().prediction_warning(
        reach(logits.sigmoid())
    )
    for right in (logits, logits.sigmoid() * 5, logits.sigmoid().logit(), layer(logits.sigmoid()[:, [0, 1, 2, 0, 1]])):
        assert Bernoulli().prediction_warning(reach(right)) is None
    assert Bernoulli().prediction_warning(torch.rand(4, 3)) is None  # nothing tells where it comes from


@pytest.mark.parametrize("distance", [Bernoulli(ignore_value=-1), Cosine(ignore_value=NAN), Gaussian(ignore_value=NAN)])
def test_without_a_target_all_rows_count(distance):
    first, second = torch.randn(2, 6, 4)
    torch.testing.assert_close(distance.between(first, second).mean, type(distance)().between(first, second).mean)
    target = torch.rand(6, 4)
    assert type(distance)().between(first, second, target).weight == type(distance)().between(first, second).weight


def test_an_ignore_value_beside_the_labels():
    for value in (-1, -0.1, 1.5, 2):
        assert Bernoulli(ignore_value=value).ignore_value == value
    for value in (0, 0.5, 1):
        with pytest.raises(ValueError, match="outside"):
            Bernoulli(ignore_value=value)


class Unsupported(distributions.Normal):
    """Does not tell which values it has."""

    @property
    def support(self):
        raise NotImplementedError


def test_a_distribution_that_tells_no_support_takes_finite_numbers():
    distance = FromDistribution(lambda x: Unsupported(x, 1.0, validate_args=False))
    target = torch.tensor([0.0, NAN, inf, 2.0])
    assert distance.invalid_mask(torch.zeros(4), target).tolist() == [False, True, True, False]


def test_probabilities_that_sum_to_1_may_not_be_negative():
    with pytest.raises(ValueError, match=r"\[1\.5, -0\.5\], which are not probabilities"):
        Categorical().check(torch.randn(2, 2), torch.tensor([[0.5, 0.5], [1.5, -0.5]]))


def test_which_class_indices_are_impossible():
    target = torch.tensor([-100, -1, 0, 2, 3])
    assert Categorical().invalid_mask(torch.zeros(5, 3), target).tolist() == [False, True, False, False, True]


def test_logits_that_sum_to_1_are_no_softmax():
    assert Categorical().prediction_warning(torch.tensor([[1.5, -0.5], [0.5, 0.5]])) is None
    assert "already a softmax" in Categorical().prediction_warning(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


@pytest.mark.parametrize("distance", [Categorical(), Bernoulli(), Gaussian(), Cosine()])
def test_a_prediction_that_is_no_tensor(distance):
    prediction = {"scores": torch.randn(4, 3)}
    with pytest.raises(TypeError, match=rf"The prediction is a dict, but {type(distance).__name__} takes one"):
        distance.to_target(prediction, torch.zeros(4, 3))


def test_a_distance_is_its_two_measures():
    x = torch.zeros(2)
    for measure in (Distance().to_target, Distance().between):
        with pytest.raises(NotImplementedError):
            measure(x, x)
    with pytest.raises(KeyError, match="slots"):
        Gaussian().part("slots")
