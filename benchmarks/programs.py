"""Random programs, cut at random: how many are cut exactly, how many keep their channels for a reason, and how many are wrong.

A program is two convolutions with one to three steps between them, drawn from `STEPS`: what forward passes do to channels,
rightly or in ways that do not survive a cut. Each is traced, a random half of every group is removed, and the compacted model is
compared with the masked one in float64, in eval mode. Wrong must be 0.

    OMP_NUM_THREADS=1 python benchmarks/programs.py [--count 700] [--seed 0] [--list]
"""

import argparse
import collections
import math
import random
import warnings

import torch
from torch import nn
from torch.nn import functional as F

import taylored

CHANNELS, SIZE = 8, 8


def spatial(y):
    """The map as it was, where a step made it smaller."""
    return y if y.shape[2:] == (SIZE, SIZE) else F.interpolate(y, size=(SIZE, SIZE))


def written(y, write):
    w = torch.ones(1, y.shape[1], 1, 1, dtype=y.dtype)
    write(w)
    return y * w


def buffer(y):
    out = torch.zeros(len(y), y.shape[1], SIZE + 2, SIZE + 2, dtype=y.dtype)
    out[:, :, 1:-1, 1:-1] = y
    return out


def shuffled(y, groups):
    return y.view(len(y), groups, -1, SIZE, SIZE).transpose(1, 2).reshape(y.shape)


def stacked(y):
    return torch.stack(torch.unbind(y, 2), 2)


