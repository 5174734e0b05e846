"""Every criterion equals a plain reference in float64, and agreement with the oracle is what SciPy says it is."""

import copy
import functools
import math

import models as nets
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy

from taylored import criteria, spearman, trace
from taylored.criteria import CRITERIA

NAMES = ["chain", "residual", "depthwise"]
ALONE = sorted(CRITERIA.keys() - {"oracle-abs", "oracle-loss"})  # those have tests of their own
FILTERS = {  # the layers whose filters a unit owns, read off the models by eye
    "chain": {"first": ["first"], "second": ["second"]},
    "residual": {"stem": ["stem", "outer", "branch"], "inner": ["inner"]},
    "depthwise": {"stem": ["stem", "project"], "expand": ["expand", "depthwise", "excite"], "squeeze": ["squeeze"]},
}
CONSUMERS = {
    "chain": {"first": ["second"], "second": ["head"]},
    "residual": {"stem": ["inner", "branch", "head"], "inner": ["outer"]},
    "depthwise": {"stem": ["expand", "head"], "expand": ["squeeze", "project"], "squeeze": ["excite"]},
}


def setting(name, dtype=torch.float32, relu=False):
    """A model, its graph, and two batches of 4 and 3 examples."""
    model = nets.small(name, dtype=dtype)
    if relu:
        model.forward = functools.partial(rectified, model)
    x, y = nets.inputs(7, dtype=dtype), torch.tensor([0, 3, 1, 1, 4, 2, 0])
    return model, trace(model, x), [(x[:4], y[:4]), (x[4:], y[4:])]


def rectified(model, x):
    """The chain with ReLU in the place of tanh: piecewise linear, with true zeros."""
    x = model.norm(model.first(x)).relu()
    return model.head(model.second(x).relu().flatten(1))


def maps(model, batches):
    """Consumer -> what it is given, float64 [N, channels, positions]."""
    caught = {}
    model = copy.deepcopy(model).double()
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: caught.setdefault(name, []).append(args[0]))
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        for x, _ in batches:
            model(x.double())
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.unsqueeze(-1).flatten(2) for x in found]) for name, found in caught.items()}


def elements(model, name, group, batches):
    """[N, units, all of a unit's elements at all its consumers]."""
    found = maps(model, batches)
    parts = [found[c].reshape(7, group.units, -1) for c in CONSUMERS[name][group.name]]
    return torch.cat(parts, 2)


def filters(model, name, group):
    """[units, weights], every unit's filters end to end."""
    layers = [model.get_submodule(n) for n in FILTERS[name][group.name]]
    return torch.cat([layer.weight.detach().double().flatten(1) for layer in layers], 1)


def close(found, expected, rtol=1e-5, atol=1e-7):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == torch.float64 and values.device.type == "cpu" and values.ndim == 1
        torch.testing.assert_close(values, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_the_groups_are_those_of_the_references(name):
    _, graph, _ = setting(name)
    assert {g.name: sorted(g.layers) for g in graph.groups} == {k: sorted(v) for k, v in FILTERS[name].items()}
    assert {g.name: sorted(g.inputs) for g in graph.groups} == {k: sorted(v) for k, v in CONSUMERS[name].items()}


@pytest.mark.parametrize("criterion", ALONE)
@pytest.mark.parametrize("name", [*NAMES, "concatenation", "flatten", "twice"])
def test_every_criterion_scores_every_group_and_leaves_the_model_as_it_was(criterion, name):
    model, graph, batches = setting(name)
    model.train()
    next(iter(model.children())).eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = nets.snapshot(model)
    with torch.no_grad():  # whatever the caller's mode
        scores = CRITERIA[criterion](model, graph, batches, cross_entropy)
    expected = {g.name: g.units for g in graph.groups}
    if criterion == "batch-norm-scale":
        normed = {"chain": {"first"}, "residual": {"stem"}, "depthwise": {"expand"}, "concatenation": {"stem", "left", "right"}}
        expected = {n: u for n, u in expected.items() if n in normed.get(name, set())}
    assert {n: len(s) for n, s in scores.items()} == expected
    assert all(s.isfinite().all() and (s >= 0).all() for s in scores.values())
    assert nets.unchanged(before, model)
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1])) and all(p.grad is None for p in parameters[2:])


