"""The metrics against closed forms worked by hand, against torch.distributions and scipy, and across batches."""

import math
from itertools import combinations

import pytest
import torch
from torch import inf, nan, tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Normal, kl_divergence
from torchmetrics import MetricCollection

from lightning_rdrop import (
    Bernoulli,
    Categorical,
    Cosine,
    FromDistribution,
    Gaussian,
    JensenShannon,
    MaskedConsistency,
    RDropLoss,
    Together,
    Weighted,
    symmetric_kl,
)
from lightning_rdrop.divergence import dispersion
from lightning_rdrop.metrics import (
    AverageGap,
    DropoutDisagreement,
    DropoutKL,
    average_gap,
    dropout_disagreement,
    dropout_kl,
)


def log(*probabilities):
    return tensor(probabilities, dtype=torch.float64).log()


def logits(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, number=4, seed=1):
    return torch.randint(number, shape, generator=torch.Generator().manual_seed(seed))


def numbers(found):
    """The values of a metric, as floats to compare."""
    return {name: float(value) for name, value in found.items()} if isinstance(found, dict) else float(found)


def pairs(predictions):
    return list(combinations(predictions, 2))


PAIR = log([[0.5, 0.2, 0.3]], [[0.5, 0.3, 0.2]])


def test_cross_entropy_does_not_see_what_changes_among_the_other_classes():
    """Su's example: the same to cross-entropy, and a kl that has no part of the target."""
    found = dropout_kl(PAIR, tensor([0]))
    assert found["dropout_kl_target"] < 1e-32  # the square of a rounding error of the softmax
    assert dropout_kl(PAIR.float(), tensor([0]))["dropout_kl_target"] == 0
    assert float(found["dropout_kl_others"]) == pytest.approx(float(found["dropout_kl"]), rel=1e-15)
    assert float(found["dropout_kl"]) == pytest.approx(math.log(1.5) / 20, rel=1e-14)
    (one,), (other,) = PAIR
    assert one[0] == other[0]
    of_another = dropout_kl(PAIR, tensor([1]))  # half of what differs
    assert float(of_another["dropout_kl_target"]) == pytest.approx(math.log(1.5) / 40, rel=1e-14)


def test_two_classes_by_hand():
    """p = 1/2 and 3/4: (1/4) ln(3/2) of the one class, and (1/4) ln 2 of the other, a quarter of each."""
    found = dropout_kl(log([[0.5, 0.5]], [[0.75, 0.25]]), tensor([0]))
    assert float(found["dropout_kl_target"]) == pytest.approx(math.log(1.5) / 16, rel=1e-14)
    assert float(found["dropout_kl_others"]) == pytest.approx(math.log(2) / 16, rel=1e-14)
    assert float(found["dropout_kl"]) == pytest.approx(math.log(3) / 16, rel=1e-14)


def test_the_gap_of_two_classes_by_hand():
    """The average of 0.9 and 0.3 is 0.6, and the network with dropout off says 0.4."""
    passes, off = log([[0.9, 0.1]], [[0.3, 0.7]]), log([0.4, 0.6])
    assert numbers(average_gap(passes, off, tensor([0]))) == pytest.approx(
        {
            "average_gap": 0.6 * math.log(1.5) + 0.4 * math.log(2 / 3),
            "average_gain": 1.0,
            "model_average_accuracy": 1.0,
            "weight_average_accuracy": 0.0,
            "model_average_nll": -math.log(0.6),
            "weight_average_nll": -math.log(0.4),
        },
        rel=1e-14,
    )
    assert average_gap(passes, off, tensor([1]))["average_gain"] == -1


def test_the_gap_of_three_classes_by_hand():
    passes, off = log([[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]), log([0.25, 0.25, 0.5])
    gap = float(average_gap(passes, off)["average_gap"])  # of (3/8, 3/8, 1/4)
    assert gap == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-14)


def test_disagreement_by_hand():
    """Of four passes three say 0 and one says 1: three of six pairs differ."""
    passes = log([[0.6, 0.4]], [[0.7, 0.3]], [[0.2, 0.8]], [[0.9, 0.1]])
    assert dropout_disagreement(passes) == 0.5
    assert dropout_disagreement(passes[[0, 1, 3]]) == 0


