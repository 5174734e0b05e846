"""Which criterion agrees with what a unit is really worth? `python examples/rank_criteria.py`

A small net on scikit-learn's digits: the oracle measures the loss without each unit, every criterion is held against it.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import taylored
from taylored.criteria import CRITERIA


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def main():
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images))
    model = nn.Sequential(
        block(1, 16), block(16, 32), nn.MaxPool2d(2), block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        for batch in order[torch.randperm(len(order))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    graph = taylored.trace(model, images[:1])
    batches = [(images[batch], labels[batch]) for batch in order[:256].split(64)]  # read several times: a list, no iterator
    loss_fn = nn.CrossEntropyLoss()
    oracle = taylored.oracle(model, graph, batches, loss_fn, progress=False)  # |change of the mean loss|, for every unit

    print(f"Spearman's rho with the oracle, {graph.units} units\n\n{'criterion':20} per group  all units  all units, L2")
    rows = []
    for name, criterion in CRITERIA.items():
        if not name.startswith("oracle"):
            rho = taylored.spearman(criterion(model, graph, batches, loss_fn), oracle)
            rows.append((rho.per_group, f"{name:20} {rho.per_group:9.2f}  {rho.all_units:9.2f}  {rho.all_units_l2:13.2f}"))
    print("\n".join(row for _, row in sorted(rows, reverse=True)))


if __name__ == "__main__":
    main()
