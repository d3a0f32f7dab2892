import collections
import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_rdrop.views import batch_size, duplicate, split

LAYOUTS = ("block", "interleaved")


class Pair(NamedTuple):
    text: Any
    scale: float


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    derived: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        if self.derived is None:
            object.__setattr__(self, "derived", self.x + 1)


class Named(NamedTuple):
    x: Any
    y: Any


def nestings(examples):
    rows = st.integers(0, 2).flatmap(
        lambda dims: st.just(torch.arange(examples * 3**dims).reshape(examples, *[3] * dims))
    )
    constant = st.sampled_from([None, 2.5, "name", True, torch.tensor(7)])
    strings = st.just([f"text {i}" for i in range(examples)])
    return st.recursive(
        rows | constant | strings,
        lambda inner: (
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
            | st.tuples(inner, rows)
            | st.lists(inner, min_size=1, max_size=3).map(lambda items: [*items, torch.ones(examples)])
            | st.builds(Named, inner, rows)
        ),
        max_leaves=6,
    )


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def same(first, second):
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return first == second


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.sampled_from(LAYOUTS))
def test_doubling_then_splitting_gives_every_view_the_original(data, examples, views, layout):
    batch = {"x": torch.rand(examples), "rest": data.draw(nestings(examples))}
    untouched = copy.deepcopy(batch)
    doubled = duplicate(batch, views, layout=layout)
    assert same(batch, untouched)
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    for leaf, many in zip(tensors, [x for x in leaves(doubled) if isinstance(x, Tensor)], strict=True):
        if leaf.dim() == 0:
            assert many is leaf
        else:
            assert torch.equal(split(many, views, examples, layout=layout), torch.stack([leaf] * views))
    assert batch_size(doubled) == views * examples


def test_layouts_by_hand():
    x, names = torch.tensor([1, 2, 3]), ["a", "b", "c"]
    assert same(duplicate([x, names], 2), [torch.tensor([1, 2, 3, 1, 2, 3]), ["a", "b", "c", "a", "b", "c"]])
    interleaved = duplicate([x, names], 2, layout="interleaved")
    assert same(interleaved, [torch.tensor([1, 1, 2, 2, 3, 3]), ["a", "a", "b", "b", "c", "c"]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flattened_tokens_stay_with_their_example(layout):
    tokens = torch.arange(6).view(3, 2)  # three examples of two tokens
    flat = duplicate(tokens, 2, layout=layout).flatten()
    assert split(flat, 2, 3, layout=layout).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_containers_keep_their_type():
    x = torch.ones(2, 3)
    for batch in (
        collections.OrderedDict(x=x),
        collections.defaultdict(list, x=x),
        collections.UserDict(x=x),
        Pair(x, 2.0),
        Frozen(x),
        (x, x),
        [x],
    ):
        doubled = duplicate(batch, 3)
        assert type(doubled) is type(batch)
        assert batch_size(doubled) == 6
        assert batch_size(batch) == 2
    assert torch.equal(duplicate(Frozen(x), 2).derived, torch.full((4, 3), 2.0))
    assert duplicate(collections.defaultdict(list, x=x), 2)["new"] == []


def test_hugging_face_containers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import BaseModelOutput

    encoded = duplicate(transformers.BatchEncoding({"input_ids": torch.ones(2, 3)}), 2)
    assert isinstance(encoded, transformers.BatchEncoding)
    assert encoded["input_ids"].shape == encoded.input_ids.shape == (4, 3)
    states = duplicate(BaseModelOutput(last_hidden_state=torch.ones(2, 3), hidden_states=(torch.ones(2, 1),)), 2)
    assert isinstance(states, BaseModelOutput)
    assert states.last_hidden_state.shape == states["last_hidden_state"].shape == (4, 3)
    assert states.hidden_states[0].shape == (4, 1)


def test_constants_and_lists_of_other_lengths_are_left():
    batch = {"x": torch.ones(3, 2), "classes": ["yes", "no"], "size": torch.Size([1, 2, 3]), "tags": ("a", "b", "c")}
    doubled = duplicate(batch, 2)
    assert doubled["classes"] == ["yes", "no"]
    assert doubled["size"] == torch.Size([1, 2, 3])
    assert doubled["tags"] == ("a", "b", "c", "a", "b", "c")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_flow_back_to_every_view(layout):
    x = torch.randn(3, 2, requires_grad=True)
    views = split(duplicate(x, 2, layout=layout), 2, 3, layout=layout)
    (views * torch.tensor([1.0, 10.0])[:, None, None]).sum().backward()
    assert (x.grad == 11).all()


class Graph:
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (pack_sequence([torch.ones(3), torch.ones(2)]), "PackedSequence"),
        (torch.eye(2).to_sparse(), "Tensor"),
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "Tensor"),
        (Graph(), "Graph"),
    ],
    ids=["packed", "sparse", "nested", "graph"],
)
def test_what_cannot_be_doubled_is_refused_by_its_place(value, kind):
    with pytest.raises(
        TypeError, match=rf"batch\['deep'\]\[1\], a {kind}, cannot be doubled.*rdrop_passes=\"separate\""
    ):
        duplicate({"x": torch.ones(2), "deep": (torch.ones(2), value)}, 2)


def test_tensors_of_different_sizes_are_refused_by_their_places():
    with pytest.raises(ValueError, match=r"batch\['x'\] has 4 rows and batch\['weight'\] has 3.*keep constants"):
        duplicate({"x": torch.ones(4, 2), "weight": torch.ones(3)}, 2)
    images = [torch.ones(3, 5, 5), torch.ones(1, 5, 5)]
    with pytest.raises(ValueError, match=r"batch\[0\] has 3 rows and batch\[1\] has 1.*separate"):
        duplicate(images, 2)


@pytest.mark.parametrize("batch", [{}, ["a", "b"], torch.tensor(1.0), None])
def test_a_batch_without_rows_is_refused(batch):
    with pytest.raises(ValueError, match="has rows"):
        batch_size(batch)


@pytest.mark.parametrize("shape", [(4, 3), (6, 3), ()])
def test_a_prediction_with_another_number_of_rows_is_refused(shape):
    rows = shape[0] if shape else 0
    with pytest.raises(ValueError, match=f"returned {rows} rows .* for 2 views of 4 examples, where 8"):
        split(torch.ones(shape), 2, 4)


def test_a_prediction_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"The prediction is a dict.*\.logits.*rdrop_predict"):
        split({"logits": torch.ones(4, 3)}, 2, 2)


@pytest.mark.parametrize("views", [0, -1, 2.0, True])
def test_views_are_a_positive_int(views):
    for call in (lambda: duplicate(torch.ones(2), views), lambda: split(torch.ones(2), views, 1)):
        with pytest.raises(ValueError, match=f"views must be an int >= 1, got {views!r}"):
            call()


def test_layouts_are_two():
    with pytest.raises(ValueError, match="layout must be 'block' or 'interleaved', got 'zip'"):
        duplicate(torch.ones(2), 2, layout="zip")
