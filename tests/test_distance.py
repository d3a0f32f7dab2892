import copy
import pickle
import re

import mpmath
import pytest
import torch
from torch import distributions, inf, nn
from torch.nn import functional as F

from lightning_rdrop import (
    Average,
    Bernoulli,
    Categorical,
    Cosine,
    Focal,
    FromDistribution,
    Gaussian,
    Head,
    JensenShannon,
    RDropLoss,
    Together,
    Weighted,
    jensen_shannon,
    rdrop_cross_entropy,
    symmetric_bernoulli_kl,
    symmetric_kl,
)
from lightning_rdrop.description import describe, rebuild


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


class Between:
    """A measure from elsewhere, to be mixed in."""

    def between(self, first, second, target=None):
        return Average.of((first - second).square().sum(-1))


class OwnBetween(Categorical):
    between = Between.between


class MixedIn(Between, Categorical):
    pass


class OwnDivergence(Categorical):
    def divergence(self, first, second):
        return (first - second).square().sum(-1)


class Inherited(OwnDivergence):
    pass


class OwnTarget(Categorical):
    def to_target(self, prediction, target):
        return Average.of(prediction.gather(-1, target.unsqueeze(-1)).square())


SQUARES = [OwnBetween, MixedIn, OwnDivergence, Inherited]


@pytest.mark.parametrize("distance", [*SQUARES, OwnTarget])
def test_a_subclass_that_measures_otherwise_does_not_inherit_the_fused_loss(distance):
    """Nor its gradient, which the general formula leaves to autograd."""
    views, target = numbers(4, 5), torch.arange(4)
    p, q = views
    ce = F.cross_entropy(views.flatten(0, 1), target.repeat(2))
    kl = symmetric_kl(p, q).mean() / 2
    if distance in SQUARES:
        kl = (p - q).square().sum(-1).mean() / 2
    else:
        ce = views[:, torch.arange(4), target].square().mean()
    terms = RDropLoss(distance())(views, target, 3.0)
    torch.testing.assert_close((terms.ce, terms.kl, terms.loss), (ce, kl, ce + 3.0 * kl))
    found, expected = (torch.autograd.grad(loss, views, retain_graph=True)[0] for loss in (terms.loss, ce + 3.0 * kl))
    torch.testing.assert_close(found, expected)


def test_a_subclass_may_bring_its_own_way_or_keep_the_inherited_one():
    class Checks(Categorical):
        def check(self, prediction, target):
            pass

    class Way(JensenShannon):
        def terms(self, predictions, target, alpha, head=None):
            return "its own"

    assert Checks.terms is Categorical.terms
    assert RDropLoss(Way())(torch.zeros(2, 4, 5), torch.arange(4), 1.0) == "its own"


def test_a_head_needs_a_distance_that_takes_one():
    head = Head(torch.randn(5, 3))
    for distance in (JensenShannon(), Gaussian(), OwnBetween()):
        with pytest.raises(TypeError, match=rf"A fused head needs .*Categorical.*got {type(distance).__name__}"):
            RDropLoss(distance)(torch.randn(2, 4, 3), torch.arange(4), 1.0, head)
    with pytest.raises(TypeError, match=r"A fused head needs .*class_dim=-1.*got class_dim=1"):
        RDropLoss(Categorical(class_dim=1))(torch.randn(2, 4, 3), torch.arange(4), 1.0, head)
    with pytest.raises(ValueError, match="A fused head takes class indices"):
        RDropLoss()(torch.randn(2, 4, 3), torch.rand(4, 5), 1.0, head)


def test_label_smoothing_is_a_share():
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.0"):
        Categorical(label_smoothing=1.0)


def test_weights_stay_out_of_checkpoints():
    assert Categorical(weight=torch.ones(3)).state_dict() == {}


def numbers(*shape):
    return torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)