@pytest.mark.parametrize("criterion", ["taylor", "obd", "apoz", "mutual-information"])
def test_the_model_is_restored_when_the_data_fail(criterion):
    model, graph, batches = setting("chain")

    def torn():
        yield batches[0]
        raise OSError("torn")

    before = nets.snapshot(model.train())
    with pytest.raises(OSError, match="torn"):
        CRITERIA[criterion](model, graph, torn(), cross_entropy)
    assert nets.unchanged(before, model)


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_standard_deviation_are_of_all_elements(name):
    model, graph, batches = setting(name)
    pooled = {g.name: elements(model, name, g, batches).movedim(1, 0).flatten(1) for g in graph.groups}  # [units, all]
    close(criteria.activation_mean(model, graph, batches, None), {n: p.mean(1).abs() for n, p in pooled.items()}, atol=1e-6)
    close(criteria.activation_std(model, graph, batches, None), {n: p.std(1, correction=0) for n, p in pooled.items()})


def test_apoz_counts_zeros():
    model, graph, batches = setting("chain", relu=True)
    model.second.weight.data[2], model.second.bias.data[2] = 0, -1  # a dead unit
    pooled = {g.name: elements(model, "chain", g, batches).movedim(1, 0).flatten(1) for g in graph.groups}
    expected = {n: 1 - (p == 0).double().mean(1) for n, p in pooled.items()}
    assert 0 < expected["first"].min() and expected["first"].max() < 1 and expected["second"][2] == 0
    close(criteria.apoz(model, graph, batches, None), expected)


