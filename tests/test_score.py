"""The score is a derivative: it equals a finite difference of the loss in a gate on the unit, however the model is run."""

import copy
import functools
import pickle

import models as nets
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from taylored import TaylorScorer, compact, make_plan, random_plan, trace


def target(n):
    return torch.arange(n) % 5


def score(model, graph, x, y, *, runner=None, loss=cross_entropy, **options):
    runner = model if runner is None else runner
    with TaylorScorer(model, graph, **options) as scorer:
        loss(runner(x), y).backward()
    return scorer.scores()


def gated(model, graph, group, unit, x, y, eps):
    """The loss with one unit multiplied by 1 + eps at all its consumers."""
    handles = []
    for consumer, slots in group.inputs.items():
        scale = torch.ones(len(graph.layers[consumer].inputs), dtype=x.dtype)
        scale[slots[unit]] += eps
        scale = scale.reshape((1, -1, 1, 1) if graph.layers[consumer].is_convolution else (1, -1))
        hook = functools.partial(lambda s, _, args: (args[0] * s,), scale)
        handles.append(model.get_submodule(consumer).register_forward_pre_hook(hook))
    with torch.no_grad():
        value = float(cross_entropy(model(x), y))
    for handle in handles:
        handle.remove()
    return value


def derivatives(model, graph, group, unit, x, y, eps=2e-4):
    """Per example, of fourth order: d loss / d gate, over the number of positions."""
    found = []
    for n in range(len(x)):
        f = functools.partial(gated, model, graph, group, unit, x[n : n + 1], y[n : n + 1])
        found.append((8 * (f(eps) - f(-eps)) - f(2 * eps) + f(-2 * eps)) / (12 * eps) / group.positions)
    return torch.tensor(found, dtype=torch.float64)


def close(a, b, rtol=1e-9, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol * float(b[name].abs().max()), msg=name)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_score_is_a_derivative(name):
    model, x, y = nets.small(name, dtype=torch.float64), nets.inputs(3, dtype=torch.float64), target(3)
    graph = trace(model, x, fully_connected=True)
    scores = {r: score(model, graph, x, y, reduction=r) for r in ("abs", "batch", "square")}
    alone = [score(model, graph, x[n : n + 1], y[n : n + 1]) for n in range(3)]
    assert scores["abs"].keys() == {g.name for g in graph.groups}
    for group in graph.groups:
        for unit in range(0, group.units, 2):
            d = derivatives(model, graph, group, unit, x, y)
            size = float(d.abs().max())
            assert float(scores["square"][group.name][unit]) == pytest.approx(float((d**2).mean()), rel=1e-6)
            assert float(scores["abs"][group.name][unit]) == pytest.approx(float(d.abs().mean()), rel=1e-6)
            assert float(scores["batch"][group.name][unit]) == pytest.approx(float(d.sum().abs()) / 3, abs=1e-6 * size)
            for n in range(3):
                assert float(alone[n][group.name][unit]) == pytest.approx(abs(float(d[n])), abs=1e-6 * size)


@pytest.mark.parametrize("name", ["chain", "depthwise", "flatten"])
@pytest.mark.parametrize("reduction", ["abs", "batch", "square"])
def test_every_reduction_equals_its_formula(name, reduction):
    model, x, y = nets.small(name), nets.inputs(4), target(4)
    graph = trace(model, x)
    caught = {}

    def keep(consumer, _module, args):
        leaf = args[0] * 1
        leaf.retain_grad()
        caught[consumer] = leaf
        return (leaf,)

    reference = copy.deepcopy(model)
    for consumer in {c for g in graph.groups for c in g.inputs}:
        reference.get_submodule(consumer).register_forward_pre_hook(functools.partial(keep, consumer))
    cross_entropy(reference(x), y).backward()
    expected = {}
    for group in graph.groups:
        t = 0
        for consumer, slots in group.inputs.items():
            product = (caught[consumer] * caught[consumer].grad).double()
            per_channel = product.flatten(2).sum(2) if product.ndim > 2 else product
            t = t + per_channel[:, slots].sum(2) * 4 / group.positions  # [N, units]
        reduced = {"abs": t.abs().mean(0), "batch": t.sum(0).abs() / 4, "square": (t**2).mean(0)}
        expected[group.name] = reduced[reduction]
    close(score(model, graph, x, y, reduction=reduction), expected, rtol=1e-3, atol=1e-5)


