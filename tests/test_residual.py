"""The residual criterion against brute force, in float64, and what `shrink` makes of it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mend import batches, conv_net, make_dependent
from torch import nn
from torch.nn import functional as F

import taylored
from taylored import PlanError, ResidualScorer, make_plan, shrink, trace
from taylored._modules import still
from taylored._residual import Consumer, ascending, greedy, hull_slopes


def loss_of(covariance, weights, gone):
    """What is lost when these channels go and the rest predict them: tr(Q E), with E the Schur complement."""
    kept = [i for i in range(len(covariance)) if i not in gone]
    error = covariance[np.ix_(gone, gone)]
    if kept:
        known = covariance[np.ix_(kept, kept)]
        error = error - covariance[np.ix_(gone, kept)] @ np.linalg.solve(known, covariance[np.ix_(kept, gone)])
    return float(np.trace(weights[np.ix_(gone, gone)] @ error))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 45), st.sampled_from([1, 2]), st.integers(1, 2))
def test_curves_are_those_of_a_greedy_choice_that_refits_at_each_step(seed, units, places, consumers):
    """Also past the number of downdates that are kept aside, and with several consumers."""
    rng = np.random.default_rng(seed)
    problems = []
    for _ in range(consumers):
        width = units * places
        a, b = rng.normal(size=(width, 2 * width)), rng.normal(size=(5, width))
        problems.append((a @ a.T / width, b.T @ b, rng.permutation(width).reshape(units, places)))
    order, costs = greedy([Consumer(np.linalg.inv(c), q, slots) for c, q, slots in problems])
    gone: list[int] = []
    before = 0.0
    for unit, cost in zip(order, costs, strict=True):
        left = [u for u in range(units) if u not in gone]
        after = {u: sum(loss_of(c, q, slots[[*gone, u]].flatten().tolist()) for c, q, slots in problems) for u in left}
        assert after[unit] <= min(after.values()) * (1 + 1e-6)
        assert cost == pytest.approx(after[unit] - before, rel=1e-5, abs=1e-8 * after[unit])
        gone.append(int(unit))
        before = after[unit]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_slopes_of_the_hull(costs):
    slopes = hull_slopes(np.array(costs))
    total, hull = np.cumsum(costs), np.cumsum(slopes)
    assert (np.diff(slopes) >= -1e-9).all() and (hull <= total + 1e-6).all()
    assert hull[-1] == pytest.approx(total[-1])
    assert (np.diff(ascending(slopes)) > 0).all()


def measured(net, x, loss_reduction="mean"):
    graph = trace(net, x[0])
    with still(net), ResidualScorer(net, graph, loss_reduction=loss_reduction) as scorer:
        for number, batch in enumerate(x):
            target = torch.randint(0, 5, (len(batch),), generator=torch.Generator().manual_seed(number))
            F.cross_entropy(net(batch), target, reduction=loss_reduction).backward()
    return graph, scorer


def test_scores_are_losses_whatever_the_reduction_and_the_model_is_as_it_was():
    net, x = conv_net(), batches()
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    graph, mean = measured(net, x)
    _, total = measured(net, x, "sum")
    for group in graph.groups:
        torch.testing.assert_close(mean.scores()[group.name], total.scores()[group.name])
        assert (mean.scores()[group.name] > 0).all()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert flags == [m.training for m in net.modules()] and not any(
        m._forward_hooks or m._forward_pre_hooks for m in net.modules()
    )


def test_the_fisher_information_is_that_of_the_outputs():
    net, x = conv_net(), batches(2)
    _, scorer = measured(net, x, "sum")
    expected = torch.zeros(10, 10, dtype=torch.float64)
    for number, batch in enumerate(x):
        target = torch.randint(0, 5, (len(batch),), generator=torch.Generator().manual_seed(number))
        y = net[:3](batch).detach().requires_grad_()
        F.cross_entropy(net[3:](y), target, reduction="sum").backward()
        g = y.grad.transpose(0, 1).flatten(1)
        expected += g @ g.T
    torch.testing.assert_close(scorer.fisher["2"], expected)


def test_units_that_the_others_can_say_go_first():
    net, x = conv_net(), batches()
    net[1] = nn.Identity()
    generator = torch.Generator().manual_seed(2)
    make_dependent(net[0], [3, 7], [0, 1, 2], 5 * torch.randn(2, 3, dtype=torch.float64, generator=generator), 0.1)
    graph, scorer = measured(net, x)
    first = graph.groups[0]
    lowest = scorer.scores()[first.name].argsort()[:2]
    assert set(lowest.tolist()) <= {0, 1, 2, 3, 7}  # any two of the five that hang together
    assert float(scorer.scores()[first.name][lowest].max()) < 1e-3 * float(scorer.scores()[first.name].median())


def test_scores_follow_the_order_and_ignore_the_scale_of_channels():
    x = batches()
    plain, scaled = conv_net(), conv_net()
    factors = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 0.1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scaled[0].weight.copy_((scaled[0].weight * factors[:, None, None, None])[order])
        scaled[0].bias.copy_((scaled[0].bias * factors)[order])
        scaled[2].weight.copy_((scaled[2].weight / factors[:, None, None])[:, order])
    (graph, a), (_, b) = measured(plain, x), measured(scaled, x)
    name = graph.groups[0].name
    torch.testing.assert_close(a.scores()[name][order], b.scores()[name], rtol=1e-6, atol=0)


def test_groups_that_nothing_is_known_of_are_left_out_and_misuse_is_told():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 1), nn.LSTM(8, 4)

        def forward(self, x):
            return self.b(self.a(x)).mean((2, 3)), self.d(self.c(x).flatten(2).permute(2, 0, 1))[0]

    torch.manual_seed(0)
    net = Two().double()
    x = batches(2)
    graph = trace(net, x[0])
    with ResidualScorer(net, graph) as scorer:
        sum(y.square().sum() for y in net(x[0])).backward()
        with pytest.raises(RuntimeError, match="already active"):
            scorer.__enter__()
    assert set(scorer.scores()) == {"a"}
    with pytest.raises(ValueError, match="loss_reduction"):
        ResidualScorer(net, graph, loss_reduction="none")
    with pytest.raises(RuntimeError, match="no forward pass"):
        ResidualScorer(net, graph).scores()
    with ResidualScorer(net, graph) as scorer, torch.no_grad():
        net(x[0])
    with pytest.raises(RuntimeError, match="no backward pass"):
        scorer.scores()
    with ResidualScorer(net, graph) as scorer:
        (net(x[0])[0].sum() * float("nan")).backward()
    with pytest.raises(FloatingPointError, match="gradient at the output of 'b'"):
        scorer.scores()


def test_shrinking_beats_cutting_and_keeps_its_word():
    net, x = conv_net(), batches(12)
    whole, average, told = copy.deepcopy(net), copy.deepcopy(net), []
    plan = shrink(net, x, 0.6, 2, 2, also=average, log=told.append, progress=False)
    graph = trace(net, x[0])
    assert plan.flops[1] * 1.5 == graph.flops <= 0.6 * plan.flops[0] * 1.5  # four of six examples
    assert [entry["round"] for entry in told] == [1, 2] and all(0 <= r < 1.5 for e in told for r in e["residuals"].values())
    cut = copy.deepcopy(whole)
    taylored.compact(cut, make_plan(g := trace(cut, x[0]), taylored.criteria.weight_l2(cut, g, [], None), target_flops=0.6))
    fresh = torch.randn(20, 3, 9, 9, dtype=torch.float64)
    expected = whole(fresh)
    assert (net(fresh) - expected).norm() < (cut(fresh) - expected).norm()
    assert net.state_dict().keys() == whole.state_dict().keys()
    assert all(a.shape == b.shape for a, b in zip(net.state_dict().values(), average.state_dict().values(), strict=True))
    torch.testing.assert_close(shrunk_again(whole, x)(fresh), net(fresh))


def shrunk_again(whole, x):
    net = copy.deepcopy(whole)
    for p in net.parameters():
        p.requires_grad_(False)  # a model for inference is mended all the same
    shrink(net, x, 0.6, 2, 2, progress=False)
    return net


def test_a_single_example_promises_little_and_breaks_nothing():
    net, x = conv_net(), [batches(1, 1)[0].float()]
    plan = shrink(net.float(), x, 0.7, 1, 1, progress=False)
    assert plan.flops[1] <= 0.7 * plan.flops[0] and net(x[0]).isfinite().all()


def test_shrinking_other_outputs_and_refusals():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()[:5]

        def forward(self, x):
            return {"maps": [self.net(x)], "other": x.shape[0]}

    net, x = Maps(), batches(4)
    plan = shrink(net, x, 0.8, 1, 1, progress=False)
    assert plan.flops[1] <= 0.8 * plan.flops[0]
    net = conv_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TypeError, match="more than once"):
        shrink(net, iter(x))
    with pytest.raises(ValueError, match="empty"):
        shrink(net, [])
    with pytest.raises(ValueError, match="rounds"):
        shrink(net, x, rounds=0)
    with pytest.raises(PlanError, match="cannot be met"):
        shrink(net, x, 0.001)
    with pytest.raises(ValueError, match="give inputs alone"):
        shrink(net, [(b, torch.zeros(6)) for b in x])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