@pytest.mark.parametrize("passes", [2, 3, 8])
def test_kl_is_that_of_the_training_loss(passes):
    """The same convention, so that val/dropout_kl and train/kl can be read side by side."""
    predictions, target = logits(passes, 6, 4), classes(6)
    target[2] = -100
    for distance in (Categorical(), Categorical(label_smoothing=0.1, weight=torch.rand(4))):
        kl = RDropLoss(distance)(predictions, target, alpha=4.0).kl
        assert float(dropout_kl(predictions, target, distance)["dropout_kl"]) == pytest.approx(float(kl), rel=1e-12)


def test_every_distance_counts_its_kl_as_in_training():
    target, labels = logits(5, seed=3), classes(5, 4, number=2).double()
    cases = [
        (Bernoulli(), logits(3, 5, 4), labels),
        (Gaussian(), logits(3, 5), target),
        (Gaussian(log_variance=True), logits(3, 5, 2), target),
        (Cosine(), logits(3, 5, 4), logits(5, 4, seed=2)),
        (FromDistribution(lambda p: torch.distributions.Poisson(p.exp())), logits(3, 5), target.exp().round()),
    ]
    for distance, predictions, target in cases:
        kl = RDropLoss(distance)(predictions, target, alpha=1.0).kl
        found = dropout_kl(predictions, target, distance)
        assert float(found["dropout_kl"]) == pytest.approx(float(kl), rel=1e-12)
        assert len(found) == (3 if isinstance(distance, Bernoulli) else 1)


MEASURED = [
    (Categorical(), logits(3, 6, 4), tensor([0, 1, -100, 2, 3, 1])),
    (JensenShannon(class_dim=1), logits(3, 6, 4), classes(6)),
    (Bernoulli(ignore_value=nan), logits(3, 6, 2), tensor([[0, 1], [1, nan], [1, 1], [nan, nan], [0, 0], [1, 0]])),
    (Gaussian(), logits(3, 6), logits(6, seed=2)),
    (Cosine(), logits(3, 6, 4), logits(6, 4, seed=2)),
]


def measured_by(distance, predictions, target):
    """What each metric says of some passes, of which the first stands for that with dropout off."""
    found = dropout_kl(predictions, target, distance)
    if distance.unwrapped.implements("log_probabilities"):
        found["dropout_disagreement"] = dropout_disagreement(predictions, target, distance)
    if distance.unwrapped.implements("model_average"):
        found |= average_gap(predictions, predictions[0], target, distance)
        assert target is None or set(AverageGap(distance).names) <= found.keys()
    return numbers(found)


@pytest.mark.parametrize(("distance", "predictions", "target"), MEASURED)
def test_a_row_counts_as_often_as_its_weight_says(distance, predictions, target):
    weight = tensor([2, 0, 1, 3, 1, 1])
    found = measured_by(Weighted(distance), predictions, (target, weight))
    expected = measured_by(distance, predictions.repeat_interleave(weight, 1), target.repeat_interleave(weight, 0))
    assert found == pytest.approx(expected)
    if not isinstance(distance, JensenShannon):  # which is measured by kl
        kl = RDropLoss(Weighted(distance))(predictions, (target, weight), alpha=1.0).kl
        assert found["dropout_kl"] == pytest.approx(float(kl))


@pytest.mark.parametrize(("distance", "predictions", "target"), MEASURED)
def test_a_mask_of_the_consistency_chooses_the_rows(distance, predictions, target):
    """What needs no class is of all rows in the mask, as training has it, and the rest of those that have one."""
    mask = tensor([1, 0, 1, 0, 1, 1]).bool()
    found = measured_by(MaskedConsistency(distance), predictions, (target, mask))
    expected = measured_by(distance, predictions[:, mask], target[mask])
    everywhere = {"dropout_kl", "dropout_disagreement", "average_gap"} & found.keys()
    expected |= {name: measured_by(distance, predictions[:, mask], None)[name] for name in everywhere}
    whole = (
        {name for name in found if name.endswith(distance.term_names[0])} if isinstance(distance, Gaussian) else set()
    )
    expected |= {name: measured_by(distance, predictions, target)[name] for name in whole}  # the task loss
    assert found == pytest.approx(expected)
    if not isinstance(distance, JensenShannon):
        kl = RDropLoss(MaskedConsistency(distance))(predictions, (target, mask), alpha=1.0).kl
        assert found["dropout_kl"] == pytest.approx(float(kl))


def test_jensen_shannon_is_measured_by_kl():
    """The metric has one meaning for all predictions of classes, whatever they were trained with."""
    predictions, target = logits(3, 5, 4), classes(5)
    assert dropout_kl(predictions, target, JensenShannon()) == dropout_kl(predictions, target)


