"""Cut the same random half of every group of ResNet-50, step by step, beside Torch-Pruning's graph and cut, where torch-pruning
1.6.1 is installed. Fresh models, made before the clock starts, take turns; the first results are compared before anything is
timed. The plan includes its rehearsal: the model runs as it will be, on the meta device.

    python benchmarks/compact_model.py [model]
"""

import copy
import importlib.util
import statistics
import sys
import time

import torch
from torchvision import models

import taylored

TURNS = 15


class Clock:
    """The seconds of every step, by its name."""

    def __init__(self):
        self.times = {}

    def __call__(self, step, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        self.times.setdefault(step, []).append(time.perf_counter() - start)
        return result


def ours(model, x, clock):
    graph = clock("trace", taylored.trace, model, x)
    plan = clock("plan, rehearsed", taylored.random_plan, graph, 0.5)
    clock("compact", taylored.compact, model, plan)
    return plan


def theirs(model, x, clock, plan):
    """The same units, group by group."""
    import torch_pruning as tp

    def cut():
        for name, units in plan.removed.items():
            group = plan.graph.group(name)
            layer = group.layers[0]
            filters = group.slots[f"{layer}.weight", 0][units].flatten().tolist()
            graph.get_pruning_group(model.get_submodule(layer), tp.prune_conv_out_channels, filters).prune()

    graph = clock("Torch-Pruning's graph", lambda: tp.DependencyGraph().build_dependency(model, example_inputs=x))
    clock("Torch-Pruning's cut", cut)


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    torch.manual_seed(0)
    original, x = models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    model, other = copy.deepcopy(original), copy.deepcopy(original)
    plan, peer = ours(model, x, Clock()), importlib.util.find_spec("torch_pruning") is not None
    if peer:
        theirs(other, x, Clock(), plan)
        with torch.no_grad():
            expected = model(x)
            assert (other(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    else:
        print("torch-pruning is not installed: its times are left out")
    clock = Clock()
    for _ in range(TURNS):
        ours(copy.deepcopy(original), x, clock)
        if peer:
            theirs(copy.deepcopy(original), x, clock, plan)
    print(f"{name}, {plan}\n({torch.get_num_threads()} threads, torch {torch.__version__}, {TURNS} turns)")
    for step, values in clock.times.items():
        print(f"{step:24} median {1e3 * statistics.median(values):8.1f} ms   least {1e3 * min(values):8.1f} ms")


if __name__ == "__main__":
    main()
