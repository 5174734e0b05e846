"""What `round_to` is worth: the same net cut to half of its FLOPs with channel counts that are multiples of 1, 4, 8 and 16.
Scores are random, each group's alike in distribution. Models take turns, in channels_last, as `taylored prune` measures them.

    python benchmarks/round_to.py [model ...]
"""

import copy
import sys

import torch
from torchvision import models

import taylored
from taylored._cli import latency

BATCH, MULTIPLES = 8, (1, 4, 8, 16)


def main():
    for name in sys.argv[1:] or ("resnet50", "mobilenet_v2", "vgg16_bn"):
        torch.manual_seed(0)
        original = models.get_model(name, weights=None).eval().to(memory_format=torch.channels_last)
        graph = taylored.trace(original, torch.zeros(1, 3, 224, 224))
        scores = {g.name: torch.rand(g.units) for g in graph.groups}
        nets, plans = [original], [None]
        for multiple in MULTIPLES:
            plan = taylored.make_plan(graph, scores, target_flops=0.5, round_to=multiple)
            nets.append(copy.deepcopy(original))
            plans.append(plan)
            taylored.compact(nets[-1], plan, release=True)
        x = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        times = latency.milliseconds_per_image(nets, x, seconds=40.0)
        print(f"{name}, batch of {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for multiple, plan, ms in zip(("uncut", *MULTIPLES), plans, times, strict=True):
            flops = 1.0 if plan is None else plan.flops[1] / plan.flops[0]
            print(f"  round_to {multiple!s:>5}: {flops:6.1%} of the FLOPs, {ms:7.2f} ms per image, {times[0] / ms:.2f}x as fast")


if __name__ == "__main__":
    main()
