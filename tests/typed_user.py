"""What a user's type checker sees of the package; `make lint` checks this file strictly, nobody runs it."""

from collections.abc import Iterator

import torch
from torch import nn
from typing_extensions import assert_type

import taylored
from taylored import criteria, ops


def everything(model: nn.Module, x: torch.Tensor, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[object]:
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    graph = assert_type(taylored.trace(model, x), taylored.ChannelGraph)
    assert_type(graph.groups, tuple[taylored.Group, ...])
    assert_type(graph.explain(), str)
    assert_type(graph.flops, int)
    graph.save("graph.safetensors")
    assert_type(taylored.ChannelGraph.load("graph.safetensors"), taylored.ChannelGraph)
    with taylored.TaylorScorer(model, graph) as scorer:
        assert_type(scorer.scores(), dict[str, torch.Tensor])
    plan = assert_type(taylored.make_plan(graph, scorer.scores(), target_flops=0.5, model=model), taylored.PrunePlan)
    assert_type(taylored.random_plan(graph, 0.5, 0), taylored.PrunePlan)
    assert_type(taylored.PrunePlan.of(graph, plan.removed).then(plan), taylored.PrunePlan)
    assert_type(plan.summary(), str)
    assert_type(taylored.diff(model, plan), str)
    with taylored.masked(model, graph, plan) as same:
        assert_type(same, nn.Module)
    removed = taylored.compact(model, plan, optimizer, keep_removed=True)
    if removed is not None:
        taylored.restore(model, removed, optimizer)
    taylored.save(model, plan, "model.safetensors")
    assert_type(taylored.load(model, "model.safetensors"), taylored.PrunePlan)
    assert_type(taylored.export(model, x, "model.onnx"), float | None)
    truth = assert_type(taylored.oracle(model, graph, batches, loss_fn, units={"conv": [1]}), dict[str, torch.Tensor])
    assert_type(taylored.spearman(truth, truth).per_group, float)
    result = taylored.prune(model, batches, loss_fn, optimizer, x, target_flops=0.5)
    assert_type(result, taylored.PruneResult)
    assert_type(result.plan.kept, dict[str, int])
    assert_type(ops.contribution(x, x), torch.Tensor)
    assert_type(criteria.CRITERIA["taylor"](model, graph, batches, loss_fn), dict[str, torch.Tensor])
    yield from graph.groups