def test_torch_distributions():
    predictions, off, target = logits(5, 6, 4), logits(6, 4, seed=2), classes(6)
    passes = [CategoricalDistribution(logits=each) for each in predictions]
    kl = [(kl_divergence(p, q) + kl_divergence(q, p)) / 4 for p, q in pairs(passes)]
    found = dropout_kl(predictions, target)
    assert float(found["dropout_kl"]) == pytest.approx(float(torch.stack(kl).mean()), rel=1e-12)
    terms = [(p.probs - q.probs) * (p.logits - q.logits) / 4 for p, q in pairs(passes)]
    own = torch.stack(terms).mean(0)[torch.arange(6), target].mean()
    assert float(found["dropout_kl_target"]) == pytest.approx(float(own), rel=1e-12)
    rest = found["dropout_kl_target"] + found["dropout_kl_others"]
    assert float(rest) == pytest.approx(float(found["dropout_kl"]), rel=1e-12)

    mixture = CategoricalDistribution(probs=torch.stack([each.probs for each in passes]).mean(0))
    gap = average_gap(predictions, off, target)
    weights = CategoricalDistribution(logits=off)
    assert float(gap["average_gap"]) == pytest.approx(float(kl_divergence(mixture, weights).mean()), rel=1e-12)
    for name, one in (("model_average", mixture), ("weight_average", weights)):
        assert float(gap[f"{name}_nll"]) == pytest.approx(-float(one.log_prob(target).mean()), rel=1e-12)
        right = (one.probs.argmax(-1) == target).double().mean()
        assert float(gap[f"{name}_accuracy"]) == pytest.approx(float(right))
    gain = gap["model_average_accuracy"] - gap["weight_average_accuracy"]
    assert float(gap["average_gain"]) == pytest.approx(float(gain))


def test_scipy():
    entropy = pytest.importorskip("scipy.stats").entropy
    predictions, off = logits(5, 6, 4), logits(6, 4, seed=2)
    p, q = predictions.softmax(-1).numpy(), off.softmax(-1).numpy()
    gap = float(average_gap(predictions, off)["average_gap"])
    assert gap == pytest.approx(entropy(p.mean(0), q, axis=-1).mean(), rel=1e-12)
    kl = [(entropy(p[j], p[k], axis=-1) + entropy(p[k], p[j], axis=-1)).mean() / 4 for j, k in pairs(range(5))]
    assert float(dropout_kl(predictions)["dropout_kl"]) == pytest.approx(sum(kl) / 10, rel=1e-12)


def test_labels_are_rows_of_two_classes():
    predictions, off, target = logits(5, 6, 4), logits(6, 4, seed=2), classes(6, 4, number=2)
    passes = [BernoulliDistribution(logits=each) for each in predictions]
    mixture = BernoulliDistribution(probs=predictions.sigmoid().mean(0))
    weights = BernoulliDistribution(logits=off)
    gap = average_gap(predictions, off, target, Bernoulli())
    assert float(gap["average_gap"]) == pytest.approx(float(kl_divergence(mixture, weights).mean()), rel=1e-12)
    for name, one in (("model_average", mixture), ("weight_average", weights)):
        assert float(gap[f"{name}_nll"]) == pytest.approx(-float(one.log_prob(target.double()).mean()), rel=1e-12)
        assert float(gap[f"{name}_accuracy"]) == pytest.approx(float(((one.probs > 0.5) == target).double().mean()))
    yes = [(p.probs - q.probs) * (p.probs.log() - q.probs.log()) / 4 for p, q in pairs(passes)]
    no = [(q.probs - p.probs) * ((1 - p.probs).log() - (1 - q.probs).log()) / 4 for p, q in pairs(passes)]
    own = torch.where(target == 1, torch.stack(yes).mean(0), torch.stack(no).mean(0)).mean()
    found = dropout_kl(predictions, target, Bernoulli())
    assert float(found["dropout_kl_target"]) == pytest.approx(float(own), rel=1e-10)
    differ = torch.stack([((p > 0) != (q > 0)).double() for p, q in pairs(predictions)]).mean()
    assert float(dropout_disagreement(predictions, target, Bernoulli())) == pytest.approx(float(differ))
    average = Bernoulli().model_average(predictions)
    torch.testing.assert_close(average.sigmoid(), mixture.probs, rtol=1e-12, atol=0)


