"""Random programs, cut at random: how many are cut exactly, how many keep their channels for a reason, and how many are wrong.

A program is two convolutions with one to three steps between them, drawn from grammar.py and grammar_layers.py: what forward
passes do to channels, rightly or in ways that do not survive a cut. Each is traced, a random half of every group is removed, and
the compacted model is compared with the masked one in float64, in eval mode, and runs in training mode. Exact: filters of the
first convolution can go. Wrong must be 0.

    OMP_NUM_THREADS=1 python benchmarks/programs.py [--count 1000] [--seed 0] [--first] [--list]

--first draws from the 77 steps alone with which it began.
"""

import argparse
import collections
import random
import warnings

import torch
from grammar import CHANNELS, FIRST, MORE, SIZE
from grammar_layers import LAYERS
from torch import nn

import taylored

STEPS = {**FIRST, **MORE, **LAYERS}


class Program(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 1)
        self.layers = nn.ModuleDict({str(i): LAYERS[step]() for i, step in enumerate(steps) if step in LAYERS})
        self.steps = steps

    def forward(self, x):
        y = first = self.a(x)
        for i, step in enumerate(self.steps):
            if step == "beside":  # what came so far is a number for each example, and the first map goes on
                y = first * y.tanh().mean((1, 2, 3), keepdim=True)
            else:
                y = (self.layers[str(i)] if step in LAYERS else STEPS[step])(y)
        return self.b(y)


def judge(steps, seed) -> tuple[str, str]:
    """("exact", ""), ("kept" or "refused", the reason) or ("wrong", by how much)."""
    torch.manual_seed(seed)
    model, x = Program(steps).eval(), torch.randn(2, 3, SIZE, SIZE)
    try:
        model(x)
    except RuntimeError as error:
        return "no program", str(error)
    try:
        graph = taylored.trace(model, x)
        why = "" if any("a" in group.layers for group in graph.groups) else graph.explain("a").splitlines()[-1]
        if not graph.groups:
            return "kept", why
        plan = taylored.random_plan(graph, 0.5, seed)
    except (taylored.TraceError, taylored.PlanError) as error:
        return "refused", str(error)
    model, x = model.double(), x.double()
    with torch.no_grad():
        with taylored.masked(model, graph, plan):
            expected = model(x)
        taylored.compact(model, plan)
        try:
            difference = float((model(x) - expected).abs().max() / expected.abs().max())
            model.train()(x)
        except RuntimeError as error:
            return "wrong", str(error)
    if not difference < 1e-9:
        return "wrong", f"{difference:.2g}"
    return ("kept", why) if why else ("exact", "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", action="store_true", help="draw from the first 77 steps alone")
    parser.add_argument("--list", action="store_true", help="print every program")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float32)
    names = list(FIRST if options.first else STEPS)
    draw, found = random.Random(options.seed), collections.Counter()
    programs = [(name,) for name in names]
    programs += [tuple(draw.choices(names, k=draw.randint(2, 3))) for _ in range(options.count - len(programs))]
    for number, steps in enumerate(programs):
        verdict, why = judge(steps, number)
        found[verdict] += 1
        if options.list or verdict in ("wrong", "refused"):
            print(f"{verdict:10} {' | '.join(steps)}: {why[:160]}")
    print("\n".join(f"{verdict:10} {count:5} {count / len(programs):6.1%}" for verdict, count in found.most_common()))
    raise SystemExit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