@pytest.mark.parametrize("name", NAMES)
def test_mutual_information_equals_its_sum_over_cells(name):
    model, graph, batches = setting(name)
    y = torch.cat([t for _, t in batches]).tolist()
    expected = {}
    for group in graph.groups:
        means = elements(model, name, group, batches).mean(2)  # [N, units]
        gains = []
        for values in means.T.tolist():
            edges = [sorted(values)[k * 7 // criteria.BINS] for k in range(1, criteria.BINS)]
            bins = [sum(v >= e for e in edges) for v in values]
            pairs = list(zip(bins, y, strict=True))
            gains.append(
                sum(
                    pairs.count((b, c)) / 7 * math.log(pairs.count((b, c)) * 7 / (bins.count(b) * y.count(c)))
                    for b, c in set(pairs)
                )
            )
        expected[group.name] = torch.tensor(gains, dtype=torch.float64)
    close(criteria.mutual_information(model.double(), graph, [(x.double(), t) for x, t in batches], None), expected)


def test_a_constant_unit_knows_nothing_and_a_copy_of_the_label_everything():
    class Tell(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv2d(1, 2, 1), nn.Linear(2, 4)

        def forward(self, x):
            return self.head(self.first(x).mean((2, 3)))

    model = Tell().eval()
    model.first.weight.data[:], model.first.bias.data[:] = torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1), 0.0
    y = torch.arange(400) % 4
    x = y.float().reshape(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    ((_, found),) = criteria.mutual_information(model, trace(model, x), [(x, y)], cross_entropy).items()
    torch.testing.assert_close(found, torch.tensor([math.log(4), 0.0], dtype=torch.float64))


def test_mutual_information_asks_for_labels():
    model, graph, batches = setting("chain")
    with pytest.raises(ValueError, match="class labels"):
        criteria.mutual_information(model, graph, [(x, x) for x, _ in batches], None)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_all_producing_filters(name):
    model, graph, _ = setting(name)
    found = {g.name: filters(model, name, g) for g in graph.groups}
    none = ((), None)
    close(criteria.weight_l1(model, graph, *none), {n: w.abs().sum(1) for n, w in found.items()})
    close(criteria.weight_l2(model, graph, *none), {n: (w**2).sum(1) ** 0.5 for n, w in found.items()})
    close(criteria.weight_mean_square(model, graph, *none), {n: (w**2).mean(1) for n, w in found.items()})
    distances = {n: torch.tensor([[float((a - b).norm()) for a in w] for b in w]).sum(1) for n, w in found.items()}
    close(criteria.geometric_median(model, graph, *none), {n: d.double() for n, d in distances.items()})
    squares = {n: (w**2).sum(1) for n, w in found.items()}
    close(criteria.lamp(model, graph, *none), {n: torch.stack([s / e[e >= s].sum() for s in e]) for n, e in squares.items()})


def test_filters_of_a_transposed_convolution_are_found():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.head(self.up(x).tanh()).mean((2, 3))

    model = Up()
    graph = trace(model, nets.inputs())
    w = model.up.weight.detach().double()  # [in, out, h, w]
    close(criteria.weight_l1(model, graph, (), None), {"up": w.abs().sum((0, 2, 3))})


def test_batch_norm_scale_is_the_mean_of_absolute_gammas():
    model, graph, _ = setting("depthwise")
    model.norm.weight.data[3] *= -1
    close(criteria.batch_norm_scale(model, graph, (), None), {"expand": model.norm.weight.detach().double().abs()})
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten()).eval()
    nn.init.normal_(model[1].weight), nn.init.normal_(model[2].weight)
    found = criteria.batch_norm_scale(model, trace(model, nets.inputs()), (), None)
    close(found, {"0": (model[1].weight.detach().double().abs() + model[2].weight.detach().double().abs()) / 2})


def test_random_follows_the_seed():
    model, graph, _ = setting("chain")
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(criteria.random(model, graph, (), None)["first"])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# -- gradients ---------------------------------------------------------------------------------------------------------


def gates(model, graph, x):
    """(function from all the units' gates [units] to one example's outputs, number of units): float64, by plain hooks."""
    total = graph.units
    starts = dict(zip([g.name for g in graph.groups], [0, *torch.tensor([g.units for g in graph.groups]).cumsum(0)]))

    def outputs(gate):
        scales = {}
        for group in graph.groups:
            for consumer, slots in group.inputs.items():
                mine = gate[starts[group.name] : starts[group.name] + group.units]
                scale = scales.get(consumer, gate.new_ones(len(graph.layers[consumer].inputs)))
                scales[consumer] = scale.index_put((slots,), mine[:, None].expand(slots.shape))
        handles = [
            model.get_submodule(c).register_forward_pre_hook(
                lambda _, args, s=s: (args[0] * s.reshape([-1 if d == 1 else 1 for d in range(args[0].ndim)]),)
            )
            for c, s in scales.items()
        ]
        try:
            return model(x)[0]
        finally:
            for handle in handles:
                handle.remove()

    return outputs, torch.ones(total, dtype=torch.float64)


def split(graph, values):
    return dict(zip([g.name for g in graph.groups], values.split([g.units for g in graph.groups]), strict=True))


def derivatives(model, graph, batches):
    """Per example: the loss's gradient [N, units], the Gauss-Newton diagonal and the Hessian's own, in the gates."""
    gradient, gauss_newton, hessian = [], [], []
    for x, y in batches:
        for n in range(len(x)):
            outputs, one = gates(model, graph, x[n : n + 1])
            loss = functools.partial(lambda gate, f, t: cross_entropy(f(gate)[None], t[None]), f=outputs, t=y[n])
            p, jacobian = outputs(one).softmax(0), torch.autograd.functional.jacobian(outputs, one)  # [K], [K, units]
            gradient.append(torch.autograd.functional.jacobian(loss, one))
            gauss_newton.append((jacobian * ((p.diag() - p.outer(p)) @ jacobian)).sum(0))
            hessian.append(torch.autograd.functional.hessian(loss, one).diag())
    return torch.stack(gradient), torch.stack(gauss_newton), torch.stack(hessian)


@pytest.mark.parametrize("name", NAMES)
def test_taylor_is_the_gradient_in_the_gates(name):
    model, graph, batches = setting(name, torch.float64)
    t = derivatives(model, graph, batches)[0]
    m = torch.cat([torch.full((g.units,), g.positions) for g in graph.groups])
    by_batch = sum(part.sum(0).abs() for part in t.split([4, 3])) / 7
    expected = {"taylor": t.abs().mean(0) / m, "taylor-batch": by_batch / m, "taylor-square": (t / m).square().mean(0)}
    for criterion, values in expected.items():
        close(CRITERIA[criterion](model, graph, batches, cross_entropy), split(graph, values.detach()), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_obd_is_the_gauss_newton_diagonal_example_by_example(name):
    model, graph, batches = setting(name, torch.float64)
    expected = derivatives(model, graph, batches)[1].detach() / 2  # [N, units]
    close(criteria.obd(model, graph, batches, cross_entropy), split(graph, expected.mean(0)), rtol=1e-7, atol=1e-12)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    for n in range(7):
        alone = criteria.obd(model, graph, [(x[n : n + 1], y[n : n + 1])], cross_entropy)
        close(alone, split(graph, expected[n]), rtol=1e-7, atol=1e-12)


def test_obd_takes_the_hessians_of_few_examples_at_a_time(monkeypatch):
    model, graph, batches = setting("chain", torch.float64)
    expected = criteria.obd(model, graph, batches, cross_entropy)
    monkeypatch.setattr(criteria, "HESSIANS", 1)
    close(criteria.obd(model, graph, batches, cross_entropy), expected, rtol=1e-7, atol=1e-12)


def test_obd_is_the_hessian_itself_where_the_net_is_piecewise_linear():
    model, graph, batches = setting("chain", torch.float64, relu=True)
    _, _, hessian = derivatives(model, graph, batches)
    close(criteria.obd(model, graph, batches, cross_entropy), split(graph, hessian.detach().mean(0) / 2), rtol=1e-7, atol=1e-12)


def test_obd_of_many_outputs_is_estimated_without_bias(monkeypatch):
    model, graph, batches = setting("chain", torch.float64)
    exact = criteria.obd(model, graph, batches, cross_entropy)
    monkeypatch.setattr(criteria, "PROBES", 2)
    torch.manual_seed(0)
    estimate = criteria.obd(model, graph, batches * 300, cross_entropy)
    for name, values in exact.items():
        torch.testing.assert_close(estimate[name], values, rtol=0.15, atol=0.0)
    once = criteria.obd(model, graph, batches, cross_entropy)
    assert any(not torch.allclose(once[name], values, rtol=1e-3) for name, values in exact.items())


def test_obd_takes_another_loss():
    """Half of the squared error has the identity for its Hessian."""
    model, graph, batches = setting("chain", torch.float64)
    batches = [(x, nn.functional.one_hot(y, 5).double()) for x, y in batches]
    found = criteria.obd(model, graph, batches, lambda o, t: 0.5 * (o - t).square().sum(1).mean())
    expected = 0
    for x, _ in batches:
        for n in range(len(x)):
            jacobian = torch.autograd.functional.jacobian(*gates(model, graph, x[n : n + 1]))
            expected = expected + jacobian.square().sum(0) / 14
    close(found, split(graph, expected.detach()), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_the_passes_are_those_that_are_taken(criterion):
    """Counted at the first convolution and at the gradient of its output; the oracle's price is brute force's."""
    if criterion.startswith("oracle"):
        assert CRITERIA[criterion].passes(14, 5) == (15, 0)
        return
    model, graph, batches = setting("chain")
    counts = [0, 0]

    def forward(_module, _args, output):
        counts[0] += 1
        if output.requires_grad:
            output.register_hook(lambda _: counts.__setitem__(1, counts[1] + 1))

    model.second.register_forward_hook(forward)
    CRITERIA[criterion](model, graph, batches, cross_entropy)
    assert tuple(c / len(batches) for c in counts) == CRITERIA[criterion].passes(graph.units, 5)


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_spearman_is_scipys_per_group_and_over_all_units():
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(u, generator=generator, dtype=torch.float64) * s for n, u, s in (("a", 9, 1), ("b", 6, 50))}
    truth = {n: s + torch.rand(len(s), generator=generator) for n, s in scores.items()}
    found = spearman(scores, truth)
    each = {n: spearmanr(scores[n], truth[n])[0] for n in scores}
    assert found.groups == pytest.approx(each) and found.left_out == 0
    assert found.per_group == pytest.approx(sum(each.values()) / 2)
    flat = torch.cat([*truth.values()])
    assert found.all_units == pytest.approx(spearmanr(torch.cat([*scores.values()]), flat)[0])
    normalised = torch.cat([s / s.square().sum().sqrt() for s in scores.values()])
    assert found.all_units_l2 == pytest.approx(spearmanr(normalised, flat)[0])
    assert found.all_units != pytest.approx(found.all_units_l2)


def test_what_cannot_be_correlated_is_left_out_and_counted():
    nan = math.nan
    scores = {"a": [3.0, 1.0, 2.0, 9.0], "even": [1.0, 1.0], "one": [1.0, 5.0], "alone": [1.0, 2.0]}
    truth = {"a": [6.0, 2.0, 4.0, nan], "even": [1.0, 3.0], "one": [2.0, nan], "other": [1.0, 2.0]}
    found = spearman(*({n: torch.tensor(v) for n, v in values.items()} for values in (scores, truth)))
    assert found.groups == {"a": pytest.approx(1.0)} and found.per_group == pytest.approx(1.0) and found.left_out == 2
    assert found.all_units == pytest.approx(spearmanr([3, 1, 2, 1, 1, 1], [6, 2, 4, 1, 3, 2])[0])
    norms = torch.tensor([95.0, 2.0, 26.0]).sqrt()  # of all scores, those of units that were not measured too
    l2 = torch.cat([torch.tensor(v) / n for v, n in zip(([3.0, 1.0, 2.0], [1.0, 1.0], [1.0]), norms, strict=True)])
    assert found.all_units_l2 == pytest.approx(spearmanr(l2, [6, 2, 4, 1, 3, 2])[0])


def test_nothing_in_common_is_nan():
    found = spearman({"a": torch.ones(3)}, {"b": torch.ones(3)})
    assert math.isnan(found.per_group) and math.isnan(found.all_units) and math.isnan(found.all_units_l2)
    with pytest.raises(ValueError, match="3 scores and 2"):
        spearman({"a": torch.ones(3)}, {"a": torch.ones(2)})
