"""A run proves itself: right cuts pass on real inputs, wrong ones are caught before anything of the user's is changed."""

import copy
import dataclasses

import models as nets
import pytest
import torch
from torch import nn
from torchvision import models

import taylored
from taylored import PlanError, VerificationError, compact, prune, random_plan, trace, verify
from taylored._graph.values import complement

NETS = ("chain", "residual", "depthwise", "concatenation", "dealt")


def planned(name, ratio=0.5):
    model, x = nets.small(name), nets.inputs(12)
    nets.randomised(model, x)
    graph = trace(model.eval(), x)
    return model, x, graph, random_plan(graph, ratio)


@pytest.mark.parametrize("name", nets.NETS)
def test_right_cuts_are_proven_and_cut_nothing(name):
    model, x, _, plan = planned(name)
    before = nets.snapshot(model)
    found = verify(model, plan, x)
    assert found.difference < 1e-4 and not found.unproven
    assert nets.unchanged(before, model)
    compact(model, plan, verify=x)


def shifted(plan, group, by=1):
    """The plan whose kept indices of a tensor's dimension are moved by one."""
    (key, kept), *_ = [(k, v) for k, v in plan.keep.items() if k in group.slots]
    size = plan.shapes[key[0]][key[1]]
    others = complement(kept, size)
    wrong = torch.cat([kept[1:], others[:1]]).sort().values
    return dataclasses.replace(plan, keep={**plan.keep, key: wrong})


def faults():
    for name in NETS[:4]:
        yield f"{name}: filters of another index", name, lambda m, g, p: (m, shifted(p, g.group(next(iter(p.removed)))))
        yield f"{name}: the first tensor's units are others", name, other_unit
    for name in ("chain", "residual", "depthwise", "concatenation"):
        yield f"{name}: an input's slice of another index", name, other_input
        yield f"{name}: a label was dropped", name, dropped
    for name in ("chain", "residual", "depthwise", "concatenation"):
        yield f"{name}: batch norm's statistics of other channels", name, other_statistics


def other_unit(model, graph, plan):
    group = graph.group(next(iter(plan.removed)))
    key = next(k for k in group.slots if k[0].endswith(".bias") or k[1] == 0)
    return model, dataclasses.replace(plan, keep={**plan.keep, key: plan.keep[key].flip(0)})


def other_input(model, graph, plan):
    key = next(k for k in plan.keep if k[1] == 1)
    kept = plan.keep[key]
    return model, dataclasses.replace(plan, keep={**plan.keep, key: torch.cat([kept[1:], kept[:1]])})


def other_statistics(model, graph, plan):
    key = next(k for k in plan.keep if k[0].endswith("running_mean"))
    return model, dataclasses.replace(plan, keep={**plan.keep, key: plan.keep[key].flip(0)})


def dropped(model, graph, plan):
    """A group that the graph takes for two: only one layer's filters go by the plan's units, the other's by others."""
    key = [k for k in plan.keep if k[1] == 0 and k[0].endswith("weight")][-1]
    size = plan.shapes[key[0]][0]
    gone = complement(plan.keep[key], size)
    moved = torch.randperm(size, generator=torch.Generator().manual_seed(3))[: len(gone)]
    return model, dataclasses.replace(plan, keep={**plan.keep, key: complement(moved, size)})


@pytest.mark.parametrize(("fault", "name", "plant"), faults(), ids=lambda v: v if isinstance(v, str) and ":" in v else "")
def test_planted_faults_are_caught_and_change_nothing(fault, name, plant):
    model, x, graph, plan = planned(name)
    model, wrong = plant(model, graph, plan)
    assert wrong != plan
    before = nets.snapshot(model)
    with pytest.raises(VerificationError, match="Nothing was cut") as raised:
        compact(model, wrong, verify=x)
    assert nets.unchanged(before, model) and raised.value.difference > 1e-6
    assert raised.value.layer is None or raised.value.layer in graph.layers


def test_a_net_that_amplifies_rounding_raises_no_false_alarm():
    torch.manual_seed(0)
    model, x = models.efficientnet_v2_s().eval(), torch.randn(2, 3, 96, 96)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.fill_(1e-3)  # every layer makes what comes larger
    found = verify(model, random_plan(trace(model, x), 0.5), x)
    assert not found.unproven and found.difference < 1e-4


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        y = self.a(x)
        return self.b(y + torch.randn_like(y))


def test_a_model_that_is_random_in_eval_mode_is_said_to_be():
    model, x = Noisy().eval(), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)
    assert "random" in verify(model, plan, x).unproven
    with pytest.warns(UserWarning, match="could not be verified"):
        compact(model, plan, verify=x)


def test_integers_are_compared_as_such():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.small("chain")

        def forward(self, x):
            return self.net(x).argmax(1)

    model, x = Classes().eval(), nets.inputs()
    assert verify(model, random_plan(trace(model, x), 0.5), x).difference == 0


def test_a_plan_without_its_graph_asks_for_it(tmp_path):
    model, x, graph, plan = planned("chain")
    taylored.save(*_cut(model, plan), tmp_path / "m")
    there = taylored.load(copy.deepcopy(nets.small("chain")), tmp_path / "m")
    with pytest.raises(PlanError, match="graph="):
        compact(model, there, verify=x)
    compact(model, there, verify=x, graph=graph)


def _cut(model, plan):
    model = copy.deepcopy(model)
    compact(model, plan)
    return model, plan


def test_prune_verifies_each_cut_on_few_examples(monkeypatch):
    import sys

    seen, module = [], sys.modules["taylored._compact"]
    found = module.prove
    monkeypatch.setattr(module, "prove", lambda *a: seen.append(len(a[3])) or found(*a))
    model, x = nets.small("chain"), nets.inputs(12)
    batches = [(x, torch.randint(5, (12,)))] * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prune(model, batches, nn.CrossEntropyLoss(), optimizer, x[:1], target_flops=0.6, rounds=2, final_epochs=0, progress=False)
    assert seen == [12, 12]


class Counts(nn.Module):
    """Its output is as long as many values are above zero: chaotic in its shape."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        y = self.net(x)
        return y[(y * 1e9).sin() > 0]


def test_outputs_whose_shape_is_chaotic_are_said_to_be():
    model, x = Counts(nets.small("chain")).eval(), nets.inputs(8)
    found = verify(model, random_plan(trace(model, x), 0.5), x)
    assert found.difference == 0 or "shapes" in found.unproven


def test_a_model_that_cannot_be_copied_or_does_not_run_in_eval_mode_is_said_to_be():
    model, x = nets.small("chain"), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)
    model.lock = __import__("threading").Lock()
    assert "cannot be copied" in verify(model, plan, x).unproven
    del model.lock
    assert "cannot be copied, or run" in verify(model, plan, x[:, :2]).unproven
    with pytest.warns(UserWarning, match="could not be verified"):
        compact(model, plan, verify=x[:, :2])