def test_numbers():
    predictions, off, target = logits(5, 6), logits(6, seed=2), logits(6, seed=3)
    found = average_gap(predictions, off, target, Gaussian())
    average = predictions.mean(0)
    expected = {
        "average_gap": (average - off).square().mean(),
        "model_average_mse": (average - target).square().mean(),
        "weight_average_mse": (off - target).square().mean(),
    }
    assert numbers(found) == pytest.approx(numbers(expected))


def test_numbers_with_a_variance_have_the_moments_of_the_mixture():
    predictions, off = logits(5, 6, 2), logits(6, 2, seed=2)
    distance = Gaussian(log_variance=True)
    normals = [Normal(each[:, 0], (each[:, 1] / 2).exp()) for each in predictions]
    mean = torch.stack([one.mean for one in normals]).mean(0)
    second = torch.stack([one.variance + one.mean**2 for one in normals]).mean(0)
    mixture, weights = Normal(mean, (second - mean**2).sqrt()), Normal(off[:, 0], (off[:, 1] / 2).exp())
    found = average_gap(predictions, off, logits(6, seed=3), distance)
    assert float(found["average_gap"]) == pytest.approx(float(kl_divergence(mixture, weights).mean()), rel=1e-12)
    nll = -mixture.log_prob(logits(6, seed=3)).mean()
    assert float(found["model_average_nll"]) == pytest.approx(float(nll), rel=1e-12)


def test_a_sample_of_passes_makes_the_gap_larger_by_a_kth_of_the_kl():
    """As the docstring says: here the model average is the weight average, and all of the gap is noise."""
    predictions = 0.2 * logits(8, 20_000, 5)
    off = predictions.softmax(-1).mean((0, 1)).log().expand(20_000, 5)
    noise = average_gap(predictions, off)["average_gap"]
    assert float(noise) == pytest.approx(float(dropout_kl(predictions)["dropout_kl"]) / 8, rel=0.03)


def test_tokens_images_and_what_does_not_count():
    predictions, off, target = logits(3, 2, 5, 4), logits(2, 5, 4, seed=2), classes(2, 5)
    target[0, 3:] = target[1, 1:] = -100  # four tokens are left
    keep = target != -100
    images = Categorical(class_dim=1)
    predictions[:, ~keep], off[~keep] = nan, inf
    for metric in (
        lambda p, o, t, d: dropout_kl(p, t, d),
        lambda p, o, t, d: dropout_disagreement(p, t, d),
        average_gap,
    ):
        expected = pytest.approx(numbers(metric(predictions[:, keep], off[keep], target[keep], None)))
        assert numbers(metric(predictions, off, target, None)) == expected
        assert numbers(metric(predictions.movedim(-1, 2), off.movedim(-1, 1), target, images)) == expected


def test_labels_and_numbers_that_are_not_known():
    predictions, off, target = logits(3, 5, 4), logits(5, 4, seed=2), classes(5, 4, number=2).double()
    target[:, 1:3] = nan
    found = average_gap(predictions, off, target, Bernoulli(ignore_value=nan))
    expected = average_gap(predictions[..., ::3], off[..., ::3], target[..., ::3], Bernoulli())
    assert numbers(found) == pytest.approx(numbers(expected))
    found = dropout_kl(predictions, target, Gaussian(ignore_value=nan))
    assert numbers(found) == pytest.approx(numbers(dropout_kl(predictions[..., ::3], None, Gaussian())))


def test_a_target_of_probabilities_stands_for_its_most_probable_class():
    predictions, off = logits(3, 5, 4), logits(5, 4, seed=2)
    soft = logits(5, 4, seed=3).softmax(-1)
    assert dropout_kl(predictions, soft) == dropout_kl(predictions, soft.argmax(-1))
    assert average_gap(predictions, off, soft) == average_gap(predictions, off, soft.argmax(-1))


def test_equal_passes_are_exactly_nothing():
    predictions = logits(1, 6, 4).expand(7, 6, 4)
    assert all(value == 0 for value in dropout_kl(predictions, classes(6)).values())
    assert dropout_disagreement(predictions) == 0


def test_classes_that_are_masked():
    everywhere = log([[0.5, 0.5, 0.0]], [[0.75, 0.25, 0.0]])
    assert float(dropout_kl(everywhere, tensor([2]))["dropout_kl_target"]) == 0
    assert float(dropout_kl(everywhere)["dropout_kl"]) == pytest.approx(math.log(3) / 16)
    somewhere = dropout_kl(log([[0.5, 0.5, 0.0]], [[0.5, 0.25, 0.25]]), tensor([0]))
    assert somewhere["dropout_kl"] == somewhere["dropout_kl_others"] == inf
    assert somewhere["dropout_kl_target"] == 0