def test_scores_come_with_frozen_weights():
    model, x, y = nets.small("residual"), nets.inputs(4), target(4)
    graph = trace(model, x)
    expected = score(model, graph, x, y)
    model.requires_grad_(False).zero_grad()
    close(score(model, graph, x, y), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["chain", "depthwise", "twice"])
def test_accumulated_steps_equal_one_big_batch(name):
    model, x, y = nets.small(name, dtype=torch.float64), nets.inputs(8, dtype=torch.float64), target(8)
    graph = trace(model, x)
    with TaylorScorer(model, graph) as scorer:
        for part in range(4):
            cross_entropy(model(x[2 * part : 2 * part + 2]), y[2 * part : 2 * part + 2]).backward()
    close(scorer.scores(), score(model, graph, x, y))


@pytest.mark.parametrize("name", ["chain", "twice"])
def test_several_forward_passes_before_one_backward_are_examples(name):
    model, x, y = nets.small(name, dtype=torch.float64), nets.inputs(8, dtype=torch.float64), target(8)
    graph = trace(model, x)
    with TaylorScorer(model, graph, loss_reduction="sum") as scorer:
        halves = [cross_entropy(model(x[i : i + 4]), y[i : i + 4], reduction="sum") for i in (0, 4)]
        (halves[0] + halves[1]).backward()
    close(scorer.scores(), score(model, graph, x, y))


def test_a_summed_loss_equals_a_mean():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    summed = score(model, graph, x, y, loss=functools.partial(cross_entropy, reduction="sum"), loss_reduction="sum")
    close(summed, score(model, graph, x, y), rtol=1e-4)


