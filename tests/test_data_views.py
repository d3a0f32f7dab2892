"""Views that come with the data take the place of copies: everything else is as it is for copies."""

import copy
import warnings

import pytest
import torch
from conftest import Net, Small
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import VAT, Categorical, RDropLoss, Regularizer, Views, symmetric_kl
from lightning_rdrop.modules import Classifier
from lightning_rdrop.terms import Average
from lightning_rdrop.views import batch_size, concatenate
from tests.networks import training_outputs


def data(views=2, examples=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 8, generator=generator, dtype=torch.float64)
    return [x + 0.3 * torch.randn(x.shape, generator=generator).double() for _ in range(views)], torch.arange(5) % 3


def formula(views, target, alpha):
    """ce + alpha kl of K views (K, N, C), written out."""
    views = list(views)
    pairs = [(one, other) for i, one in enumerate(views) for other in views[:i]]
    ce = torch.stack([F.cross_entropy(one, target) for one in views]).mean()
    kl = torch.stack([symmetric_kl(*pair).mean() for pair in pairs]).mean() / 2
    return ce + alpha * kl, ce, kl


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("p", [0.3, 0.0])
@pytest.mark.parametrize(("passes", "views"), [("joint", 2), ("separate", 2), ("joint", 3), ("separate", 3)])
def test_loss_and_gradients_are_the_formula(passes, views, p, soft):
    module = Small(p=p, rdrop_alpha=2.0, rdrop_views=views, rdrop_passes=passes).double()
    given, target = data(views)
    if soft:  # as mixup makes them
        target = 0.3 * F.one_hot(target, 3).double() + 0.7 * F.one_hot(target.flip(0), 3)
    fed, seen = [], training_outputs(module)
    module.network.register_forward_pre_hook(lambda network, args: network.training and fed.append(args[0]))
    terms = module.rdrop_step((Views(*given), target))
    assert torch.equal(torch.cat(fed), torch.cat(given))
    assert len(seen) == (1 if passes == "joint" else views)
    outputs = torch.cat(seen).unflatten(0, (views, 5))
    loss, ce, kl = formula(outputs, target, 2.0)
    torch.testing.assert_close((terms.loss, terms.ce, terms.kl), (loss, ce, kl))
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, parameters), wanted)
    assert torch.equal(terms.prediction, outputs[0])
    assert terms.examples == 5


class Crops(Small):
    """A data set of pairs of crops, whose items are ((first, second), label)."""

    def rdrop_unpack(self, batch):
        (first, second), target = batch
        return Views(first, second), target


def rows():
    (first, second), target = data()
    return list(zip(zip(first, second, strict=True), target, strict=True))


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_a_step_of_the_trainer_is_the_step_by_hand(fit, passes):
    module = Crops(p=0.0, rdrop_alpha=2.0, rdrop_passes=passes).double()
    by_hand = copy.deepcopy(module)
    metrics = fit(module, DataLoader(rows(), 5), precision="64-true", max_epochs=2).callback_metrics
    (first, second), target = data()
    for _ in range(2):
        loss, ce, kl = formula([by_hand(first), by_hand(second)], target, 2.0)
        parameters = list(by_hand.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.1 * gradient
    torch.testing.assert_close(dict(module.named_parameters()), dict(by_hand.named_parameters()))
    logged = [float(metrics[f"train/{name}"]) for name in ("loss", "ce", "kl")]
    assert logged == pytest.approx([float(value) for value in (loss, ce, kl)], rel=1e-6)


def test_views_made_by_a_collate_function_reach_the_module(fit):
    def collate(items):
        first, second = (torch.stack([pair[side] for pair, _ in items]) for side in (0, 1))
        return Views(first, second), torch.stack([label for _, label in items])

    module = Small(p=0.0).double()
    metrics = fit(module, DataLoader(rows(), 5, collate_fn=collate), precision="64-true").callback_metrics
    assert metrics["train/kl"] > 1e-4


def test_one_view_is_ordinary_training_with_the_first():
    module = Small(p=0.0, rdrop_views=1).double()
    given, target = data()
    terms = module.rdrop_step((Views(*given), target))
    torch.testing.assert_close(terms.loss, F.cross_entropy(module(given[0]), target))
    assert terms.kl == 0


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_another_number_of_views_is_refused(passes):
    given, target = data(3)
    with pytest.raises(ValueError, match=r"into 3 Views, but rdrop_views=2. .* train with rdrop_views=3"):
        Small(rdrop_passes=passes).double().rdrop_step((Views(*given), target))
    with pytest.raises(ValueError, match="got none"):
        Views()


def test_a_tuple_is_still_one_input():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, pair):
            return self.dropout(pair[0][:, :3] * pair[1][:, :3])

    (first, second), target = data()
    assert Net(Two()).rdrop_step(((first, second), target)).prediction.shape == (5, 3)


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_equal_views_are_a_fault_without_dropout_alone(passes):
    (first, second), target = data()
    with pytest.raises(ValueError, match=r"Views that the batch was unpacked into have the same inputs.*p = 0"):
        Small(p=0.0, rdrop_passes=passes).double().rdrop_step((Views(first, first), target))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Small(p=0.3, rdrop_passes=passes).double().rdrop_step((Views(first, first), target)).kl > 0
        for module in (Small(p=0.0, rdrop_passes=passes), Small(p=0.3, rdrop_passes=passes)):
            module.double().network.eval()  # as from_pretrained hands it out: no fault where the data makes the views
            assert module.rdrop_step((Views(first, second), target)).kl > 0


