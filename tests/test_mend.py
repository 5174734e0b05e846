"""Mending: least squares at the cut, exact where it must be, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import randomised
from torch import nn

import taylored
from taylored import InputMoments, PlanError, PrunePlan, compact, make_plan, random_plan, restore, trace
from taylored._moments import measure

pytestmark = pytest.mark.filterwarnings("ignore:.*never used.*")


def conv_net(norm=True, bias=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1, bias=bias)]
    layers += [nn.BatchNorm2d(10)] if norm else []
    net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(10, 8, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    return randomised(net.double().eval(), torch.randn(4, 3, 9, 9, dtype=torch.float64))


def batches(count=8, size=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 9, 9, dtype=torch.float64, generator=generator) for _ in range(count)]


def make_dependent(conv, units, on, weights, shift):
    """Filters that are a linear function of others: no more can be learnt from them."""
    with torch.no_grad():
        conv.weight[units] = torch.einsum("uk,koxy->uoxy", weights, conv.weight[on])
        conv.bias[units] = weights @ conv.bias[on] + shift


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)])
def test_what_the_rest_can_say_loses_nothing(norm, bias):
    """Removed inputs that are a linear function of the kept ones, with a constant: it goes into the bias or the running mean."""
    torch.manual_seed(0)
    net = conv_net(norm, bias)
    net[1] = nn.Identity()  # a ReLU would make them depend in another way
    generator = torch.Generator().manual_seed(2)
    make_dependent(net[0], [3, 7, 8], [0, 1, 2], torch.randn(3, 3, dtype=torch.float64, generator=generator), 0.7)
    net[2].padding = (0, 0)  # at the border zeros are no linear function of zeros with a constant
    x = batches()
    graph = trace(net, x[0])
    name = graph.groups[0].name
    whole = copy.deepcopy(net)
    compact(net, PrunePlan.of(graph, {name: torch.tensor([3, 7, 8])}), mend=x, verify=x[0])
    fresh = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    expected = whole(fresh)
    assert (net(fresh) - expected).norm() / expected.norm() < 1e-6
    cut = copy.deepcopy(whole)
    compact(cut, PrunePlan.of(trace(cut, x[0]), {name: torch.tensor([3, 7, 8])}))
    assert (cut(fresh) - expected).norm() / expected.norm() > 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.8), st.booleans(), st.booleans())
def test_mended_outputs_are_those_of_least_squares(seed, ratio, norm, bias):
    """Every consumer, alone, against a plain ridge regression over the rows of its input."""
    net = conv_net(norm, bias)
    x = batches(4)
    graph = trace(net, x[0])
    plan = random_plan(graph, ratio, seed)
    measured = measure(net, graph, x)
    layer = graph.groups[-1].consumers[0]
    if (f"{layer}.weight", 1) not in plan.keep:
        return
    inputs = []
    handle = net.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for batch in x:
            net(batch)
    handle.remove()
    rows = torch.cat(inputs)
    rows = rows.movedim(1, -1).reshape(-1, rows.shape[1]) if rows.ndim == 4 else rows
    mean, covariance = measured.moments[layer].over()
    if measured.places[layer].shape[1] == 1:
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0))


def test_nothing_removed_changes_nothing_and_all_comes_back_bit_for_bit():
    net = conv_net()
    before = copy.deepcopy(net.state_dict())
    x = batches()
    graph = trace(net, x[0])
    compact(net, PrunePlan.of(graph, {}), mend=x)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    removed = compact(net, random_plan(graph, 0.5), mend=x, keep_removed=True)
    assert removed.mended
    restore(net, removed)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    trained = compact(net, random_plan(trace(net, x[0]), 0.5), mend=x, keep_removed=True)
    with torch.no_grad():
        net[2].weight += 1.0  # what was trained since stays
    restore(net, trained)
    kept = trained.plan.cuts["2.weight"]
    restored = net[2].weight.detach()
    for d, indices in kept.items():
        restored = restored.index_select(d, indices)
    original = before["2.weight"]
    for d, indices in kept.items():
        original = original.index_select(d, indices)
    torch.testing.assert_close(restored, original + 1.0)


def test_scaling_and_order_of_channels_change_nothing():
    x = batches()
    plain, scaled = conv_net(), conv_net()
    factors = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 0.1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # a ReLU passes positive factors on
        scaled[0].weight.copy_((scaled[0].weight * factors[:, None, None, None])[order])
        scaled[0].bias.copy_((scaled[0].bias * factors)[order])
        scaled[2].weight.copy_((scaled[2].weight / factors[:, None, None])[:, order])
    removed = torch.tensor([1, 4, 5, 9])
    for net, units in ((plain, removed), (scaled, torch.argsort(order)[removed])):
        graph = trace(net, x[0])
        compact(net, PrunePlan.of(graph, {graph.groups[0].name: units}), mend=x)
    fresh = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(scaled(fresh), plain(fresh))


def test_a_flattened_map_is_mended_by_units():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 49, 4)).double().eval()
    make_dependent(net[0], [2], [5], torch.tensor([[2.0]], dtype=torch.float64), 0.3)
    x = batches()
    graph = trace(net, x[0])
    expected = net(x[0])
    measured = measure(net, graph, x)
    assert measured.moments["2"].products.shape[1:] == (8, 8)
    compact(net, PrunePlan.of(graph, {graph.groups[0].name: torch.tensor([2])}), mend=measured)
    assert (net(x[0]) - expected).norm() / expected.norm() < 1e-6 and measured.residuals["2"] < 1e-6


def test_a_layer_called_twice_and_a_shared_weight_are_mended_for_all_that_they_take_in():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
            self.c.weight = self.b.weight

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + self.b(y.relu()) + self.c(y.tanh())

    torch.manual_seed(0)
    net = Twice().double()
    x = batches()
    graph = trace(net, x[0])
    measured = measure(net, graph, x)
    assert measured.moments["b"].rows.sum() == 2 * measured.moments["c"].rows.sum()
    plan = random_plan(graph, 0.5)
    with torch.no_grad():
        expected = torch.cat([net(b) for b in x])
        cut = copy.deepcopy(net)
        compact(cut, random_plan(trace(cut, x[0]), 0.5))
        compact(net, plan, mend=measured)
        error, without = (float((torch.cat([m(b) for b in x]) - expected).norm()) for m in (net, cut))
    assert net.b.weight is net.c.weight and error < without


def test_averages_optimizers_and_frozen_layers():
    net, x = conv_net(), batches()
    average = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters())
    net(x[0]).sum().backward()
    optimizer.step()
    net[2].weight.requires_grad_(False)
    graph, frozen = trace(net, x[0]), net[2].weight.detach().clone()
    plan = random_plan(graph, 0.5)
    state = optimizer.state[net[5].weight]["exp_avg"].clone()
    compact(net, plan, optimizer, also=average, mend=x)
    for d, indices in plan.cuts["2.weight"].items():
        frozen = frozen.index_select(d, indices)
    assert torch.equal(net[2].weight, frozen)
    for d, indices in plan.cuts["5.weight"].items():
        state = state.index_select(d, indices)
    assert torch.equal(optimizer.state[net[5].weight]["exp_avg"], state)
    # The average, which was the model, is mended as the model was but where that had moved on.
    assert (average[5].weight - net[5].weight).norm() / net[5].weight.norm() < 0.05


def test_what_cannot_be_mended_with_is_refused_before_anything_is_touched():
    net, x = conv_net(), batches()
    graph = trace(net, x[0])
    plan = random_plan(graph, 0.5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="give inputs alone"):
        compact(net, plan, mend=[(b, torch.zeros(6)) for b in x])
    with pytest.raises(ValueError, match="no batches"):
        compact(net, plan, mend=[])
    with pytest.raises(FloatingPointError, match="the input of '2' is not finite"):
        compact(net, plan, mend=[x[0] * float("nan")])
    with pytest.raises(ValueError, match="measured on another model"):
        compact(net, plan, mend=measure(other := conv_net(), trace(other, x[0]), x))
    with pytest.raises(RuntimeError, match="no forward pass"):
        compact(net, plan, mend=InputMoments(net, graph))
    import dataclasses

    with pytest.raises(PlanError, match="give the graph"):
        compact(net, dataclasses.replace(plan, graph=None), mend=x)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_few_vectors_constant_channels_and_half_precision():
    x = batches(1, 2)
    net = conv_net()
    with torch.no_grad():
        net[0].weight[4] = 0
    expected = net(x[0])
    compact(net, random_plan(trace(net, x[0]), 0.5), mend=x)
    assert net(x[0]).isfinite().all() and (net(x[0]) - expected).norm() < 2 * expected.norm()
    half = conv_net().to(torch.bfloat16)
    y = [b.to(torch.bfloat16) for b in batches()]
    compact(half, random_plan(trace(half, y[0]), 0.5), mend=y)
    assert half[2].weight.dtype == torch.bfloat16 and half(y[0]).isfinite().all()


def test_moments_of_two_are_those_of_all():
    from taylored._moments import Moments

    torch.manual_seed(0)
    x = torch.randn(12, 5, 3, dtype=torch.float64) + 100
    together, first, second = Moments(3), Moments(3), Moments(3)
    together.add(x)
    first.add(x[:4])
    second.add(x[4:] * 1.0)
    first += second
    for a, b in zip(together.over(), first.over(), strict=True):
        torch.testing.assert_close(a, b)


def test_recalibrated_statistics_are_those_of_the_batches():
    net, x = conv_net(), batches()
    norm = net[3]
    before = norm.running_var.clone()
    seen = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    taylored.recalibrate(net, x)
    handle.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0))
    after = norm.running_var.clone()
    torch.testing.assert_close(after, torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0))
    norm.running_var.copy_(before)
    taylored.recalibrate(net, x, share=0.25)
    torch.testing.assert_close(norm.running_var, before.lerp(after, 0.25))
    state = copy.deepcopy(net.state_dict())
    for wrong in ([], [torch.randn(2, 4, 9, 9, dtype=torch.float64)]):
        with pytest.raises((ValueError, RuntimeError)):
            taylored.recalibrate(net, wrong)
        assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items()) and norm.momentum == 0.1


def test_plans_by_score_per_flop():
    net, x = conv_net(), batches()
    graph = trace(net, x[0])
    scores = {g.name: torch.ones(g.units) for g in graph.groups}
    plan = make_plan(graph, scores, remove_units=1, per_flop=True)
    saved = {g.name: graph.flops - graph.after({g.name: torch.tensor([0])}).flops for g in graph.groups}
    assert list(plan.removed) == [max(saved, key=saved.get)]