def bernoulli_kl(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_bernoulli_by_hand():
    first, second = numbers(6, 3)
    target = torch.randint(2, (6, 3))
    p, q = first.sigmoid(), second.sigmoid()
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    bce = -(weight * target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(Bernoulli(pos_weight=weight).to_target(first, target).mean, bce.mean())
    kl = (bernoulli_kl(p, q) + bernoulli_kl(q, p)) / 2
    torch.testing.assert_close(Bernoulli().between(first, second).mean, kl.mean())


@pytest.mark.parametrize("gap", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("where", [0.0, 15.0, -15.0])
def test_bernoulli_keeps_its_digits_in_float32(gap, where):
    first, second = torch.tensor([where], requires_grad=True), torch.tensor([where + gap])
    with mpmath.workdps(60):
        (z,), (w,) = first.tolist(), second.tolist()
        sigmoid = [1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in (z, w)]
        exact = float((sigmoid[0] - sigmoid[1]) * (z - w) / 2)
    divergence = symmetric_bernoulli_kl(first, second)
    assert divergence.item() == pytest.approx(exact, rel=1e-3)
    assert torch.autograd.grad(divergence, first)[0].isfinite().all()


def test_bernoulli_with_infinite_logits():
    logits = torch.tensor([inf, -inf, 1.0], requires_grad=True)
    divergence = symmetric_bernoulli_kl(logits, logits.detach())
    assert (divergence == 0).all()
    assert (torch.autograd.grad(divergence.sum(), logits)[0] == 0).all()


def test_squared_error_by_hand():
    first, second = numbers(6)
    target = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(Gaussian().to_target(first, target).mean, F.mse_loss(first, target))
    terms = RDropLoss(Gaussian())(torch.stack([first, second]), target, 4.0)
    torch.testing.assert_close(terms.ce, (F.mse_loss(first, target) + F.mse_loss(second, target)) / 2)
    torch.testing.assert_close(terms.kl, (first - second).square().mean() / 2)


def test_normal_with_predicted_variance_against_torch_distributions():
    first, second = numbers(6, 2)
    target = torch.randn(6, dtype=torch.float64)
    p, q = (distributions.Normal(view[:, 0], (view[:, 1] / 2).exp()) for view in (first, second))
    distance = Gaussian(log_variance=True)
    torch.testing.assert_close(distance.to_target(first, target).mean, -p.log_prob(target).mean())
    kl = (distributions.kl_divergence(p, q) + distributions.kl_divergence(q, p)) / 2
    torch.testing.assert_close(distance.between(first, second).mean, kl.mean())
    assert distance.term_names == ("nll", "kl")


def test_cosine_by_hand():
    first, second = numbers(6, 4)
    cosine = F.cosine_similarity(first, second)
    torch.testing.assert_close(Cosine().between(first, second).mean, (1 - cosine).mean())
    torch.testing.assert_close(Cosine().to_target(first, second).mean, (1 - cosine).mean())


def test_jensen_shannon_by_hand():
    first, second = numbers(6, 4)
    p, q = first.softmax(-1), second.softmax(-1)
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(jensen_shannon(first, second), js)
    torch.testing.assert_close(jensen_shannon(first.mT, second.mT, dim=0), js)
    target = torch.tensor([0, 1, -100, 2, -100, 3])
    torch.testing.assert_close(JensenShannon().between(first, second, target).mean, js[target >= 0].mean())
    assert JensenShannon(class_dim=-1).to_target(first, target).mean == Categorical().to_target(first, target).mean


@pytest.mark.parametrize("gap", [1e-2, 30.0, 1e4])
def test_jensen_shannon_in_float32(gap):
    first = torch.tensor([[1.0, 0.0, -inf, -inf]], requires_grad=True)
    second = torch.tensor([[1.0 + gap, 0.0, 0.5, -inf]])
    exact = jensen_shannon(first.detach().double(), second.double())
    divergence = jensen_shannon(first, second)
    torch.testing.assert_close(divergence.double(), exact, rtol=1e-5, atol=1e-7)
    assert torch.autograd.grad(divergence.sum(), first)[0].isfinite().all()


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda x: distributions.Categorical(logits=x), 5),
        (lambda x: distributions.Poisson(x.exp()[:, 0]), 1),
        (lambda x: distributions.Beta(x.exp()[:, 0], x.exp()[:, 1]), 2),
        (lambda x: distributions.MultivariateNormal(x, torch.eye(3, dtype=x.dtype)), 3),
    ],
    ids=["Categorical", "Poisson", "Beta", "MultivariateNormal"],
)
def test_any_distribution_of_torch(make, size):
    first, second = numbers(6, size)
    p, q = make(first), make(second)
    target = p.sample()
    distance = FromDistribution(make)
    torch.testing.assert_close(distance.to_target(first, target).mean, -p.log_prob(target).mean())
    kl = (distributions.kl_divergence(p, q) + distributions.kl_divergence(q, p)) / 2
    torch.testing.assert_close(distance.between(first, second).mean, kl.mean())