def test_rows_that_meet_are_found():
    class Meets(nn.Module):
        def forward(self, x):
            return (x - x.mean(0))[:, :3]

    given, target = data()
    with pytest.raises(ValueError, match="rows of a duplicated batch depend on each other"):
        Net(Meets()).rdrop_step((Views(*given), target))


def test_late_duplication_is_refused():
    given, target = data()
    with pytest.raises(ValueError, match=r"rdrop_duplicate_at='network.2' runs everything before it once for all"):
        Small(rdrop_duplicate_at="network.2").double().rdrop_step((Views(*given), target))


class Recorder(Regularizer):
    name = "recorder"

    def forward(self, module, inputs, target=None):
        self.inputs = inputs
        return Average.of(module.rdrop_predict(inputs).square())


def test_regularizers_and_the_hook_of_the_guard_get_the_first_view():
    checked = []

    class Checked(Small):
        def rdrop_check(self, predictions, inputs, target, part):
            checked.append(inputs)

    given, target = data()
    module = Checked(p=0.0, rdrop_alpha=2.0, rdrop_regularizers=[recorder := Recorder(), VAT()]).double()
    terms = module.rdrop_step((Views(*given), target))
    assert recorder.inputs is given[0]
    assert checked == [given[0]]
    torch.testing.assert_close(terms.extra["recorder"], module(given[0]).square().mean())
    torch.testing.assert_close(terms.loss, terms.ce + 2.0 * terms.kl + terms.extra["recorder"] + terms.extra["vat"])


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_unlabelled_views_beside_plain_labels_are_uda(passes):
    """Xie et al. 2020: labelled examples have cross-entropy in one pass, unlabelled ones the consistency of two."""
    module = Small(p=0.0, rdrop_alpha=2.0, rdrop_labeled_weight=0.0, rdrop_unlabeled_weight=0.5, rdrop_passes=passes)
    module, (views, target), (weak, strong) = module.double(), data(), data(seed=1)[0]
    terms = module.rdrop_step({"labeled": (Views(*views), target), "unlabeled": Views(weak, strong)})
    ce, kl = F.cross_entropy(module(views[0]), target), symmetric_kl(module(weak), module(strong)).mean() / 2
    torch.testing.assert_close((terms.loss, terms.ce, terms.kl), (ce + 2.0 * 0.5 * kl, ce, 0.5 * kl))


def test_a_token_counts_if_it_does_in_all_views():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 3)

        def forward(self, input_ids, attention_mask):
            return self.embedding(input_ids)

    def text(mask):
        return {"input_ids": torch.randint(20, (2, 4)), "attention_mask": torch.tensor(mask)}

    first, second = text([[1, 1, 1, 0], [1, 1, 0, 0]]), text([[1, 1, 1, 1], [1, 0, 0, 0]])
    labeled = text([[1, 1, 1, 1], [1, 1, 1, 1]]) | {"labels": torch.randint(3, (2, 4))}
    module = Net(Tagger(), rdrop_labeled_weight=0.0).double()
    terms = module.rdrop_step({"labeled": labeled, "unlabeled": Views(first, second)})
    both = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    expected = symmetric_kl(*(module.rdrop_predict(text)[both] for text in (first, second))).mean() / 2
    torch.testing.assert_close(terms.extra["kl_unlabeled"], expected)


def test_containers_are_joined_view_after_view():
    first = {"x": torch.zeros(2, 3), "names": ["a", "b"], "scale": 2.0}
    second = {"x": torch.ones(2, 3), "names": ["c", "d"], "scale": 2.0}
    assert batch_size(Views(first, second)) == 2
    both = concatenate([first, second], 2)
    assert both["names"] == ["a", "b", "c", "d"]
    assert both["x"][:, 0].tolist() == [0, 0, 1, 1]
    assert both["scale"] == 2.0


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": torch.ones(5, 2, 6)}, r"\['x'\] of shape \(5, 2, 4\), and view 1 has \(5, 2, 6\) there"),
        ({"y": torch.ones(5, 2, 4)}, r"\['x'\] of shape \(5, 2, 4\), and view 1 has nothing there"),
    ],
)
def test_views_that_one_pass_cannot_hold_are_refused(second, message):
    module = Net(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=message + '.*rdrop_passes="separate"'):
        module.rdrop_step((Views({"x": torch.ones(5, 2, 4)}, second), torch.arange(5) % 3))


def test_crops_of_two_sizes_in_separate_passes():
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean(-1)

    given = [torch.randn(5, 3, size).double() for size in (32, 16)]
    terms = Net(Pooled(), rdrop_passes="separate").rdrop_step((Views(*given), torch.arange(5) % 3))
    torch.testing.assert_close(
        terms.loss, RDropLoss(Categorical())(torch.stack([x.mean(-1) for x in given]), torch.arange(5) % 3, 4.0).loss
    )


def test_a_ready_made_module_is_evaluated_on_the_first(fit):
    class Pairs(Classifier):
        rdrop_unpack = Crops.rdrop_unpack

    module = Pairs(nn.Sequential(nn.Linear(8, 3)), 3).double()
    trainer = fit(module, DataLoader(rows(), 5), precision="64-true")
    (first, _), target = data()
    (tested,) = trainer.test(module, DataLoader(rows(), 5), verbose=False)
    assert tested["test/ce"] == pytest.approx(float(F.cross_entropy(module(first), target)))
    (predicted,) = trainer.predict(module, DataLoader(rows(), 5))
    torch.testing.assert_close(predicted, module(first).softmax(-1))
