"""Teach a trace what an operator of one's own does to channels: `python examples/operator_rule.py`."""

import torch
from torch import nn

import taylored


@torch.library.custom_op("mylib::scale", mutates_args=())
def scale(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] times one factor per channel [C]."""
    return x * factor[:, None, None]


@scale.register_fake
def _(x, factor):
    return torch.empty_like(x)


def backward(ctx, gradient):
    x, factor = ctx.saved_tensors
    return gradient * factor[:, None, None], (gradient * x).sum((0, 2, 3))


scale.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.factor = nn.Parameter(torch.rand(16))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.head(scale(self.conv(x), self.factor)).mean((2, 3))


def main():
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(32, 3, 8, 8), torch.randint(4, (32,))
    print("without a rule:", taylored.trace(model, x[:1]).explain("conv"), sep="\n")

    @taylored.trace_rule("mylib::scale")
    def rule(labels, func, args, kwargs, out):
        label = labels.channels(args[0], 1)  # [C], or None where x has no labels
        labels.match(label, labels.channels(args[1], 0), "scaled by constants")  # the same channels go from both
        labels.emit(out, 1, label)

    graph = taylored.trace(model, x[:1])
    print("\nwith one:", graph.explain("conv"), sep="\n")

    with taylored.TaylorScorer(model, graph) as scorer:
        nn.functional.cross_entropy(model(x), y).backward()
    plan = taylored.make_plan(graph, scorer.scores(), remove_units=8)

    # A rule is believed: hold the masked and the compacted model together.
    with torch.no_grad(), taylored.masked(model, graph, plan):
        masked = model(x)
    taylored.compact(model, plan)
    with torch.no_grad():
        error = (model(x) - masked).abs().max().item()
    print(f"\n{plan}\ncompacted and masked differ by {error:.1g}; factor has {len(model.factor)} entries")
    assert error < 1e-6


if __name__ == "__main__":
    main()
