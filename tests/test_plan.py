"""Budgets are met, limits are kept, errors name the argument, and plans are values that compose."""

import copy
import pickle

import models as nets
import pytest
import torch

from taylored import PlanError, PrunePlan, TaylorScorer, compact, diff, make_plan, random_plan, trace


def graph_of(name="depthwise", **options):
    return trace(nets.small(name), nets.inputs(), **options)


def scores_of(graph, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in graph.groups}


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("budget", ["target_flops", "target_params"])
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.7, 0.5])
def test_budgets_are_met_and_not_overshot(name, budget, fraction):
    graph = graph_of(name)
    scores = scores_of(graph)
    plan = make_plan(graph, scores, **{budget: fraction})
    before, after = plan.flops if budget == "target_flops" else plan.params
    assert after <= fraction * before
    gone = sum(map(len, plan.removed.values()))
    if gone:  # one unit fewer would not do
        less = make_plan(graph, scores, remove_units=gone - 1)
        assert (less.flops if budget == "target_flops" else less.params)[1] > fraction * before
    assert make_plan(graph, scores, **{budget: int(fraction * before)}) == plan


@pytest.mark.parametrize("count", [0, 1, 5, 14])
def test_so_many_units_go(count):
    plan = make_plan(graph_of(), scores_of(graph_of()), remove_units=count)
    assert sum(map(len, plan.removed.values())) == count


def test_promised_sizes_are_those_of_the_model():
    for name in nets.NETS:
        model = nets.small(name)
        graph = trace(model, nets.inputs())
        plan = make_plan(graph, scores_of(graph), target_flops=0.6)
        compact(model, plan)
        again = trace(model, nets.inputs())
        assert (again.flops, again.params) == (plan.flops[1], plan.params[1])
        assert {n: tuple(p.shape) for n, p in model.state_dict().items() if n in plan.shapes} == {
            n: plan.shape_after(n) for n in plan.shapes
        }


def test_the_lowest_scores_go():
    graph = graph_of("chain")
    scores = {"first": torch.tensor([3.0, 1, 4, 1.5, 5, 9, 2, 6]), "second": torch.full((6,), 100.0)}
    plan = make_plan(graph, scores, remove_units=3, normalize="none", flops_weight=0)
    assert {n: u.tolist() for n, u in plan.removed.items()} == {"first": [1, 3, 6]}
    assert plan.keep["first.weight", 0].tolist() == plan.keep["second.weight", 1].tolist() == [0, 2, 4, 5, 7]


@pytest.mark.parametrize(
    ("normalize", "norm"),
    [
        ("none", lambda s: 1.0),
        ("l2", lambda s: s.pow(2).sum().sqrt()),
        ("l1", lambda s: s.abs().sum()),
        ("max", lambda s: s.abs().max()),
        ("mean", lambda s: s.abs().mean()),
    ],
)
@pytest.mark.parametrize("weight", [0.0, 1e-3, 0.5])
def test_scores_are_normalised_and_charged_as_written(normalize, norm, weight):
    graph = graph_of("residual")
    scores = {n: s * 10**i for i, (n, s) in enumerate(scores_of(graph).items())}
    saved = {g.name: graph.flops - graph.after({g.name: torch.tensor([0])}).flops for g in graph.groups}
    dear = max(saved.values())
    ranked = sorted(
        (float(v / norm(scores[g.name]) - weight * saved[g.name] / dear), g.name, u)
        for g in graph.groups for u, v in enumerate(scores[g.name])
    )  # fmt: skip
    plan = make_plan(graph, scores, remove_units=6, normalize=normalize, flops_weight=weight)
    assert {(n, int(u)) for n, units in plan.removed.items() for u in units} == {(n, u) for _, n, u in ranked[:6]}


def test_scores_of_zero_are_no_division_by_zero():
    graph = graph_of("chain")
    plan = make_plan(graph, {g.name: torch.zeros(g.units) for g in graph.groups}, target_flops=0.5)
    assert plan.flops[1] <= 0.5 * plan.flops[0]


