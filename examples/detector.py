"""A detector of torchvision, whose loss is computed inside: `python examples/detector.py`.

Random weights and random images: this shows which calls there are, not how accurate a model stays.
"""

import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

import taylored


def main():
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    images = [torch.rand(3, 320, 320) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[20.0, 20, 200, 200]]), "labels": torch.tensor([1])} for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    graph = taylored.trace(model, ([images[0]],))  # the model's one argument is a list of images
    print(graph)

    def step():
        model.train()
        optimizer.zero_grad()
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        return loss.item()

    with taylored.TaylorScorer(model, graph) as scorer:
        print(f"loss {step():.3f}")
    plan = taylored.make_plan(graph, scorer.scores(), target_flops=0.6, round_to=8)
    taylored.compact(model, plan, optimizer)
    print(plan)
    print(f"loss of the smaller model {step():.3f}")

    model.eval()
    with torch.no_grad():
        found = model(images)
    print(f"boxes found: {[len(f['boxes']) for f in found]}")


if __name__ == "__main__":
    main()