def test_from_distribution_refuses():
    with pytest.raises(TypeError, match=r"make must return a torch\.distributions\.Distribution, got tensor"):
        FromDistribution(lambda x: x).to_target(torch.zeros(3), torch.zeros(3))
    with pytest.raises(TypeError, match="no KL divergence between two StudentT: register one"):
        FromDistribution(distributions.StudentT).between(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(3, 1\); nothing broadcasts"):
        FromDistribution(distributions.Poisson).to_target(torch.ones(3), torch.ones(3, 1))


EVERY = {
    "Categorical": (Categorical(), (5,)),
    "JensenShannon": (JensenShannon(), (5,)),
    "Bernoulli": (Bernoulli(), (5,)),
    "Gaussian": (Gaussian(), ()),
    "Gaussian with variance": (Gaussian(log_variance=True), (2,)),
    "Cosine": (Cosine(), (5,)),
    "FromDistribution": (FromDistribution(lambda x: distributions.Categorical(logits=x)), (5,)),
}


@pytest.mark.parametrize(("distance", "shape"), EVERY.values(), ids=EVERY)
def test_every_distance_is_symmetric_zero_at_home_and_differentiable(distance, shape):
    first, second = numbers(4, *shape)
    between = distance.between(first, second)
    torch.testing.assert_close(between.mean, distance.between(second, first).mean, rtol=1e-12, atol=0)
    assert between.mean > 0
    for dtype in (torch.float64, torch.float32):
        assert distance.between(first.to(dtype), first.to(dtype).clone()).total == 0
    assert torch.autograd.gradcheck(lambda p, q: distance.between(p, q).mean, (first, second))


def target_of(distance, prediction):
    """One that the distance takes."""
    if isinstance(distance, Categorical):
        return torch.arange(len(prediction)) % prediction.shape[-1]
    if isinstance(distance, FromDistribution):
        made = distance.make(torch.zeros_like(prediction))
        return torch.zeros(made.batch_shape + made.event_shape)
    return torch.rand(prediction.shape[:1] if prediction.shape[-1] == 2 else prediction.shape)


class WithoutSevens:
    def counted(self, prediction, target):
        known, counted = super().counted(prediction, target), target != 7
        counted = counted.all(-1) if isinstance(self, Cosine) else counted
        return counted if known is None else known & counted


@pytest.mark.parametrize(("distance", "shape"), [*EVERY.values(), (Focal(), (5,))], ids=[*EVERY, "Focal"])
def test_a_subclass_says_which_rows_count_in_both_terms(distance, shape):
    """A row that does not may hold any target."""
    predictions, known = numbers(4, *shape), torch.tensor([0, 1, 3])
    target = target_of(distance, predictions[0])
    expected = RDropLoss(distance)(predictions[:, known], target[known], 3.0)
    target[2] = 7
    own = copy.copy(distance)
    own.__class__ = type("Own", (WithoutSevens, type(distance)), {})
    own.check(predictions[0], target)
    assert not own.has_invalid(predictions[0], target)
    for one, given in ((own, target), (Weighted(own), (target, torch.ones(4)))):
        terms = RDropLoss(one)(predictions, given, 3.0)
        torch.testing.assert_close((terms.ce, terms.kl, terms.rows), (expected.ce, expected.kl, expected.rows))
    for measure in (own.between, own.directed):
        assert measure(*predictions, target).weight == expected.rows


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("distance", "shape"), EVERY.values(), ids=EVERY)
def test_every_term_of_every_distance_has_its_gradient(distance, shape, views):
    predictions = torch.randn(views, 4, *shape, dtype=torch.float64, requires_grad=True)
    target = target_of(distance, predictions[0])
    ce = torch.stack([distance.to_target(view, target).mean for view in predictions]).mean()
    pairs = [distance.between(predictions[j], predictions[k], target).mean for k in range(views) for j in range(k)]
    kl = sum(pairs) / 2 / max(1, len(pairs)) + 0 * ce
    terms = RDropLoss(distance)(predictions, target, 3.0)
    for found, expected in ((terms.ce, ce), (terms.kl, kl), (terms.loss, ce + 3.0 * kl)):
        torch.testing.assert_close(found, expected)
        if views > 1 or found is not terms.kl:  # one view has no kl, and its gradient is none
            ours, theirs = (torch.autograd.grad(term, predictions, retain_graph=True)[0] for term in (found, expected))
            torch.testing.assert_close(ours, theirs)
    assert terms.rows == distance.to_target(predictions[0], target).weight
    assert torch.equal(terms.prediction, predictions[0])


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize(("distance", "shape"), EVERY.values(), ids=EVERY)
def test_consistency_alone_has_its_gradient(distance, shape, views):
    predictions = torch.randn(views, 4, *shape, dtype=torch.float64, requires_grad=True)
    pairs = [distance.between(predictions[j], predictions[k]).mean for k in range(views) for j in range(k)]
    kl = sum(pairs) / 2 / len(pairs)
    terms = RDropLoss(distance).consistency(predictions, 3.0)
    torch.testing.assert_close((terms.loss, terms.kl), (3.0 * kl, kl))
    assert terms.ce == 0
    assert torch.equal(terms.prediction, predictions[0])
    for found, expected in ((terms.kl, kl), (terms.loss, 3.0 * kl)):
        ours, theirs = (torch.autograd.grad(term, predictions, retain_graph=True)[0] for term in (found, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("distance", "shape"), EVERY.values(), ids=EVERY)
def test_every_distance_computes_half_precision_in_float32(distance, shape):
    first, second = (view.detach().to(torch.bfloat16) for view in numbers(4, *shape))
    with torch.autocast("cpu", torch.bfloat16):
        between = distance.between(first, second).mean
    assert between.dtype == torch.float32
    exact = distance.between(first.double(), second.double()).mean
    torch.testing.assert_close(between.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("distance", [Bernoulli(), Gaussian(), Cosine()], ids=["Bernoulli", "Gaussian", "Cosine"])
@pytest.mark.parametrize(("prediction", "target"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 3), (1, 3))])
def test_nothing_broadcasts(distance, prediction, target):
    with pytest.raises(ValueError, match=r"target of the same shape.*nothing broadcasts"):
        distance.to_target(torch.zeros(prediction), torch.zeros(target))
    with pytest.raises(ValueError, match="floating-point prediction"):
        distance.to_target(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3))