def test_dispersion_is_the_mean_over_pairs_and_keeps_its_digits():
    base, noise = logits(1, 6, 4), logits(5, 6, 4, seed=2)
    for scale in (1.0, 1e-3):
        views = base + scale * noise
        expected = torch.stack([symmetric_kl(*pair) for pair in pairs(views)]).mean(0)
        assert dispersion(views.log_softmax(-1)).sum(-1).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
        single = dispersion(views.float().log_softmax(-1)).sum(-1).tolist()
        assert single == pytest.approx(expected.tolist(), rel=1e-3)  # down to 1e-6, as the loss


METRICS = {
    "DropoutKL": (DropoutKL, lambda p, o, t: dropout_kl(p, t)),
    "DropoutDisagreement": (DropoutDisagreement, lambda p, o, t: dropout_disagreement(p, t)),
    "AverageGap": (AverageGap, average_gap),
}


@pytest.mark.parametrize("name", METRICS)
def test_batches_of_unequal_size_are_one_batch(name):
    kind, function = METRICS[name]
    predictions, off, target = logits(3, 10, 4), logits(10, 4, seed=2), classes(10)
    target[[0, 7, 8]] = -100
    metric = kind()
    for rows in (slice(0, 1), slice(1, 3), slice(3, 10)):  # none counts in the first
        given = {"predictions": predictions[:, rows], "target": target[rows]}
        metric.update(**given, **({"weight_average": off[rows]} if kind is AverageGap else {}))
    expected = numbers(function(predictions, off, target))
    assert numbers(metric.compute()) == pytest.approx(expected, rel=1e-12)


def test_a_collection_has_the_names_of_the_monitor():
    metrics = MetricCollection([DropoutKL(), AverageGap()], prefix="val/")
    metrics.update(predictions=logits(3, 5, 4), weight_average=logits(5, 4, seed=2), target=classes(5))
    assert {"val/dropout_kl", "val/dropout_kl_target", "val/average_gap", "val/average_gain"} <= set(metrics.compute())
    metrics.reset()
    assert metrics["AverageGap"].average_gap_weight == 0


def test_where_nothing_counts_there_is_no_number():
    metric = DropoutKL()
    metric.update(logits(2, 3, 4), tensor([-100, -100, -100]))
    assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize("kind", [DropoutKL, DropoutDisagreement, AverageGap])
def test_plot(kind):
    pytest.importorskip("matplotlib")
    metric = kind()
    given = {"predictions": logits(3, 5, 4), "target": classes(5)}
    metric.update(**given, **({"weight_average": logits(5, 4, seed=2)} if kind is AverageGap else {}))
    _, axes = metric.plot()
    assert len(axes.lines) >= 1
    value = metric.compute()
    _, axes = metric.plot([value, value, value])
    assert len(axes.lines[0].get_xdata()) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dropout_kl(logits(1, 3, 4)), ValueError, r"K >= 2 dropout passes .* \(1, 3, 4\)"),
        (lambda: dropout_disagreement([logits(3, 4)] * 2), TypeError, "predictions must be a tensor .* a list"),
        (lambda: average_gap(logits(2, 3, 4), logits(2, 3, 4)), ValueError, r"one pass, \(3, 4\), got \(2, 3, 4\)"),
        (lambda: dropout_kl(logits(2, 3, 4), classes(4)), ValueError, r"target of shape \(4,\)"),
        (lambda: DropoutKL("kl"), TypeError, "distance must be a Distance, .* got 'kl'"),
        (lambda: DropoutKL(Together({"one": Gaussian()})), TypeError, r"distance\.part\(name\)"),
        (lambda: DropoutDisagreement(Gaussian()), TypeError, r"needs a distance with classes, got Gaussian\(\)"),
        (lambda: AverageGap(Cosine()), TypeError, r"can average predictions, got Cosine\(\)"),
        (lambda: average_gap(logits(2, 3, 4), logits(3, 4), distance=Cosine()), TypeError, "implement model_average"),
        (lambda: dropout_disagreement(logits(2, 3), None, Gaussian()), TypeError, "implement log_probabilities"),
    ],
)
def test_what_cannot_be_measured_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
