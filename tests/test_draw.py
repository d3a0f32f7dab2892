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


def test_a_split_runs_once_what_lies_before_it():
    network, seen = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), []
    late = LateDuplication("auto", 2)
    late.split(network, network, torch.ones(3, 4), (True,) * 4)
    network[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    first, second = draw(network, network, torch.ones(3, 4), 2, 3, late=late)
    assert seen == [3]
    assert not torch.equal(first, second)