def test_bfloat16_autocast_is_close():
    model, x, y = nets.small("residual"), nets.inputs(16), target(16)
    graph = trace(model, x)
    with TaylorScorer(model, graph) as scorer:
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x).float(), y)
        loss.backward()
    for name, expected in score(model, graph, x, y).items():
        assert (scorer.scores()[name] - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["chain", "depthwise", "twice"])
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "compiled_before"])
def test_compiled_scores_equal_eager(name, before):
    model, x, y = nets.small(name), nets.inputs(4), target(4)
    graph = trace(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if before:
        cross_entropy(compiled(x), y).backward()
    scores = score(model, graph, x, y, runner=compiled)
    close(scores, score(model, graph, x, y), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled(x), model(x))


def test_inductor_keeps_the_scores():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    scores = score(model, graph, x, y, runner=torch.compile(model, fullgraph=True))
    close(scores, score(model, graph, x, y), rtol=1e-3, atol=1e-5)


def test_a_compiled_model_scores_again_after_the_cut():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    score(model, graph, x, y, runner=compiled)
    plan = random_plan(graph, 0.5)
    compact(compiled, plan)
    after = graph.after(plan.removed)
    close(score(compiled, after, x, y, runner=compiled), score(model, after, x, y), rtol=1e-4, atol=1e-6)


def counting():
    """A backend that runs as it is what it is given, and a list that grows by every graph it is given."""
    graphs = []
    return lambda graph, _: graphs.append(graph) or graph.forward, graphs


def test_a_scorer_that_pauses_compiles_nothing_anew():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph, (backend, graphs) = trace(model, x), counting()
    compiled = torch.compile(model, backend=backend)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as torch comes
        cross_entropy(compiled(x), y).backward()
        scorer = TaylorScorer(model, graph)
        for _ in range(4):
            with scorer:
                cross_entropy(compiled(x), y).backward()
            cross_entropy(compiled(x), y).backward()
    assert len(graphs) == 3  # before, with gates, and once more without
    close(scorer.scores(), score(model, graph, x, y), rtol=1e-4, atol=1e-6)


def test_a_compiled_model_stays_compiled_through_many_cuts():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph, (backend, graphs) = trace(model, x), counting()
    compiled = torch.compile(model, backend=backend)
    for n in range(1, 11):  # more than the versions of one function that torch keeps
        scores = score(compiled, graph, x, y)
        cross_entropy(compiled(x), y).backward()
        assert len(graphs) == 2 * n
        plan = make_plan(graph, scores, remove_units=1)
        compact(compiled, plan)
        graph = graph.after(plan.removed)


class Checkpointed(nets.Depthwise):
    """Its middle is a segment of its own, so that a unit has consumers within it and without."""

    reentrant, nested = True, False

    def forward(self, x):
        x = self.stem(x).tanh()
        y = checkpoint(self.outer if self.nested else self.middle, x, use_reentrant=self.reentrant)
        return self.head((x + checkpoint(self.project, y, use_reentrant=self.reentrant)).tanh().mean((2, 3)))

    def outer(self, x):
        return checkpoint(self.middle, x, use_reentrant=self.reentrant)

    def middle(self, x):
        y = self.norm(self.depthwise(self.expand(x).tanh())).tanh()
        return y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).tanh()).sigmoid()


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("reduction", ["abs", "batch", "square"])
def test_gradient_checkpointing_changes_no_score(reentrant, reduction, nested):
    plain, x, y = nets.small("depthwise", dtype=torch.float64), nets.inputs(4, dtype=torch.float64), target(4)
    graph, model = trace(plain, x), Checkpointed().double().eval()
    model.load_state_dict(plain.state_dict())
    model.reentrant, model.nested = reentrant, nested
    with TaylorScorer(model, graph, reduction=reduction) as scorer:
        for _ in range(2):
            (cross_entropy(model(x), y) + cross_entropy(model(x / 2), y)).backward()
    with TaylorScorer(plain, graph, reduction=reduction) as expected:
        for _ in range(2):
            (cross_entropy(plain(x), y) + cross_entropy(plain(x / 2), y)).backward()
    close(scorer.scores(), expected.scores())


def test_a_copy_made_while_scoring_is_not_scored():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    expected = score(model, graph, x, y)
    with TaylorScorer(model, graph) as scorer:
        cross_entropy(model(x), y).backward()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), model(x))
            cross_entropy(copied(2 * x), y).backward()
    close(scorer.scores(), expected)


def test_channels_last_scores_are_the_same():
    model, x, y = nets.small("depthwise"), nets.inputs(4), target(4)
    graph = trace(model, x)
    expected = score(model, graph, x, y)
    model.to(memory_format=torch.channels_last)
    close(score(model, graph, x.contiguous(memory_format=torch.channels_last), y), expected, rtol=1e-4, atol=1e-5)


