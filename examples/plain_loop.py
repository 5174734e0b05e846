"""A training loop of one's own, pruned in three rounds: `python examples/plain_loop.py`.

scikit-learn's digits, a small net, AdamW with a schedule and a moving average; what is left is saved and loaded again.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import taylored

BUDGETS = (0.75, 0.6, 0.5)  # of the FLOPs, round by round


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def build():
    pool, head = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)
    return nn.Sequential(block(1, 32), block(32, 64), nn.MaxPool2d(2), block(64, 64), pool, nn.Flatten(), head)


def main():
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images))
    test, train = order[:360], order[360:]

    def accuracy(model):
        model.eval()
        with torch.no_grad():
            return (model(images[test]).argmax(1) == labels[test]).float().mean().item()

    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12 + len(BUDGETS))

    def train_epoch():
        model.train()
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            average.update_parameters(model)
        scheduler.step()

    for _ in range(6):
        train_epoch()
    print(f"trained: accuracy {accuracy(model):.2%}")

    original, total = taylored.trace(model, images[:1]).flops, None
    for budget in BUDGETS:
        graph = taylored.trace(model, images[:1])
        with taylored.TaylorScorer(model, graph) as scorer:
            train_epoch()
        plan = taylored.make_plan(graph, scorer.scores(), target_flops=int(budget * original), round_to=8)
        taylored.compact(model, plan, optimizer, also=[average])
        total = plan if total is None else total.then(plan)
        print(f"{total.flops[1] / original:.1%} of the FLOPs: accuracy {accuracy(model):.2%} before any retraining")
    for _ in range(6):
        train_epoch()
    print(f"fine-tuned: accuracy {accuracy(model):.2%}, of its average {accuracy(average):.2%}")

    with tempfile.TemporaryDirectory() as folder:
        taylored.save(model, total, Path(folder) / "pruned.safetensors")
        again = build()
        taylored.load(again, Path(folder) / "pruned.safetensors")
    assert accuracy(again) == accuracy(model)


if __name__ == "__main__":
    main()
