"""The proof obligations hold on random nets, whatever they are put together from (hypothesis; `-m slow` for thousands)."""

import copy
import traceback

import pytest
import torch
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from models import snapshot, unchanged
from random_nets import random_nets, random_trunks
from torch.nn.functional import cross_entropy

import taylored
from taylored._masking import zeroed

OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


def run(model, x):
    return model(x).flatten(1)


def loss_of(output, targets=None):
    return cross_entropy(output.flatten(1), torch.arange(len(output)) % 5 if targets is None else targets)


def images(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(a, b, size, tolerance=1e-9):
    assert a.shape == b.shape and bool(((a - b).abs() <= tolerance * size).all()), float((a - b).abs().max() / size)


def check_all(net, ratio, number):
    """Removal is zeroing, the score is a derivative, training goes on."""
    x = images(4)
    graph = taylored.trace(net, x[:1])
    event(f"units: {'none' if not graph.units else 'bundled' if graph.bundles else 'some'}")
    plan = taylored.random_plan(graph, ratio, number)
    check_score(net, graph, x)

    # One step as it is, so that there are momenta; one with the units gone, by zeros and for real.
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    step(net, optimizer, x)
    small, zeroed = copy.deepcopy((net, optimizer)), (net, optimizer)
    before = snapshot(small[0])
    try:
        taylored.compact(small[0], plan, optimizer=small[1])
    except taylored.TraceError as error:
        # A shuffle of so many groups, where each group is one unit: its number of groups is a number of channels.
        assert "in shuffle" in traceback_of(error) and unchanged(before, small[0])
        event("refused: a hard-coded count")
        return
    assert taylored.trace(small[0], x[:1]).flops == plan.flops[1]
    assert sum(p.numel() for p in small[0].parameters()) == plan.params[1]
    with taylored.masked(net, graph, plan), torch.no_grad():
        expected, found = (run(model.eval(), x) for model in (net, small[0]))
    equal(found, expected, expected.abs().max())
    with taylored.masked(net, graph, plan):
        step(zeroed[0].train(), zeroed[1], x)
    step(small[0].train(), small[1], x)
    for (name, p), q in zip(net.named_parameters(), small[0].parameters(), strict=True):
        for (_, d), kept in ((key, kept) for key, kept in plan.keep.items() if key[0] == name):
            p = p.index_select(d, kept)
        equal(q, p, p.abs().max() + 1)


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model(x)).backward()
    optimizer.step()


def check_score(net, graph, x):
    """Of every unit, by autograd: the derivative of each example's loss in a gate on the unit at all its consumers."""
    gates = {g.name: torch.ones(len(x), g.units, dtype=x.dtype, requires_grad=True) for g in graph.groups}
    if not gates:
        return
    handles = []
    for consumer in {name for g in graph.groups for name in g.inputs}:
        layer = graph.layers[consumer]

        def gate(_module, args, consumer=consumer, layer=layer):
            y = args[0]
            scale = torch.ones(len(y), len(layer.inputs), dtype=y.dtype)
            for g in graph.groups:
                if consumer in g.inputs:
                    slots = g.inputs[consumer]
                    values = gates[g.name][:, :, None].expand(-1, -1, slots.shape[1]).flatten(1)
                    scale = scale.index_copy(1, slots.flatten(), values)
            return (y * scale.reshape([len(y), *(-1 if d == layer.axis % y.ndim else 1 for d in range(1, y.ndim))]),)

        handles.append(net.get_submodule(consumer).register_forward_pre_hook(gate))
    loss = loss_of(net(x))
    derivatives = torch.autograd.grad(loss, list(gates.values()), allow_unused=True) if loss.requires_grad else []
    for handle in handles:
        handle.remove()
    if all(t is None for t in derivatives):
        return  # no unit is on the way to the output
    with taylored.TaylorScorer(net, graph) as scorer:
        loss_of(net(x)).backward()
    scores = scorer.scores()
    net.zero_grad()
    for group, t in zip(graph.groups, derivatives, strict=True):
        if group.name in scores:
            t = torch.zeros(1) if t is None else t
            expected = (t * len(x)).abs().mean(0) / group.positions
            equal(scores[group.name], expected, expected.max() + 1e-6)


def check_oracle(net, number):
    x = images(3, seed=1).float()
    net = net.float()
    graph = taylored.trace(net, x[:1])
    units = {g.name: [number % g.units] for g in graph.groups}
    batches = [(x, torch.arange(len(x)) % 5)]
    found = taylored.oracle(net, graph, batches, loss_of, mode="loss", units=units, progress=False)
    with torch.no_grad():
        base = float(loss_of(net(x)))
    for group in graph.groups:
        unit = {group.name: torch.tensor(units[group.name])}
        losses = [zeroed_loss(net, graph, unit, x)]
        if group.name not in graph.bundled:  # which goes by itself
            taylored.compact(small := copy.deepcopy(net), taylored.PrunePlan.of(graph, unit))
            losses.append(float(loss_of(small(x)).detach()))
        for loss in losses:
            assert float(found[group.name][units[group.name]]) == pytest.approx(loss - base, abs=2e-5 * max(loss, base, 1))


@torch.no_grad()
def zeroed_loss(net, graph, units, x):
    with zeroed(net, graph, units):
        return float(loss_of(net(x)))


def traceback_of(error):
    return "".join(traceback.format_exception(error))


RATIOS = st.sampled_from([0.3, 0.5, 0.99])


@settings(max_examples=100, derandomize=True, **OPTIONS)
@given(random_nets(), RATIOS, st.integers(0, 9))
def test_the_proof_obligations_hold(net, ratio, number):
    check_all(net, ratio, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_the_proof_obligations_hold_on_thousands(part):
    @seed(part)
    @settings(max_examples=300, database=None, **OPTIONS)
    @given(random_nets(), RATIOS, st.integers(0, 9))
    def check(net, ratio, number):
        check_all(net, ratio, number)

    check()


@settings(max_examples=40, derandomize=True, **OPTIONS)
@given(random_trunks(), RATIOS, st.integers(0, 9))
def test_the_proof_obligations_hold_where_channels_are_dealt_out(net, ratio, number):
    check_all(net, ratio, number)


@pytest.mark.slow
@settings(max_examples=1000, **OPTIONS)
@given(random_trunks(), RATIOS, st.integers(0, 9))
def test_the_proof_obligations_hold_where_channels_are_dealt_out_a_thousand_times(net, ratio, number):
    check_all(net, ratio, number)


@settings(max_examples=6, derandomize=True, **OPTIONS)
@given(random_nets(), st.integers(0, 9))
def test_the_oracle_is_exact(net, number):
    check_oracle(net, number)


@pytest.mark.slow
@settings(max_examples=500, **OPTIONS)
@given(random_nets(), st.integers(0, 9))
def test_the_oracle_is_exact_on_many(net, number):
    check_oracle(net, number)
