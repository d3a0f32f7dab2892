from importlib import import_module

import pytest
import torch
from conftest import Net, sequential
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_rdrop.late_duplication import find_split


def found(network, at="auto", x=None):
    return find_split(network, network, torch.randn(4, 8) if x is None else x, 2, at)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.third(F.dropout(self.second(self.first(x)), 0.3, self.training))


def test_auto_is_the_latest_place_before_anything_random():
    assert found(sequential(0.0, 0.3)).at == ("5",)
    assert found(sequential(0.3, 0.3)).at == ("2",)
    assert found(nn.Sequential(nn.Linear(8, 8), Residual(), nn.Linear(8, 3))).at == ("1",)  # not inside of it
    assert found(Functional()).at == ("second",)
    assert found(sequential(0.0)) is None
    assert found(sequential(0.3).eval()) is None
    assert found(nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))) is None  # nothing would be saved


def test_the_share_of_the_work():
    # 8 x 8, 8 x 8, 8 x 3 products: the first two for one view, the last for two
    assert found(sequential(0.0, 0.3)).share == pytest.approx((64 + 64 + 2 * 24) / (2 * (64 + 64 + 24)))


def place(module, x):
    """Where the last batch was duplicated."""
    late = module._rdrop_late
    return late._splits[late._key(x)].at


def test_another_mode_is_looked_at_anew():
    module = Net(sequential(0.3, 0.3), rdrop_duplicate_at="auto")
    module.network[2].eval()
    batch = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    module.rdrop_step(batch)
    assert place(module, batch[0]) == ("network.5",)
    module.network[2].train()
    module.rdrop_step(batch)
    assert place(module, batch[0]) == ("network.2",)


def test_a_dropout_that_is_switched_on_below_the_split_is_looked_at_anew(monkeypatch):
    module = Net(sequential(0.0, 0.3), rdrop_duplicate_at="auto")
    looked, batch = [], (torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    monkeypatch.setattr(
        import_module("lightning_rdrop.late_duplication.find_split"),  # which its function hides
        "find_split",
        lambda *arguments: looked.append(module.network[2].p) or find_split(*arguments),
    )
    for p in (0.0, 0.5, 0.4, 0.0):
        module.network[2].p = p
        module.rdrop_step(batch)
        assert place(module, batch[0]) == ("network.2" if p else "network.5",)
    assert looked == [0.0, 0.5]
    named = Net(sequential(0.0, 0.3), rdrop_duplicate_at="network.3")
    named.rdrop_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))
    named.network[2].p = 0.5
    with pytest.warns(UserWarning, match=r"network\.2 runs before it and is random"):
        named.rdrop_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))


def test_it_may_be_set_between_two_steps():
    module, rows = Net(sequential(0.0, 0.3)), []
    module.network[0].register_forward_hook(lambda _, args, out: rows.append(len(out)))
    for at in (None, "network.5", None):
        module.rdrop_duplicate_at = at
        module.rdrop_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))
        assert (module.rdrop_duplicate_at, rows[-1]) == (at, 8 if at is None else 4)
    with pytest.raises(ValueError, match="must be the name of a submodule, a list of names, 'auto' or None, got ''"):
        module.rdrop_duplicate_at = ""
    separate = Net(sequential(0.3), rdrop_passes="separate")
    with pytest.raises(ValueError, match=r"rdrop_duplicate_at='auto' .*rdrop_passes='separate' makes one"):
        separate.rdrop_duplicate_at = "auto"


class Noise(nn.Module):
    """Random if told so, which no probability and no mode shows."""

    scale = 0.0

    def forward(self, x):
        return x + self.scale * torch.randn_like(x) if self.scale else x


def test_each_fit_looks_for_the_split_again(fit, rows):
    module = Net(nn.Sequential(nn.Linear(8, 4), Noise(), nn.Linear(4, 3), nn.Dropout(0.3)), rdrop_duplicate_at="auto")
    seen = []
    module.network[2].register_forward_hook(lambda _, args, out: seen.append(len(out)))
    for scale, views in ((0.0, 1), (1.0, 2)):
        module.network[1].scale = scale
        fit(module, rows, max_steps=2)
        assert seen[-1] == views * rows.batch_size