@pytest.mark.parametrize("round_to", [2, 4])
def test_kept_channels_divide_by_round_to(round_to):
    graph = graph_of("concatenation")
    plan = make_plan(graph, scores_of(graph), target_flops=0.8, round_to=round_to)
    assert plan.removed
    for name in plan.removed:
        assert plan.kept[name] % round_to == 0


# Bundles: groups that shrink together, see trace.Bundle.


def lowest(graph, scores, plan):
    """Whether the plan removes of every group the units with the lowest scores."""
    return all(
        set(scores[n].argsort(stable=True)[: len(units)].tolist()) == set(units.tolist()) for n, units in plan.removed.items()
    )


@pytest.mark.parametrize("options", [{"target_flops": 0.5}, {"target_params": 0.7}, {"remove_units": 15}])
def test_a_bundle_loses_the_lowest_units_of_every_group(options):
    graph = graph_of("dealt")
    scores = scores_of(graph)
    plan = make_plan(graph, scores, **options)
    assert plan.removed and lowest(graph, scores, plan)
    assert {plan.shapes[t][d] / len(kept) for (t, d), kept in plan.keep.items()} == {16 / plan.shape_after("stem.weight")[0]}
    assert not all((kept[1:] > kept[:-1]).all() for kept in plan.keep.values())  # some are dealt out in another order


def test_limits_are_about_the_width_of_a_bundle():
    graph = graph_of("dealt")
    (bundle,), scores = graph.bundles, scores_of(graph)
    with pytest.raises(PlanError, match="cannot be met"):
        make_plan(graph, scores, target_flops=0.5, ignore="blocks.1")
    with pytest.raises(PlanError, match="cannot be met"):
        make_plan(graph, {n: s for n, s in scores.items() if n != bundle.groups[0]}, target_flops=0.5)
    for limit, width in (({"min_units": 6}, 6), ({"max_ratio": 0.4}, 5), ({"min_units": {bundle.groups[1]: 7}}, 7), ({}, 2)):
        with pytest.raises(PlanError, match="cannot be met"):
            make_plan(graph, scores, target_params=1, **limit)
        plans = [make_plan(graph, scores, remove_units=n, **limit) for n in range(0, 41 - 5 * width, 5)]
        assert min(plan.shape_after("stem.weight")[0] for plan in plans if plan.removed) == 2 * width
    plan = make_plan(graph, scores, target_flops=0.7, round_to=4)
    assert plan.shape_after("stem.weight")[0] == 8


def test_a_bundle_that_would_not_keep_its_share_is_refused():
    graph = graph_of("dealt")
    name = graph.bundles[0].groups[0]
    with pytest.raises(PlanError, match="the same share"):
        PrunePlan.of(graph, {name: torch.tensor([0])})
    removed = dict(random_plan(graph, 0.5).removed)
    giver, taker = (
        next(n for n in removed if ok(n))
        for ok in (lambda n: len(removed[n]) > 1, lambda n: len(removed[n]) < graph.group(n).units and n.split("->")[0] == "stem")
    )
    for name, count in ((giver, len(removed[giver]) - 1), (taker, len(removed[taker]) + 1)):
        with pytest.raises(PlanError, match="the same share"):
            PrunePlan.of(graph, {**removed, name: torch.arange(count)})


def test_a_graph_with_bundles_that_comes_from_elsewhere_asks_for_the_model():
    model = nets.small("dealt")
    graph = trace(model, nets.inputs())
    there = pickle.loads(pickle.dumps(graph))
    assert random_plan(there, 0.5, model=model) == random_plan(graph, 0.5)
    assert make_plan(there, scores_of(graph), target_flops=0.5, model=model) == make_plan(
        graph, scores_of(graph), target_flops=0.5
    )
    for plan in (lambda: make_plan(there, scores_of(graph), target_flops=0.5), lambda: random_plan(there, 0.5)):
        with pytest.raises(PlanError, match="give model="):
            plan()
    with pytest.raises(PlanError, match="give model="):
        PrunePlan.of(there, random_plan(graph, 0.5).removed)
    with pytest.raises(ValueError, match="does not fit"):
        random_plan(there, 0.5, model=nets.small("chain"))


