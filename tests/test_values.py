"""A graph is a value: equal graphs are equal wherever they come from, a file or a pickle, and plans made of them are the same."""

import copy
import json
import pickle

import models as nets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from taylored import ChannelGraph, PlanError, PrunePlan, compact, make_plan, masked, random_plan, trace
from taylored._graph.components import _interchangeable
from taylored._values import decode, encode, same


class LooksAtData(nn.Module):
    """Takes a branch that depends on what its input holds: it is traced with values."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x, names=("a", None, 0.5)):
        y = self.first(x).relu()
        return self.second(y if float(x.abs().max()) > 0 else -y)


def looking():
    return LooksAtData().eval(), {"x": torch.randn(2, 3, 8, 8), "names": ("b", None, 2.0)}


def cases():
    for name in ("chain", "residual", "depthwise", "concatenation", "dealt"):
        yield name, lambda name=name: (nets.small(name), nets.inputs())
    yield "data", looking
    yield "resnet18", lambda: (models.resnet18().eval(), torch.randn(1, 3, 32, 32))


@pytest.fixture(params=cases(), ids=lambda case: case[0])
def traced(request):
    model, inputs = request.param[1]()
    return model, trace(model, inputs)


def travelled(graph, tmp_path):
    graph.save(tmp_path / "graph.safetensors")
    return [pickle.loads(pickle.dumps(graph)), ChannelGraph.load(tmp_path / "graph.safetensors")]


def test_a_graph_that_was_away_is_equal_and_says_the_same(traced, tmp_path):
    model, graph = traced
    for there in travelled(graph, tmp_path):
        assert there == graph and hash(there) == hash(graph) and there is not graph
        assert (repr(there), there.explain(), there.flops, there.params) == (
            repr(graph),
            graph.explain(),
            graph.flops,
            graph.params,
        )
        assert there.source() is None and graph.source() is model


def test_plans_of_a_graph_that_was_away_are_the_same_with_its_model(traced, tmp_path):
    model, graph = traced
    scores = {g.name: torch.rand(g.units) for g in graph.groups}
    for there in travelled(graph, tmp_path):
        for make in (lambda g, **m: random_plan(g, 0.5, **m), lambda g, **m: make_plan(g, scores, target_flops=0.8, **m)):
            plan = make(there, model=model)
            assert plan == make(graph) and plan.rehearsed
            assert PrunePlan.of(there, plan.removed, model=model) == plan
    x = (
        torch.randn(2, 3, 32, 32)
        if isinstance(model, models.ResNet)
        else nets.inputs()
        if not isinstance(model, LooksAtData)
        else looking()[1]["x"]
    )
    with masked(model, there, plan):
        expected = model(x)
    compact(model, plan)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_without_its_model_a_graph_plans_what_needs_none_and_asks_for_the_rest(tmp_path):
    graph = trace(model := nets.small("residual"), nets.inputs())
    (there, _) = travelled(graph, tmp_path)
    plan = random_plan(there, 0.5)
    assert plan == random_plan(graph, 0.5) and not plan.rehearsed
    scores = {g.name: torch.rand(g.units) for g in graph.groups}
    with pytest.raises(PlanError, match="give model="):
        make_plan(there, scores, target_flops=0.9, ignore=[model.stem])
    assert make_plan(there, scores, target_flops=0.9, ignore=[model.stem], model=model) == make_plan(
        graph, scores, target_flops=0.9, ignore="stem"
    )


def test_graphs_of_other_models_are_other_values():
    graphs = [trace(nets.small(name), nets.inputs()) for name in ("chain", "residual", "chain")]
    assert graphs[0] == graphs[2] and graphs[0] != graphs[1] and graphs[0] != "chain"
    assert graphs[0].groups[0] == graphs[2].groups[0] != graphs[0].groups[1]
    assert copy.deepcopy(graphs[0]) == graphs[0]
    plan = random_plan(graphs[0], 0.5)
    assert graphs[0].after(plan.removed) != graphs[0]


def test_asking_changes_nothing_and_remembers_no_more_than_so_much():
    graph = trace(nets.small("dealt"), nets.inputs())
    before = pickle.dumps(graph)
    for ratio in np.linspace(0.1, 0.9, 9):
        random_plan(graph, float(ratio))
    assert pickle.dumps(graph) == before and len(graph.rehearser._narrower) <= graph.rehearser.MOST


@pytest.mark.parametrize("damage", ["cut", "flipped", "another", "none", "text"])
def test_a_file_that_is_no_graph_is_refused(tmp_path, damage):
    path, graph = tmp_path / "graph", trace(nets.small("chain"), nets.inputs())
    graph.save(path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-5] ^= 1
    elif damage == "another":
        data = bytearray(data.replace(b"taylored-graph-1", b"taylored-graph-9"))
    elif damage == "text":
        data = bytearray(b"nothing")
    path.write_bytes(data)
    if damage == "none":
        path.unlink()
    with pytest.raises(FileNotFoundError if damage == "none" else ValueError):
        ChannelGraph.load(path)


def test_a_file_names_no_class_that_may_not_be_there():
    for code in (["os.system", "x"], ["Popen"], {"dict": 1}, ["meta", [1], [1], "load"], ["dtype", "nn"]):
        with pytest.raises(ValueError):
            decode(code, {}, ())


def test_example_inputs_that_are_no_data_cannot_be_saved(tmp_path):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, f):
            return f(self.conv(x))

    graph = trace(Takes(), (torch.randn(1, 3, 8, 8), torch.relu))
    with pytest.raises(ValueError, match="cannot be saved"):
        graph.save(tmp_path / "g")
    assert not list(tmp_path.iterdir())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from([torch.float32, torch.int8]) | st.builds(lambda n: torch.arange(n), st.integers(0, 5))
    | st.builds(lambda n: np.arange(n), st.integers(0, 5)) | st.builds(lambda n: torch.empty(n, 2, device="meta"), st.integers(0, 3)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3) | st.integers() | st.tuples(st.text(max_size=2), st.integers()), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
@settings(deadline=None, max_examples=200)
def test_what_is_encoded_comes_back(value):
    code, tensors = encode(value)
    assert same(decode(json.loads(json.dumps(code)), tensors, ()), value)


@given(st.lists(st.lists(st.integers(-1, 5), max_size=12), max_size=5))
@settings(deadline=None)
def test_units_are_interchangeable_if_they_have_as_many_indices_of_every_dimension(dimensions):
    arrays = [np.array(d, dtype=np.int64) for d in dimensions]
    first, group_of = _interchangeable(6, arrays)
    signatures = [tuple(int((a == unit).sum()) for a in arrays) for unit in range(6)]
    for a in range(6):
        assert first[group_of[a]] <= a and signatures[first[group_of[a]]] == signatures[a]
        assert all((signatures[a] == signatures[b]) == (group_of[a] == group_of[b]) for b in range(6))