# name -> a function of [N, C, 8, 8] that gives such a map again
STEPS = {
    # element by element, constants of one value
    "relu": torch.relu,
    "silu": F.silu,
    "mish in place": lambda y: F.mish(y, inplace=True),
    "hardtanh": F.hardtanh,
    "leaky": lambda y: F.leaky_relu(y, inplace=True),
    "scaled": lambda y: y * 0.5 + 1,
    "ones": lambda y: y * torch.ones_like(y),
    "where": lambda y: torch.where(y > 0, y, y * 0.1),
    "clamp": lambda y: y.clamp(-1, 1),
    "dropout": lambda y: F.dropout(y, 0.5, False),
    "ones of C": lambda y: y * torch.ones(y.shape[1])[:, None, None],
    "ramp over space": lambda y: y * torch.linspace(0, 1, y.shape[3]),
    "root of the width": lambda y: y / math.sqrt(y.shape[3]),
    "gate": lambda y: y * y.mean((2, 3), keepdim=True).sigmoid(),
    "expanded gate": lambda y: y * y[:, :, :1, :1].sigmoid().expand_as(y),
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    # numbers and constants that depend on channels
    "root of the channels": lambda y: y / math.sqrt(y.shape[1]),
    "share": lambda y: y * (1 / y.shape[1]),
    "mean position": lambda y: y * (1 + torch.arange(y.shape[1]).float().mean()),
    "power": lambda y: y.relu() ** (y.shape[1] / 8),
    "filled": lambda y: y + torch.full((), float(y.shape[1])),
    "constants": lambda y: y * torch.linspace(0, 2, 8).view(1, -1, 1, 1),
    "ramp over channels": lambda y: y * torch.linspace(0, 2, y.shape[1]).view(1, -1, 1, 1),
    "written: copy": lambda y: written(y, lambda w: w.copy_(torch.arange(w.shape[1]).view(1, -1, 1, 1))),
    "written: item": lambda y: written(y, lambda w: w[:, 0].fill_(3)),
    "written: all": lambda y: written(y, lambda w: w.fill_(3)),
    "written: index_fill": lambda y: written(y, lambda w: w.index_fill_(1, torch.tensor([0, 1]), 3)),
    "written: mul": lambda y: written(y, lambda w: w.mul_(torch.linspace(0, 2, w.shape[1]).view(1, -1, 1, 1))),
    "written: part": lambda y: written(y, lambda w: w[:, : w.shape[1] // 2].mul_(2)),
    "index": lambda y: y * torch.arange(64.0).sin()[y.flatten(2).argmax(2)].mean(1)[:, None, None, None],
    # along other dimensions
    "max pool": lambda y: spatial(F.max_pool2d(y, 2)),
    "avg pool": lambda y: spatial(F.avg_pool2d(y, 2)),
    "adaptive": lambda y: spatial(F.adaptive_avg_pool2d(y, 3)),
    "unpool": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "bilinear": lambda y: spatial(F.interpolate(y, scale_factor=2, mode="bilinear")),
    "antialiased": lambda y: spatial(F.interpolate(y, scale_factor=0.5, mode="bicubic", antialias=True)),
    "reflect": lambda y: spatial(F.pad(y, (1, 1, 1, 1), mode="reflect")),
    "circular": lambda y: spatial(F.pad(y, (1, 1, 1, 1), mode="circular")),
    "replicate": lambda y: spatial(F.pad(y, (1, 0, 1, 0), mode="replicate")),
    "buffer": lambda y: spatial(buffer(y)),
    "flip": lambda y: y.flip(3),
    "roll": lambda y: y.roll(1, 2),
    "rot90": lambda y: y.rot90(1, (2, 3)),
    "cumsum": lambda y: y.cumsum(2),
    "sorted": lambda y: y.sort(3)[0],
    "transposed": lambda y: y.transpose(2, 3),
    "softmax over space": lambda y: y.flatten(2).softmax(2).view(y.shape),
    "fold": lambda y: F.fold(F.unfold(y, 2, stride=2).sigmoid(), (SIZE, SIZE), 2, stride=2),
    "stack": stacked,
    "gather": lambda y: y.gather(3, torch.arange(SIZE).flip(0).expand_as(y)),
    "chunked space": lambda y: torch.cat(y.chunk(2, 2)[::-1], 2),
    "fft": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=(SIZE, SIZE)),
    "sampled": lambda y: spatial(y[:, :, ::2, 1::2]),
    "norm over space": lambda y: y / (1 + y.norm(dim=(2, 3), keepdim=True)),
    "grid": lambda y: F.grid_sample(y, y.new_zeros(len(y), 8, 8, 2), align_corners=False),
    # over channels
    "max over channels": lambda y: (
        y * F.adaptive_max_pool1d(y.flatten(2).transpose(1, 2), 1).reshape(len(y), 1, SIZE, SIZE).sigmoid()
    ),
    "avg over channels": lambda y: y * F.adaptive_avg_pool3d(y.unsqueeze(1), (1, SIZE, SIZE)).squeeze(1).sigmoid(),
    "resized channels": lambda y: y * F.interpolate(y.mean((2, 3)).unsqueeze(1), size=2, mode="linear").mean(2)[..., None, None],
    "lrn": lambda y: F.local_response_norm(y, 3),
    "layer norm": lambda y: F.layer_norm(y, y.shape[1:]),
    "mean": lambda y: y - y.mean(1, keepdim=True),
    "softmax": lambda y: y.softmax(1),
    "max": lambda y: y * y.amax(1, keepdim=True).sigmoid(),
    "glu": lambda y: F.glu(torch.cat([y, y.tanh()], 1), 1),
    "group norm of tokens": lambda y: (
        y * F.group_norm(y.flatten(2).transpose(1, 2), SIZE * SIZE).relu().mean((1, 2)).view(-1, 1, 1, 1)
    ),
    # channels move
    "halves": lambda y: torch.cat([a.tanh() for a in y.chunk(2, 1)], 1),
    "swapped": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "added halves": lambda y: torch.cat([sum(y.chunk(2, 1))] * 2, 1),
    "shuffle": lambda y: shuffled(y, 2),
    "flattened": lambda y: y.flatten(1).view(y.shape),
    "slice of all": lambda y: y * torch.ones(1, CHANNELS, 1, 1)[:, : y.shape[1]],
    "first half": lambda y: torch.cat([y[:, :4], y[:, 4:] * 2], 1),
    "permuted": lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "doubled": lambda y: torch.cat([y, y], 1)[:, : y.shape[1]],
    "einsum": lambda y: torch.einsum("nchw,c->nchw", y, torch.ones(y.shape[1], dtype=y.dtype)),
    "pixels": lambda y: F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2),
}


class Program(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 1)
        self.steps = steps

    def forward(self, x):
        y = self.a(x)
        for step in self.steps:
            y = STEPS[step](y)
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
        if not graph.groups:
            return "kept", graph.explain("a").splitlines()[-1]
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
        except RuntimeError as error:
            return "wrong", str(error)
    return ("exact", "") if difference < 1e-9 else ("wrong", f"{difference:.2g}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print every program")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float32)
    draw, found, of_step = random.Random(options.seed), collections.Counter(), collections.defaultdict(collections.Counter)
    programs = [(name,) for name in STEPS]
    programs += [tuple(draw.choices(list(STEPS), k=draw.randint(2, 3))) for _ in range(options.count - len(programs))]
    for number, steps in enumerate(programs):
        verdict, why = judge(steps, number)
        found[verdict] += 1
        if len(steps) == 1:
            of_step[steps[0]][verdict] += 1
        if options.list or verdict in ("wrong", "refused"):
            print(f"{verdict:10} {' | '.join(steps)}: {why[:160]}")
    print("\n".join(f"{verdict:10} {count:5} {count / len(programs):6.1%}" for verdict, count in found.most_common()))
    raise SystemExit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