def test_a_bundle_has_one_row():
    graph = graph_of("dealt")
    plan = random_plan(graph, 0.5)
    units, kept = (sum(counts[n] for n in graph.bundled) for counts in (plan.units, plan.kept))
    assert ["bundle", "1", str(units), str(kept)] == plan.summary().splitlines()[1].split()[:4]
    assert "->" not in plan.summary() + graph.explain() and "bundle 1" in graph.explain("stem")


def test_a_model_without_units_is_said_to_have_none():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.LayerNorm([4, 6, 6]))
    graph = trace(model, nets.inputs())
    with TaylorScorer(model, graph) as scorer:
        model(nets.inputs()).sum().backward()
    with pytest.raises(PlanError, match="nothing that can be removed"):
        make_plan(graph, scorer.scores(), target_flops=0.5)


def test_min_units_stay():
    graph = graph_of("chain")
    plan = make_plan(graph, scores_of(graph), remove_units=7, min_units={"first": 5, "second": 2})
    assert plan.kept == {"first": 5, "second": 2}
    plan = make_plan(graph, scores_of(graph), remove_units=8, min_units=3)
    assert plan.kept == {"first": 3, "second": 3}


def test_max_ratio_limits_each_group():
    graph = graph_of("chain")
    assert make_plan(graph, scores_of(graph), remove_units=7, max_ratio=0.5).kept == {"first": 4, "second": 3}
    assert make_plan(graph, scores_of(graph), remove_units=2, max_ratio={"first": 0.25, "second": 0.0}).kept == {
        "first": 6,
        "second": 6,
    }


def test_every_group_keeps_a_unit():
    graph = graph_of()
    most = graph.units - len(graph.groups)
    assert set(make_plan(graph, scores_of(graph), remove_units=most).kept.values()) == {1}


def test_ignored_layers_stay():
    model = nets.small("residual")
    graph = trace(model, nets.inputs())
    for ignore in ("inner", model.inner, [model.inner], ("inner",)):
        assert "inner" not in make_plan(graph, scores_of(graph), target_flops=0.6, ignore=ignore).removed
    sequence = nets.small("flatten")
    graph = trace(sequence, nets.inputs())
    plan = make_plan(graph, scores_of(graph), remove_units=3, ignore="features.0")
    assert set(plan.removed) == {"features.3"}
    assert not make_plan(graph, scores_of(graph), remove_units=0, ignore=sequence.features).removed


def test_groups_without_scores_stay():
    graph = graph_of("chain")
    assert set(make_plan(graph, {"first": torch.ones(8)}, remove_units=3).removed) == {"first"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"target_flops": 0.5, "target_params": 0.5}, "exactly one of"),
        ({"target_flops": 0.0}, "target_flops"),
        ({"target_flops": -3}, "target_flops"),
        ({"target_params": 0.5, "max_ratio": 0.1}, "target_params: at most .*cannot be met"),
        ({"target_flops": 50}, "for a percentage, write a fraction"),
        ({"target_flops": "0.5"}, "target_flops must be a number"),
        ({"target_flops": 1}, "cannot be met"),
        ({"target_flops": float("nan")}, "target_flops"),
        ({"remove_units": 10**6}, "remove_units"),
        ({"remove_units": -1}, "remove_units"),
        ({"remove_units": 2.5}, "remove_units"),
        ({"remove_units": 1, "normalize": "l3"}, "normalize"),
        ({"remove_units": 1, "round_to": 0}, "round_to"),
        ({"remove_units": 1, "round_to": 1.5}, "round_to"),
        ({"remove_units": 1, "min_units": 0}, "min_units"),
        ({"remove_units": 1, "min_units": {"first": 0}}, "min_units"),
        ({"remove_units": 1, "max_ratio": 1.5}, "max_ratio"),
        ({"remove_units": 1, "ignore": "nowhere"}, "ignore"),
        ({"remove_units": 1, "ignore": [torch.nn.ReLU()]}, "ignore"),
        ({"remove_units": 1, "min_units": {"nowhere": 2}}, "min_units"),
        ({"remove_units": 1, "max_ratio": {"nowhere": 0.5}}, "max_ratio"),
    ],
)
def test_errors_name_the_argument(options, message):
    graph = graph_of("chain")
    with pytest.raises(PlanError, match=message):
        make_plan(graph, scores_of(graph), **options)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"nowhere": torch.ones(8)}, "nowhere"),
        ({"first": torch.ones(9)}, r"scores\['first'\] must have shape \(8,\)"),
        ({"first": torch.full((8,), torch.nan)}, r"scores\['first'\] is not finite"),
    ],
)
def test_unusable_scores_are_named(scores, message):
    with pytest.raises(PlanError, match=message):
        make_plan(graph_of("chain"), scores, remove_units=1)