def test_scoring_leaves_outputs_and_gradients_alone():
    model, x, y = nets.small("concatenation"), nets.inputs(4), target(4)
    graph = trace(model, x)
    expected = model(x)
    cross_entropy(expected, y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with TaylorScorer(model, graph):
        actual = model(x)
        cross_entropy(actual, y).backward()
    assert torch.equal(actual, expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_nothing_stays_behind():
    model, x, y = nets.small("chain"), nets.inputs(), target(2)
    graph = trace(model, x)
    handle = model.second.register_forward_pre_hook(lambda _, args: args)
    before = nets.snapshot(model)
    with pytest.raises(KeyError), TaylorScorer(model, graph) as scorer:
        cross_entropy(model(x), y).backward()
        raise KeyError
    assert nets.unchanged(before, model)
    scores = scorer.scores()
    cross_entropy(model(x), y).backward()
    close(scorer.scores(), scores)
    handle.remove()


def test_evaluation_in_between_does_not_count():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    expected = score(model, graph, x, y)
    with TaylorScorer(model, graph) as scorer:
        with torch.no_grad():
            model(2 * x)
        cross_entropy(model(x), y).backward()
        with torch.inference_mode():
            model(2 * x)
    close(scorer.scores(), expected)


def test_a_scorer_goes_on_after_a_pause_and_forgets_on_reset():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    scorer = TaylorScorer(model, graph)
    for part in (slice(0, 2), slice(2, 4)):
        with scorer:
            cross_entropy(model(x[part]), y[part]).backward()
    close(scorer.scores(), score(model, graph, x, y), rtol=1e-4)
    scorer.reset()
    with pytest.raises(RuntimeError, match="no backward pass"):
        scorer.scores()


def test_a_failing_backward_leaves_no_trace():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    expected = score(model, graph, x, y)

    def fail(_gradient):
        raise KeyError

    with TaylorScorer(model, graph) as scorer:
        handle = model.first.weight.register_hook(fail)
        with pytest.raises(KeyError):
            cross_entropy(model(x), y).backward()
        handle.remove()
        cross_entropy(model(x), y).backward()
    close(scorer.scores(), expected)


def test_a_nan_loss_is_an_error():
    model, x, y = nets.small("chain"), nets.inputs(), target(2)
    graph = trace(model, x)
    with TaylorScorer(model, graph) as scorer:
        (cross_entropy(model(x), y) * float("nan")).backward()
    with pytest.raises(FloatingPointError, match="not finite"):
        scorer.scores()


def test_scores_without_a_backward_pass_are_an_error():
    model, x = nets.small("chain"), nets.inputs()
    with TaylorScorer(model, trace(model, x)) as scorer:
        model(x)
    with pytest.raises(RuntimeError, match="no backward pass"):
        scorer.scores()


def test_wrong_arguments_are_named():
    model, x = nets.small("chain"), nets.inputs()
    graph = trace(model, x)
    with pytest.raises(ValueError, match="reduction must be one of"):
        TaylorScorer(model, graph, reduction="median")
    with pytest.raises(ValueError, match="loss_reduction must be"):
        TaylorScorer(model, graph, loss_reduction="none")
    with pytest.raises(ValueError, match="graph does not fit model"):
        TaylorScorer(nets.small("residual"), graph)
    compact(model, random_plan(graph, 0.5))
    with pytest.raises(ValueError, match="graph does not fit model"):
        TaylorScorer(model, graph)
    with pytest.raises(RuntimeError, match="already active"), TaylorScorer(nets.small("chain"), graph) as scorer:
        scorer.__enter__()


def test_two_models_are_scored_side_by_side():
    first, second, x, y = nets.small("chain"), nets.small("chain", seed=1), nets.inputs(4), target(4)
    graph = trace(first, x)
    expected = [score(model, graph, x, y) for model in (first, second)]
    with TaylorScorer(first, graph) as one, TaylorScorer(second, graph) as two:
        (cross_entropy(first(x), y) + cross_entropy(second(x), y)).backward()
    close(one.scores(), expected[0])
    close(two.scores(), expected[1])


def test_removing_a_unit_without_contribution_changes_no_loss():
    model, x, y = nets.small("chain"), nets.inputs(4), target(4)
    graph = trace(model, x)
    with torch.no_grad():
        model.second.weight[:, 2] = 0
    assert float(score(model, graph, x, y)["first"][2]) == 0


def test_compaction_within_the_context_is_said_to_be_the_mistake():
    model, x = nets.small(), nets.inputs()
    graph = trace(model, x)
    with pytest.raises(RuntimeError, match="leave `with TaylorScorer"), TaylorScorer(model, graph):
        compact(model, random_plan(graph, 0.5))
        model(x).sum().backward()
