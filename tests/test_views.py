import collections
import copy
import dataclasses
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from lightning_rdrop import views as views_module
from lightning_rdrop.nesting import tensors_of
from lightning_rdrop.views import batch_size, concatenate, count, duplicate, merge, split, stack, take, view


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


class Derived(collections.namedtuple("Derived", "x more")):
    def __new__(cls, x):
        return super().__new__(cls, x, x + 1)


@dataclasses.dataclass
class Plain:
    x: Any
    y: Any


class Texts(list):
    pass


@dataclasses.dataclass
class Masked:
    x: Tensor
    unset: Tensor = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        self.mask = self.x > 0  # an attribute, but no field


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor


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
            | st.builds(Plain, inner, rows)
        ),
        max_leaves=6,
    )


def leaves(value):
    if isinstance(value, Plain):
        value = vars(value)
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def same(first, second):
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Plain):
        return type(first) is type(second) and same(vars(first), vars(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return first == second


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_doubling_then_splitting_gives_every_view_the_original(data, examples, views):
    batch = {"x": torch.rand(examples), "rest": data.draw(nestings(examples))}
    untouched = copy.deepcopy(batch)
    doubled = duplicate(batch, views)
    assert same(batch, untouched)
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    for leaf, many in zip(tensors, [x for x in leaves(doubled) if isinstance(x, Tensor)], strict=True):
        if leaf.dim() == 0:
            assert torch.equal(many, leaf)
        else:
            assert torch.equal(split(many, views, examples), torch.stack([leaf] * views))
    assert batch_size(doubled) == views * examples


def test_views_come_one_after_the_other():
    x, names = torch.tensor([1, 2, 3]), ["a", "b", "c"]
    assert same(duplicate([x, names], 2), [torch.tensor([1, 2, 3, 1, 2, 3]), ["a", "b", "c", "a", "b", "c"]])
    assert duplicate(x, 3).tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert split(torch.arange(6), 2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_size_that_is_given_is_not_asked_for_again(monkeypatch):
    batch = {"x": torch.tensor([1, 2]), "names": ["a", "b"]}
    expected = duplicate(batch, 2)
    monkeypatch.setattr(views_module, "batch_size", lambda batch: pytest.fail("asked"))
    assert same(duplicate(batch, 2, 2), expected)


def test_one_view_of_any_batch():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert duplicate(packed, 1) is packed
    assert same(duplicate({"x": torch.ones(2)}, 1), {"x": torch.ones(2)})


@pytest.mark.parametrize("views", [1, 2])
def test_views_share_no_memory_with_the_batch(views):
    batch = {"x": torch.ones(2), "scale": torch.tensor(1.0)}
    for _, tensor in tensors_of(duplicate(batch, views)):
        tensor.zero_()
    assert same(batch, {"x": torch.ones(2), "scale": torch.tensor(1.0)})


def test_splitting_copies_nothing():
    rows = torch.rand(6, 4)
    assert split(rows, 2, 3).data_ptr() == rows.data_ptr()


def test_no_value_is_read():
    x = torch.empty(3, 2, device="meta")  # has none
    assert split(duplicate({"x": x}, 2)["x"], 2, 3).shape == (2, 3, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def step(batch):
        doubled = duplicate(batch, 2)
        return split(doubled["x"] + doubled["deep"][0], 2, batch_size(batch))

    batch = {"x": torch.rand(3, 2), "deep": (torch.rand(3, 2), torch.tensor(1.0), None), "texts": ["a", "b", "c"]}
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=dynamic)
    assert torch.equal(compiled(batch), torch.stack([batch["x"] + batch["deep"][0]] * 2))


def test_flattened_tokens_stay_with_their_example():
    tokens = torch.arange(6).view(3, 2)  # three examples of two tokens
    flat = duplicate(tokens, 2).flatten()
    assert split(flat, 2, 3).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_containers_keep_their_type():
    x = torch.ones(2, 3)
    for batch in (
        collections.OrderedDict(x=x),
        collections.defaultdict(list, x=x),
        collections.UserDict(x=x),
        Pair(x, 2.0),
        Derived(x),
        Frozen(x),
        Slotted(x),
        Masked(x),
        torch.max(x, 1),
        (x, x),
        [x],
        Texts([x]),
    ):
        doubled = duplicate(batch, 3)
        assert type(doubled) is type(batch)
        assert batch_size(doubled) == 6
        assert batch_size(batch) == 2
    assert torch.equal(duplicate(Frozen(x), 2).derived, torch.full((4, 3), 2.0))
    assert duplicate(Masked(x), 2).mask.shape == (4, 3)
    assert torch.equal(duplicate(Derived(x), 2).more, torch.full((4, 3), 2.0))
    assert duplicate(collections.defaultdict(list, x=x), 2)["new"] == []


def test_hugging_face_containers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import BaseModelOutput

    encoding = transformers.BatchEncoding({"input_ids": torch.ones(2, 3)})
    encoded = duplicate(encoding, 2)
    assert encoding["input_ids"].shape == (2, 3)
    assert isinstance(encoded, transformers.BatchEncoding)
    assert encoded["input_ids"].shape == encoded.input_ids.shape == (4, 3)
    output = BaseModelOutput(last_hidden_state=torch.ones(2, 3), hidden_states=(torch.ones(2, 1),))
    states = duplicate(output, 2)
    assert output.last_hidden_state.shape == output["last_hidden_state"].shape == (2, 3)
    assert isinstance(states, BaseModelOutput)
    assert states.last_hidden_state.shape == states["last_hidden_state"].shape == (4, 3)
    assert states.hidden_states[0].shape == (4, 1)


def test_constants_and_lists_of_other_lengths_are_left():
    batch = {"x": torch.ones(3, 2), "classes": ["yes", "no"], "size": torch.Size([1, 2, 3]), "tags": ("a", "b", "c")}
    doubled = duplicate(batch, 2)
    assert doubled["classes"] == ["yes", "no"]
    assert doubled["size"] == torch.Size([1, 2, 3])
    assert doubled["tags"] == ("a", "b", "c", "a", "b", "c")
    assert duplicate({"x": torch.ones(2), "unit": Pair("metres", 2.0)}, 2)["unit"] == Pair("metres", 2.0)


def test_what_a_list_has_for_each_example_is_doubled_whatever_it_is():
    graphs = [Graph(), Graph()]
    one, two = {"id": torch.tensor(1), "words": ["a", "b"]}, {"id": torch.tensor(2), "words": ["c"]}
    doubled = duplicate({"x": torch.ones(2), "texts": Texts("ab"), "graphs": graphs, "meta": (one, two)}, 2)
    assert doubled["texts"] == ["a", "b", "a", "b"]
    assert type(doubled["texts"]) is Texts
    assert doubled["graphs"] == graphs * 2
    assert doubled["meta"] == (one, two, one, two)
    assert one["words"] == ["a", "b"]


def test_strings_as_default_collate_arranges_them():
    captions = default_collate([{"captions": [f"a{row}", f"b{row}"], "x": torch.ones(2)} for row in range(3)])
    assert captions["captions"] == [("a0", "a1", "a2"), ("b0", "b1", "b2")]
    assert duplicate(captions, 2)["captions"] == [("a0", "a1", "a2") * 2, ("b0", "b1", "b2") * 2]
    assert take(captions, [2, 0], 3)["captions"] == [("a2", "a0"), ("b2", "b0")]
    deeper = {"x": torch.ones(3), "deeper": [captions["captions"]]}
    assert duplicate(deeper, 2)["deeper"] == [duplicate(captions, 2)["captions"]]
    both = concatenate([captions, captions | {"captions": [("c", "d", "e"), ("f", "g", "h")]}], 3)
    assert both["captions"] == [("a0", "a1", "a2", "c", "d", "e"), ("b0", "b1", "b2", "f", "g", "h")]


def test_lists_of_other_lists_are_left():
    for constant in ([["a", "b"], ["c"]], [["a", "b", "c"], "d"], [[1, 2, 3], [4, 5, 6]], [[]], [1, 2]):
        assert duplicate({"x": torch.ones(3), "constant": constant}, 2)["constant"] == constant
    words = [["a"], ["b", "c"], ["d", "e", "f"]]  # of three examples
    assert duplicate({"x": torch.ones(3), "words": words}, 2)["words"] == words * 2
    assert duplicate({"x": torch.ones(2), "lengths": [5, 3]}, 2)["lengths"] == [5, 3, 5, 3]
    sizes = [[480, 640], [224, 224]]
    assert duplicate({"x": torch.ones(2), "sizes": sizes}, 2)["sizes"] == sizes * 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([("a", "b"), ("c", "d")], r"batch\['entry'\], a list.*contains 2 lists of 2 items, so it is unclear"),
        ([[("a", "b"), ("c", "d")]], r"batch\['entry'\]\[0\], a list.*contains 2 lists of 2 items"),
    ],
)
def test_what_may_be_examples_or_not_is_refused(entry, message):
    with pytest.raises(TypeError, match=message):
        duplicate({"x": torch.ones(2), "entry": entry}, 2)


def test_gradients_flow_back_to_every_view():
    x = torch.randn(3, 2, requires_grad=True)
    views = split(duplicate(x, 2), 2, 3)
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
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged), "NestedTensor"),
        (Graph(), "Graph"),
        (np.ones(2), "ndarray"),
        (Slotted, "type"),
        (types.MappingProxyType({"x": torch.ones(2)}), "mappingproxy"),  # no way to make one of its kind is known
        ([Graph()], "list"),
        ([Graph(), Graph(), Graph()], "list"),
        ((Graph(), "name", {"more": 1}), "tuple"),
    ],
    ids=[
        "packed",
        "sparse",
        "nested",
        "jagged",
        "graph",
        "numpy",
        "class",
        "mapping",
        "graph in a list",
        "graphs",
        "graph and name",
    ],
)
def test_what_cannot_be_doubled_is_refused_by_its_place(value, kind):
    with pytest.raises(
        TypeError, match=rf"batch\['deep'\]\[1\], a {kind}, cannot be duplicated.*tensor.*rdrop_passes=\"separate\""
    ):
        duplicate({"x": torch.ones(2), "deep": (torch.ones(2), value)}, 2)