@pytest.mark.parametrize("units", [[8], [-1], list(range(8))])
def test_removed_units_must_exist_and_leave_one(units):
    with pytest.raises(PlanError, match=r"removed\['first'\]"):
        PrunePlan.of(graph_of("chain"), {"first": torch.tensor(units)})


def test_a_group_that_does_not_exist_cannot_be_removed_from():
    with pytest.raises(PlanError, match="nowhere"):
        PrunePlan.of(graph_of("chain"), {"nowhere": torch.tensor([0])})


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_random_plans_take_a_ratio(ratio):
    with pytest.raises(PlanError, match="ratio"):
        random_plan(graph_of("chain"), ratio)


def test_random_plans_depend_on_their_seed_alone():
    graph = graph_of()
    assert random_plan(graph, 0.5, 3) == random_plan(graph, 0.5, 3) != random_plan(graph, 0.5, 4)
    assert set(random_plan(graph, 1.0).kept.values()) == {1}
    assert not random_plan(graph, 0.0).removed


@pytest.mark.parametrize("name", nets.NETS)
def test_two_rounds_compose_to_one(name):
    x, rounds, once = nets.inputs(), nets.small(name), nets.small(name)
    graph = trace(rounds, x)
    first = make_plan(graph, scores_of(graph), target_flops=0.8)
    compact(rounds, first)
    after = graph.after(first.removed)
    second = make_plan(after, scores_of(after, 1), target_flops=0.7)
    compact(rounds, second)
    both = first.then(second)
    compact(once, both)
    assert all(torch.equal(t, once.state_dict()[n]) for n, t in rounds.state_dict().items())
    assert both == PrunePlan.of(graph, both.removed)
    assert (both.flops, both.params) == ((graph.flops, second.flops[1]), (graph.params, second.params[1]))
    assert torch.equal(rounds(x), once(x))


def test_composition_is_associative_and_has_a_unit():
    graph, plans, current = graph_of(), [], graph_of()
    for seed in range(3):
        plans.append(random_plan(current, 0.3, seed))
        current = current.after(plans[-1].removed)
    a, b, c = plans
    assert a.then(b).then(c) == a.then(b.then(c))
    assert PrunePlan.of(graph, {}).then(a) == a == a.then(PrunePlan.of(graph.after(a.removed), {}))


def test_plans_that_do_not_follow_are_refused():
    plan = random_plan(graph_of("chain"), 0.5)
    with pytest.raises(PlanError, match="later plan starts from"):
        plan.then(plan)


def test_plans_are_values():
    graph = graph_of()
    plan, other = random_plan(graph, 0.5), random_plan(graph, 0.3)
    assert plan == copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan)) != other
    assert plan != "plan" and "removes" in repr(plan)
    with pytest.raises(TypeError):
        hash(plan)


def test_planning_changes_no_scores():
    graph = graph_of("chain")
    scores = scores_of(graph)
    kept = {n: s.clone() for n, s in scores.items()}
    make_plan(graph, scores, target_flops=0.5)
    assert all(torch.equal(scores[n], kept[n]) for n in kept)


def numbers(line):
    return [int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()]