def test_a_split_is_that_of_the_views_of_the_step():
    module = Net(sequential(0.0, 0.3), rdrop_views=1, rdrop_duplicate_at="network.5")
    module.rdrop_views = 3
    assert module.rdrop_draw(torch.randn(4, 8)).shape == (3, 4, 3)
    assert Net(sequential(0.0, 0.3), rdrop_duplicate_at="auto").rdrop_draw(torch.randn(4, 8), count=3).shape[0] == 3


def test_random_layers_before_the_split_are_named():
    module = Net(sequential(0.3, 0.3), rdrop_duplicate_at="network.3")
    with pytest.warns(UserWarning, match=r"'network\.3': network\.2 runs before it and is random"):
        module.rdrop_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))


def test_a_split_that_shares_nothing_is_no_warning(recwarn):
    Net(sequential(0.0, 0.3), rdrop_duplicate_at="network.3").rdrop_step(
        (torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    )
    assert not len(recwarn)


def test_nothing_random_behind_the_split_is_refused_by_the_guard():
    module = Net(sequential(0.3, 0.0), rdrop_duplicate_at="network.3")
    with pytest.warns(UserWarning, match="runs before"), pytest.raises(ValueError, match="The views are identical"):
        module.rdrop_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = sequential(0.0, 0.3), sequential(0.0, 0.3), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.cat([self.left(x), self.right(x)], -1))


def test_a_split_behind_the_last_dropout_is_told_to_move():
    module = Net(sequential(0.3, 0.0), rdrop_duplicate_at="network.3", rdrop_guard="error")
    message = r"everything random runs before rdrop_duplicate_at='network\.3'.*Name a submodule before"
    with pytest.warns(UserWarning, match="runs before"), pytest.raises(ValueError, match=message) as raised:
        module.rdrop_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))
    assert "separate" not in str(raised.value)  # which is refused together with rdrop_duplicate_at


def test_several_splits():
    network, x = Towers(), torch.randn(4, 8)
    split = found(network, ["left.5", "right.5"], x)
    rows = []
    for part in (network.left[0], network.left[6], network.right[0], network.right[6]):
        part.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    assert split.predict(network, network, x, 2).shape == (8, 3)
    assert rows == [4, 8, 4, 8]
    assert found(network, "*.5", x).at == ("left.5", "right.5")


class AcrossTheBatch(nn.Module):
    """Attention to all other examples."""

    def forward(self, x):
        scores = (x @ x.T).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
        return x + scores.softmax(-1) @ x


class Columns(nn.Module):
    """The batch in the second dimension, as in an LSTM."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x.unsqueeze(0)).squeeze(0))


class InTraining(nn.Module):
    """Adds in training, and there only, what a callable makes of the two hidden layers."""

    def __init__(self, more):
        super().__init__()
        self.first, self.second, self.aux = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.head, self.more = nn.Dropout(0.3), nn.Linear(8, 3), more

    def forward(self, x):
        before = self.first(x)
        behind = self.drop(self.second(before))
        return self.head(behind + self.more(self, before, behind) if self.training else behind)


class Full(nn.Module):
    """Runs out of memory where the batch is duplicated, in one mode."""

    def __init__(self, training):
        super().__init__()
        self.first, self.drop, self.when = nn.Linear(8, 8), nn.Dropout(0.3), training

    def forward(self, x):
        y = self.drop(self.first(x))
        if len(y) != len(x) and self.training == self.when:
            raise torch.OutOfMemoryError
        return y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("at", ["drop", "auto"])
def test_a_lack_of_memory_is_no_wrong_place(training, at):
    with pytest.raises(torch.OutOfMemoryError):
        find_split(*[Full(training)] * 2, torch.randn(4, 8), 2, at)


class Checkpointed(nn.Module):
    """A block between two layers, computed again in the backward pass."""

    def __init__(self, use_reentrant=False):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))
        self.block, self.use_reentrant = nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 8)), use_reentrant

    def forward(self, x):
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant))


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.never, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(x)


class Sized(nn.Module):
    """Another layer for more than four rows."""

    def __init__(self):
        super().__init__()
        self.first, self.few, self.many = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.many(x) if len(x) > 4 else self.few(x)


class Loop(nn.Module):
    """A call for each row."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(8, 3), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(torch.cat([self.layer(row) for row in x.split(1)]))