def test_a_prediction_without_a_variance_is_refused():
    with pytest.raises(ValueError, match=r"prediction \(N, ..., 2\) of means and log-variances, got \(4, 3\)"):
        Gaussian(log_variance=True).to_target(torch.zeros(4, 3), torch.zeros(4))


def test_weights_are_no_part_of_a_checkpoint():
    assert Bernoulli(pos_weight=torch.ones(3)).state_dict() == {}
    for distance in (Cosine(), Gaussian(), FromDistribution(distributions.Poisson), Categorical(weight=torch.ones(3))):
        assert distance.to(torch.float64).state_dict() == {}


@pytest.mark.parametrize(
    ("weight", "shape"), [((3,), (4, 3)), ((3,), (4, 6, 3)), ((6, 1), (4, 6, 3)), ((1,), (4,)), ((), (4,))]
)
def test_a_weight_for_each_label(weight, shape):
    prediction, target = torch.randn(shape), torch.randint(2, shape)
    weight = torch.rand(weight)
    expected = F.binary_cross_entropy_with_logits(prediction, target.float(), pos_weight=weight)
    torch.testing.assert_close(Bernoulli(pos_weight=weight).to_target(prediction, target).mean, expected)


@pytest.mark.parametrize(("weight", "shape"), [((4,), (4, 3)), ((4,), (4,)), ((4, 3), (4, 3)), ((2, 1), (4, 3))])
def test_a_weight_of_another_shape_is_refused(weight, shape):
    message = rf"pos_weight must have the shape {re.escape(str(shape[1:]))}.*got {re.escape(str(weight))}"
    with pytest.raises(ValueError, match=message):
        Bernoulli(pos_weight=torch.ones(weight)).to_target(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ("balanced", TypeError, "pos_weight must be a tensor or a list of numbers, .* got 'balanced'"),
        ([1.0, -2.0], ValueError, r"pos_weight must not be negative or NaN, got \[1\.0, -2\.0\]"),
        (torch.tensor([1.0, -2.0]), ValueError, r"pos_weight must not be negative or NaN, got \[1\.0, -2\.0\]"),
        (torch.tensor([torch.nan]), ValueError, "pos_weight must not be negative or NaN"),
    ],
)
def test_a_pos_weight_that_is_no_weight(weight, error, message):
    with pytest.raises(error, match=message):
        Bernoulli(pos_weight=weight)