def test_packed_sequences_are_no_examples():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    with pytest.raises(TypeError, match=r"batch\[1\]\[0\], a PackedSequence, cannot be duplicated"):
        duplicate([torch.ones(2), (packed, packed)], 2)


def test_tensors_of_different_sizes_are_refused_by_their_places():
    with pytest.raises(ValueError, match=r"batch\['x'\] has 4 rows and batch\['weight'\] has 3.*keep constants"):
        duplicate({"x": torch.ones(4, 2), "weight": torch.ones(3)}, 2)
    with pytest.raises(ValueError, match=r"batch\.x has 4 rows and batch\.y\[0\] has 3"):
        duplicate(Plain(torch.ones(4, 2), [torch.ones(3)]), 2)
    images = [torch.ones(3, 5, 5), torch.ones(1, 5, 5)]
    with pytest.raises(ValueError, match=r"batch\[0\] has 3 rows and batch\[1\] has 1.*separate"):
        duplicate(images, 2)


IMAGES = [torch.ones(3, 5, 5), torch.ones(3, 4, 6), torch.ones(3, 5, 5), torch.ones(3, 2, 2)]


@pytest.mark.parametrize("target", [torch.zeros(4), torch.zeros(4, 2), [{"boxes": torch.ones(2, 4)}] * 4])
def test_images_in_a_list_are_not_read_as_their_channels(target):
    message = r"cannot be duplicated: it has one tensor for each of 4 targets, such as an image \(3, 5, 5\).*"
    with pytest.raises(TypeError, match=f"batch, a list, {message}"):
        batch_size(IMAGES, target)
    with pytest.raises(TypeError, match=rf"batch\['x'\]\[0\], a tuple, {message}.*separate"):
        batch_size({"x": (tuple(IMAGES), None)}, target)


