"""The paper's score of one layer, ``(a * g).mean((2, 3)).abs().mean(0)`` (arXiv:1611.06440), on VGG16's five map sizes
at batch 8, float32: eager torch, torch.compile, and contribution + accumulate_. Then ReLU's backward pass, plain and
with the contribution fused in. Results are compared before anything is timed.

    python benchmarks/contribution.py
"""

import torch
from timer import Table, side_by_side

from taylored import ops

MAPS = [(8, 64, 224, 224), (8, 128, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28), (8, 512, 14, 14)]


def eager(a, g):
    return (a * g).mean((2, 3)).abs().mean(0)


def ours(a, g):
    total = torch.zeros(a.shape[1])
    positions = a.shape[2] * a.shape[3]
    return ops.accumulate_(total, [ops.contribution(a, g)], "abs", 1 / positions).div_(len(a))


def plain_backward(y, g):
    return torch.ops.aten.threshold_backward(g, y, 0)


def backward_then_score(y, g):
    return plain_backward(y, g), ops.contribution(y, g)


def label(shape):
    return "x".join(map(str, shape))


def main():
    for layout in (torch.contiguous_format, torch.channels_last):
        table = Table(f"score of one layer, {str(layout).removeprefix('torch.')}", "taylored")
        for shape in MAPS:
            torch._dynamo.reset()  # one specialised kernel, no guards of other shapes before it
            compiled = torch.compile(eager, dynamic=False)
            a, g = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
            contenders = {
                "taylored": lambda a=a, g=g: ours(a, g),
                "torch.compile": lambda a=a, g=g, compiled=compiled: compiled(a, g),
                "eager": lambda a=a, g=g: eager(a, g),
            }
            expected = eager(a.double(), g.double()).float()
            for function in contenders.values():
                torch.testing.assert_close(function(), expected, rtol=1e-4, atol=1e-6)
            table.row(label(shape), side_by_side(contenders, seconds=2))

    table = Table("ReLU's backward pass", "fused with score")
    for shape in MAPS:
        y, g = torch.randn(shape).relu(), torch.randn(shape)
        contenders = {
            "fused with score": lambda y=y, g=g: ops.relu_backward(y, g),
            "plain": lambda y=y, g=g: plain_backward(y, g),
            "plain, then score": lambda y=y, g=g: backward_then_score(y, g),
        }
        for fused, separate in zip(ops.relu_backward(y, g), backward_then_score(y, g)):
            torch.testing.assert_close(fused, separate)
        table.row(label(shape), side_by_side(contenders, seconds=2))


if __name__ == "__main__":
    main()