@pytest.mark.parametrize(
    ("kind", "name"), [(Categorical, "weight"), (Focal, "weight"), (JensenShannon, "weight"), (Bernoulli, "pos_weight")]
)
def test_weights_may_be_a_list(kind, name):
    made = kind(**{name: [1, 2.0, 0.5]})
    torch.testing.assert_close(getattr(made, name), torch.tensor([1.0, 2.0, 0.5]))
    again = rebuild(describe(made), kind)
    assert torch.equal(getattr(again, name), getattr(made, name))
    assert repr(again) == repr(made)


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)]
)
def test_weights_move_and_are_never_cast(change):
    weight = [1 / 3, 70000.0]
    distances = {"classes": Categorical(weight=weight), "labels": Weighted(Bernoulli(pos_weight=weight))}
    module = nn.Sequential(nn.Linear(2, 2), Together(distances))
    together = pickle.loads(pickle.dumps(change(module)))[1]
    found = together.part("classes").weight, together.part("labels").unwrapped.pos_weight
    assert torch.equal(torch.stack(found), torch.tensor([weight, weight]))
    assert not [*module.buffers()]
    assert together.to("meta").to_empty(device="cpu").part("classes").weight.tolist() == found[0].tolist()


def test_a_list_of_weights_is_never_in_half_precision():
    torch.set_default_dtype(torch.bfloat16)  # as Trainer.init_module does under bf16-true
    try:
        with torch.device("meta"):  # and with empty_init
            distance = Categorical(weight=[1 / 3, 2.0])
        assert torch.equal(distance.weight, torch.tensor([1 / 3, 2.0], dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_list_as_the_class_weight_of_a_function():
    with pytest.raises(TypeError, match="The class weight must be a tensor, got a list"):
        rdrop_cross_entropy(torch.zeros(2, 4, 3), torch.zeros(4).long(), 1.0, weight=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("distance", [Gaussian(), Bernoulli(), Cosine()], ids=["Gaussian", "Bernoulli", "Cosine"])
def test_a_first_batch_of_other_shapes_is_named_by_its_own_size(distance):
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(6,\); nothing broadcasts"):
        distance.check(torch.zeros(6, 4), torch.zeros(6))


def test_a_pos_weight_of_another_length_is_named_in_a_first_batch():
    with pytest.raises(ValueError, match=r"pos_weight must have the shape \(4,\).*prediction of shape \(6, 4\)"):
        Bernoulli(pos_weight=torch.ones(5)).check(torch.zeros(6, 4), torch.zeros(6, 4))


@pytest.mark.parametrize("class_dim", [0, 2, 5, -2, -3])
def test_a_dimension_that_holds_no_classes_is_refused(class_dim):
    message = rf"class_dim={class_dim} cannot be the class dimension of a prediction of shape \(3, 3\)"
    with pytest.raises(ValueError, match=message):
        RDropLoss(Categorical(class_dim=class_dim))(torch.zeros(2, 3, 3), torch.zeros(3, dtype=torch.long), 1.0)


def test_a_prediction_without_classes_is_perhaps_a_regression():
    with pytest.raises(ValueError, match=r"\(32,\).* For regression pass rdrop_distance=Gaussian\(\)\.$"):
        RDropLoss()(torch.zeros(2, 32), torch.zeros(32), 1.0)
    with pytest.raises(ValueError, match="for regression Gaussian"):
        RDropLoss()(torch.zeros(2, 32, 1), torch.zeros(32), 1.0)


@pytest.mark.parametrize("method", ["to_target", "between"])
def test_a_distance_that_returns_a_tensor_is_told_to_wrap_it(method):
    own = type("Own", (Gaussian,), {method: lambda self, first, second, target=None: (first - second).square()})
    message = rf"Own\.{method} must return an Average, got a Tensor\. Wrap it: Average\.of\(values\)"
    with pytest.raises(TypeError, match=message):
        RDropLoss(own())(torch.zeros(2, 4), torch.zeros(4), 1.0)


@pytest.mark.parametrize("distance", [Categorical(), JensenShannon(), Bernoulli(), Gaussian(), Cosine()])
def test_a_list_is_no_target(distance):
    for call in (lambda: RDropLoss(distance)(torch.zeros(2, 1, 3), [0], 1.0), lambda: distance.to_target(LOGITS, [0])):
        with pytest.raises(TypeError, match=r"target must be a tensor, got a list: torch\.as_tensor"):
            call()


LOGITS = torch.zeros(1, 3)


def test_directed_is_d_of_the_first_and_the_second():
    """The first is held fixed by VAT, and is the p of KL(p || q)."""
    first, second = numbers(6, 4)
    target = torch.tensor([0, 1, -100, 2, -100, 3])
    p, q = (distributions.Categorical(logits=view) for view in (first, second))
    kl = distributions.kl_divergence(p, q)
    assert abs(kl.mean() - distributions.kl_divergence(q, p).mean()) > 0.01
    torch.testing.assert_close(Categorical().directed(first, second).mean, kl.mean())
    torch.testing.assert_close(Categorical().directed(first, second, target).mean, kl[target >= 0].mean())
    images = Categorical(class_dim=1).directed(first[..., None], second[..., None], target[:, None])
    torch.testing.assert_close(images.mean, kl[target >= 0].mean())
    torch.testing.assert_close(
        FromDistribution(lambda x: distributions.Categorical(logits=x)).directed(first, second).mean, kl.mean()
    )
    js = jensen_shannon(first, second)[target >= 0].mean()
    torch.testing.assert_close(JensenShannon().directed(first, second, target).mean, js)
    torch.testing.assert_close(
        Bernoulli().directed(first, second).mean, bernoulli_kl(first.sigmoid(), second.sigmoid()).mean()
    )
    torch.testing.assert_close(Gaussian().directed(first, second).mean, F.mse_loss(first, second))
    p, q = (distributions.Normal(view[:, 0], (view[:, 1] / 2).exp()) for view in (first, second))
    normal = Gaussian(log_variance=True).directed(first[:, :2], second[:, :2])
    torch.testing.assert_close(normal.mean, distributions.kl_divergence(p, q).mean())
    torch.testing.assert_close(Cosine().directed(first, second).mean, (1 - F.cosine_similarity(first, second)).mean())


@pytest.mark.parametrize("gap", [1e-3, 1e-2])
def test_nearly_equal_normals_keep_their_digits_in_float32(gap):
    first = torch.tensor([[0.5, 1.0]])
    second = first + torch.tensor([[0.0, gap]])
    for measure in (Gaussian(log_variance=True).between, Gaussian(log_variance=True).directed):
        exact = measure(first.double(), second.double()).mean
        torch.testing.assert_close(measure(first, second).mean.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("zero", [0.0, 1e-30])
def test_a_vector_without_a_direction_has_no_gradient(zero):
    vector = torch.full((2, 3), zero, requires_grad=True)
    far = Cosine().to_target(vector, torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(far.total, torch.tensor(0.5))  # for the first row; the second is as far as can be told 0
    assert not torch.autograd.grad(far.total, vector)[0].any()
    small = torch.tensor([[3e-6, 4e-6]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Cosine().between(x, torch.ones_like(x)).mean, small, eps=1e-10, atol=1e-2)