@pytest.mark.parametrize(
    ("batch", "target"),
    [
        (IMAGES, None),  # nothing tells
        ([torch.ones(3, 5, 5), torch.ones(3, 4)], torch.zeros(3)),  # two inputs of three examples
        ([torch.ones(3, 5), torch.ones(3)], (torch.zeros(3, 7), torch.zeros(3))),  # and tokens with their lengths
        ([torch.ones(3, 5)] * 3, torch.zeros(3)),  # either way three
        ({"x": torch.ones(3, 5), "y": torch.ones(3)}, torch.zeros(2)),  # no list
        ([torch.ones(3, 5), ["a", "b", "c"]], torch.zeros(2)),
        ([torch.ones(3)], torch.tensor(1.0)),
    ],
)
def test_lists_of_inputs_are_left_in_peace(batch, target):
    assert batch_size(batch, target) == 3


@pytest.mark.parametrize("batch", [{}, ["a", "b"], torch.tensor(1.0), None])
def test_a_batch_without_rows_is_refused(batch):
    with pytest.raises(ValueError, match="has rows"):
        batch_size(batch)


def test_an_empty_batch_has_no_views():
    assert batch_size(torch.ones(0, 3)) == 0
    with pytest.raises(ValueError, match=r"examples must be >= 1, got 0.*empty batch"):
        split(torch.ones(0, 3), 2, 0)


@pytest.mark.parametrize("shape", [(4, 3), (6, 3), ()])
def test_a_prediction_with_another_number_of_rows_is_refused(shape):
    rows = shape[0] if shape else 0
    with pytest.raises(ValueError, match=f"returned {rows} rows .* for 2 views of 4 examples, but must return 8"):
        split(torch.ones(shape), 2, 4)


def test_a_prediction_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"The prediction, a dict, contains no tensor.*\.logits.*rdrop_predict"):
        split({"logits": None}, 2, 2)


def test_the_views_of_a_nested_prediction():
    rows = torch.arange(12).view(4, 3)
    prediction = {"logits": rows, "more": (rows[:, 0], torch.tensor(7.0), "name"), "tokens": rows.repeat(2, 1)}
    both = split(prediction, 2, 2)
    assert both["logits"].tolist() == [rows[:2].tolist(), rows[2:].tolist()]
    assert both["more"][0].tolist() == [[0, 3], [6, 9]]
    assert both["more"][1:] == (torch.tensor(7.0), "name")
    assert both["tokens"].shape == (2, 4, 3)
    assert view(both, 1)["more"][0].tolist() == [6, 9]
    assert merge(both)["logits"].equal(rows)
    assert stack([view(both, 0), view(both, 1)])["tokens"].equal(both["tokens"])
    assert count(both) == 2


@pytest.mark.parametrize("views", [0, -1, 2.0, True])
def test_views_are_a_positive_int(views):
    for call in (lambda: duplicate(torch.ones(2), views), lambda: split(torch.ones(2), views, 1)):
        with pytest.raises(ValueError, match=f"views must be an int >= 1, got {views!r}"):
            call()


def test_a_prediction_without_positions_has_views_without_positions():
    """As a causal language model's for texts of one token, after which nothing comes."""
    assert split(torch.ones(6, 0, 5), 2, 3).shape == (2, 3, 0, 5)
