"""Views are drawn by one pass or by several, and each has masks of its own."""

import pytest
import torch
from torch import nn

from lightning_rdrop.draw import draw
from lightning_rdrop.late_duplication import LateDuplication


@pytest.mark.parametrize(("passes", "sizes"), [("joint", [15]), ("separate", [5, 5, 5])])
def test_the_passes_of_three_views(passes, sizes):
    seen = []

    def predict(x):
        seen.append(len(x))
        return nn.functional.dropout(x, 0.5)

    drawn = draw(nn.Identity(), predict, torch.ones(5, 8), 3, 5, passes=passes)
    assert seen == sizes
    assert drawn.shape == (3, 5, 8)
    assert len({tuple(view.flatten().tolist()) for view in drawn}) == 3
    assert set(drawn.unique().tolist()) == {0.0, 2.0}


def test_a_network_with_a_fixed_batch_size_is_told_about_separate_passes():
    x, dropout = torch.ones(5, 2, 4), nn.Dropout(0.5)

    def fixed(x):
        return dropout(x.view(5, 8))

    with pytest.raises(RuntimeError, match=r"shape '\[5, 8\]' is invalid") as raised:
        draw(dropout, fixed, x, 2, 5)
    (note,) = raised.value.__notes__
    assert "over 2 * 5 rows failed, but a pass over 5 rows works" in note
    assert 'rdrop_passes="separate"' in note
    assert draw(dropout, fixed, x, 2, 5, passes="separate").shape == (2, 5, 8)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_other_errors_are_left_as_they_are(error):
    seen = []

    def fails(x):
        seen.append(len(x))
        raise error("of its own")

    with pytest.raises(error, match="of its own") as raised:
        draw(nn.Identity(), fails, torch.ones(5, 4), 2, 5)
    assert not hasattr(raised.value, "__notes__")
    assert seen == ([10] if error is torch.OutOfMemoryError else [10, 5])


def test_a_split_runs_once_what_lies_before_it():
    network, seen = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), []
    late = LateDuplication("auto")
    late.split(network, network, torch.ones(3, 4), 2, (True,) * 4)
    network[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    first, second = draw(network, network, torch.ones(3, 4), 2, 3, late=late)
    assert seen == [3]
    assert not torch.equal(first, second)