@pytest.mark.parametrize("name", [name for name in nets.NETS if name != "dealt"])
def test_the_summary_has_a_line_per_group_and_adds_up(name):
    plan = random_plan(graph_of(name), 0.4)
    header, *lines = plan.summary().splitlines()
    assert header.split() == ["group", "units", "kept", "gone"]
    rows = {line.split("  ")[0]: numbers(line) for line in lines}
    assert {n: rows[n] for n in plan.units} == {n: [size, plan.kept[n]] for n, size in plan.units.items()}
    assert rows["all groups"] == [sum(plan.units.values()), sum(plan.kept.values())]
    assert (rows["parameters"], rows["FLOPs"]) == (list(plan.params), list(plan.flops))
    assert pickle.loads(pickle.dumps(plan)).summary() == plan.summary()


@pytest.mark.parametrize("name", nets.NETS)
def test_the_difference_is_that_of_the_model(name):
    model = nets.small(name)
    plan = random_plan(trace(model, nets.inputs()), 0.4)
    before, table = sum(p.numel() for p in model.parameters()), diff(model, plan)
    compact(model, plan)
    assert diff(model, plan) == table == diff(torch.compile(model), plan)
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert numbers(rows.pop("all")) == [before, sum(p.numel() for p in model.parameters())]
    changed = {n.rpartition(".")[0] for n, _ in model.named_parameters() if n in plan.shapes}
    assert rows.keys() == changed
    for prefix, line in rows.items():
        module = model.get_submodule(prefix)
        assert type(module).__name__ in line and numbers(line)[-1] == sum(p.numel() for p in module.parameters())
        assert f"{'x'.join(map(str, module.weight.shape))} " in line


def test_the_difference_to_another_model_is_refused():
    model = nets.small("chain")
    plan, other = random_plan(trace(model, nets.inputs()), 0.4), random_plan(trace(model, nets.inputs()), 0.8, seed=1)
    for stranger in (nets.small("residual"), torch.nn.Linear(2, 2)):
        with pytest.raises(PlanError, match="does not fit model"):
            diff(stranger, plan)
    compact(model, plan)
    with pytest.raises(PlanError, match=r"does not fit model.*has shape"):
        diff(model, other)


def test_the_digest_tells_plans_apart():
    graph = graph_of()
    plan = random_plan(graph, 0.5, 3)
    assert plan.digest == random_plan(graph, 0.5, 3).digest == pickle.loads(pickle.dumps(plan)).digest
    others = [random_plan(graph, 0.5, 4), PrunePlan.of(graph, {}), random_plan(graph_of("chain"), 0.5)]
    assert len({p.digest for p in [plan, *others]}) == 4


def test_ten_rounds_compose_to_one():
    x, rounds, once = nets.inputs(), nets.small("concatenation"), nets.small("concatenation")
    graph = current = trace(rounds, x)
    plan = PrunePlan.of(graph, {})
    for number in range(10):
        cut = make_plan(current, scores_of(current, number), remove_units=1)
        compact(rounds, cut)
        plan, current = plan.then(cut), current.after(cut.removed)
    assert plan == PrunePlan.of(graph, plan.removed) and sum(map(len, plan.removed.values())) == 10
    compact(once, plan)
    assert all(torch.equal(t, once.state_dict()[n]) for n, t in rounds.state_dict().items())


def test_arguments_in_another_order_are_refused_in_words():
    graph = trace(nets.small("chain"), nets.inputs())
    scores = {g.name: torch.rand(g.units) for g in graph.groups}
    with pytest.raises(TypeError, match="graph must be the ChannelGraph"):
        make_plan(scores, graph, target_flops=0.5)
    with pytest.raises(TypeError, match="graph must be the ChannelGraph"):
        random_plan(0.5, graph)
    with pytest.raises(TypeError, match="scores must be a dict"):
        make_plan(graph, list(scores.values()), target_flops=0.5)
    with pytest.raises(PlanError, match="write a fraction"):
        make_plan(graph, scores, target_flops=1.5)
