"""What it costs to measure the inputs of all consumers: a forward pass with `InputMoments` beside the plain one, and the memory.

OMP_NUM_THREADS=1 python benchmarks/moments.py [--size 224] [--batch 8]
"""

import argparse

import torch
from timer import Table, side_by_side
from torchvision import models

import taylored

NAMES = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    table = Table(f"a forward pass, batch {options.batch}, {options.size} x {options.size}, channels last", "plain")
    for name in NAMES:
        torch.manual_seed(0)
        plain = models.get_model(name, weights=None).eval().to(memory_format=torch.channels_last)
        measured = models.get_model(name, weights=None).eval().to(memory_format=torch.channels_last)
        x = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
        moments = taylored.InputMoments(measured, taylored.trace(measured, x[:1]))
        with moments, torch.no_grad():
            times = side_by_side({"plain": lambda m=plain, x=x: m(x), "measured": lambda m=measured, x=x: m(x)}, seconds=10)
        size = sum(m.products.nbytes for m in moments.moments.values()) / 2**20
        table.row(f"{name} ({size:.0f} MiB)", times)


if __name__ == "__main__":
    main()
