"""Cut the same random half of every group of ResNet-50: `compact` with and without its rehearsal, against Torch-Pruning's
groups, where torch-pruning 1.6.1 is installed. Fresh models, made before the clock starts, take turns; the first results are
compared before anything is timed. Finding the groups is timed too.

    python benchmarks/compact_model.py [model]
"""

import copy
import dataclasses
import statistics
import sys
import time

import torch
from torchvision import models

import taylored

TURNS = 15


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def torch_pruning(x, plan):
    """(build the graph of a model, cut the plan's units with it)."""
    import torch_pruning as tp

    def build(model):
        return tp.DependencyGraph().build_dependency(model, example_inputs=x)

    def cut(model, graph):
        for name, units in plan.removed.items():
            group = plan.graph.group(name)
            layer = group.layers[0]
            filters = group.slots[f"{layer}.weight", 0][units].flatten().tolist()
            graph.get_pruning_group(model.get_submodule(layer), tp.prune_conv_out_channels, filters).prune()

    return build, cut


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    torch.manual_seed(0)
    original, x = models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    plan = taylored.random_plan(taylored.trace(original, x), 0.5)
    alone = dataclasses.replace(plan, graph=None)  # as loaded from a file: nothing to rehearse with
    contenders = {
        "compact, moves alone": lambda model, _: taylored.compact(model, alone),
        "compact with rehearsal": lambda model, _: taylored.compact(model, plan),
    }
    graphs = {"trace": lambda model: taylored.trace(model, x)}
    try:
        graphs["Torch-Pruning's graph"], contenders["Torch-Pruning's cut"] = torch_pruning(x, plan)
    except ImportError:
        print("torch-pruning is not installed: its times are left out")
    outputs = []
    for contender in contenders.values():
        model = copy.deepcopy(original)
        graph = graphs["Torch-Pruning's graph"](model) if len(graphs) > 1 else None
        contender(model, graph)
        with torch.no_grad():
            outputs.append(model(x))
        assert (outputs[-1] - outputs[0]).abs().max() <= 1e-4 * outputs[0].abs().max()
    times = {name: [] for name in (*contenders, *graphs)}
    for _ in range(TURNS):
        for label, contender in contenders.items():
            model = copy.deepcopy(original)
            graph = graphs["Torch-Pruning's graph"](model) if "Torch" in label else None
            times[label].append(seconds(contender, model, graph))
        for label, build in graphs.items():
            times[label].append(seconds(build, copy.deepcopy(original)))
    print(f"{name}, {plan}\n({torch.get_num_threads()} threads, torch {torch.__version__}, {TURNS} turns)")
    for label, values in times.items():
        print(f"{label:24} median {1e3 * statistics.median(values):8.1f} ms   least {1e3 * min(values):8.1f} ms")


if __name__ == "__main__":
    main()
