"""A model of timm with its optimizer and moving average: `python examples/timm_model.py [NAME]`.

Random weights and random images: this shows which calls there are, not how accurate a model stays.
"""

import sys

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

import taylored


def main(name="mobilenetv3_small_050"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    size = 96
    batches = [(torch.randn(8, 3, size, size), torch.randint(10, (8,))) for _ in range(4)]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    average = ModelEmaV3(model)

    graph = taylored.trace(model, batches[0][0][:1])
    print(graph)

    def train_epoch():
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            average.update(model)

    with taylored.TaylorScorer(model, graph) as scorer:
        train_epoch()
    plan = taylored.make_plan(graph, scorer.scores(), target_flops=0.5, round_to=8)
    print(plan)

    model.eval()
    with torch.no_grad(), taylored.masked(model, graph, plan):
        zeroed = model(batches[0][0])
    taylored.compact(model, plan, optimizer, also=[average])
    with torch.no_grad():
        error = (model(batches[0][0]) - zeroed).abs().max() / zeroed.abs().max()
    print(f"the smaller model differs from the masked one by {error:.1g} of the largest output")
    assert error < 1e-4

    train_epoch()  # goes on with the same optimizer and average


if __name__ == "__main__":
    main(*sys.argv[1:])