@pytest.mark.parametrize(
    ("network", "at", "message"),
    [
        (
            nn.Sequential(AcrossTheBatch(), *sequential(0.3)),
            "3",
            "differs from that for duplicated inputs",
        ),
        (nn.Sequential(Residual(), nn.Linear(8, 3)), "0.drop", r"must match the size of tensor.*residual"),
        (Columns(), "layer", r"gets a batch that is not its first dimension, \(1, 4, 8\)"),
        (Sized(), "first", "How many is called depends on the number of rows"),
        (Loop(), "layer", "layer gets no tensor with the batch"),
        (Uncalled(), "never", "never is not called"),
        (InTraining(lambda self, before, behind: self.aux(before)), "second", "not in training. aux is called"),
        (InTraining(lambda self, before, behind: before), "second", r"not in training.*must match.* Name another"),
        (Checkpointed(), "block", r"block runs inside torch\.utils\.checkpoint.* without checkpointing it"),
        (Checkpointed(use_reentrant=True), "block.1", r"block\.1 runs inside torch\.utils\.checkpoint"),
        (sequential(0.3), "7", r"'7' is not a submodule of Sequential\. Its submodules are 0, 1, 2"),
        (Towers(), "lef", "Did you mean left"),
        (Towers(), "5", r"matches left\.5, right\.5: use a longer name"),
    ],
    ids=[
        "across",
        "residual",
        "dimension",
        "sized",
        "loop",
        "uncalled",
        "aux",
        "skip",
        "checkpoint",
        "reentrant",
        "unknown",
        "near",
        "ambiguous",
    ],
)
def test_where_a_batch_cannot_be_doubled_the_submodule_is_named(network, at, message):
    with pytest.raises(ValueError, match=message) as raised:
        found(network, at)
    assert at in str(raised.value)


def test_one_row_proves_nothing_that_several_do_not():
    """A view of one row would be added to two without an error."""
    for rows in (1, 4):
        with pytest.raises(ValueError, match="residual connection"):
            found(nn.Sequential(Residual(), nn.Linear(8, 3)), "0.drop", torch.randn(rows, 8))


def test_auto_goes_no_further_than_training_allows():
    assert found(InTraining(lambda self, before, behind: behind)).at == ("drop",)
    assert found(InTraining(lambda self, before, behind: before)) is None  # both are parts of a sum in training
    assert found(Checkpointed()).at == ("last.0",)


def test_the_fast_path_of_transformers_is_off_in_the_trial_only():
    enabled = []

    class Look(nn.Sequential):
        def forward(self, x):
            enabled.append(torch.backends.mha.get_fastpath_enabled())
            return super().forward(x)

    found(Look(*sequential(0.0, 0.3)))
    assert set(enabled) == {False}
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="is not called"):
        found(Uncalled(), "never")
    assert torch.backends.mha.get_fastpath_enabled()


def test_across_the_batch_behind_the_split_is_as_at_the_entrance():
    assert found(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), AcrossTheBatch(), nn.Linear(8, 3)), "1").at == ("1",)


@pytest.mark.parametrize("at", ["", [], [3]])
def test_bad_names(at):
    with pytest.raises(ValueError, match="rdrop_duplicate_at must be the name of a submodule"):
        Net(sequential(0.3), rdrop_duplicate_at=at)


def test_it_is_for_joint_passes():
    with pytest.raises(ValueError, match="rdrop_passes='separate' makes one"):
        Net(sequential(0.3), rdrop_duplicate_at="auto", rdrop_passes="separate")
