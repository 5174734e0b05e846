"""Keep a random half of both dimensions of every VGG16 weight: compact_, in place, against torch's ways of building the
smaller tensor, the fastest of which counts, layer by layer and in sum. The first linear layer keeps whole channels of
the last map: blocks of 49 columns. Results are compared before anything is timed.

    python benchmarks/compact_op.py
"""

import torch
from timer import Table, side_by_side

from taylored import ops

CHANNELS = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
LAYERS = [(f"conv {o}x{i}x3x3", (o, i, 3, 3), 1) for i, o in zip(CHANNELS, CHANNELS[1:])]
LAYERS += [("linear 4096x25088", (4096, 25088), 49), ("linear 4096x4096", (4096, 4096), 1)]


def half(size, block=1):
    """A random half of the channels, each a block of indices. An input image keeps its three."""
    if size == 3:
        return torch.arange(3)
    channels = torch.randperm(size // block)[: size // block // 2].sort().values
    return (channels[:, None] * block + torch.arange(block)).flatten()


TORCH = {
    "index_select twice": lambda w, r, c: w.index_select(0, r).index_select(1, c),
    "select columns first": lambda w, r, c: w.index_select(1, c).index_select(0, r),
    "w[r][:, c]": lambda w, r, c: w[r][:, c],
    "w[r[:, None], c]": lambda w, r, c: w[r[:, None], c],
}


def main():
    table = Table("keep half of both dimensions, float32", "taylored")
    total = {"taylored": 0.0, "torch's fastest": 0.0}
    for name, shape, block in LAYERS:
        weight, rows, columns = torch.randn(shape), half(shape[0]), half(shape[1], block)
        scratch = weight.clone()
        expected = weight[rows][:, columns]
        for way in TORCH.values():
            assert torch.equal(way(weight, rows, columns), expected)
        assert torch.equal(ops.compact_(weight.clone(), {0: rows, 1: columns}), expected)

        # All read `scratch`, so that nobody's input is warmer than another's. Compacting again and again changes its
        # values, but not the moves.
        contenders = {"taylored": lambda: ops.compact_(scratch, {0: rows, 1: columns})}
        contenders |= {way: lambda f=f: f(scratch, rows, columns) for way, f in TORCH.items()}
        medians = side_by_side(contenders, seconds=2 if weight.numel() > 1e6 else 1)
        table.row(name, medians)
        total["taylored"] += medians.pop("taylored")
        total["torch's fastest"] += min(medians.values())
    Table("the whole of VGG16", "taylored").row("sum of layers", total)


if __name__ == "__main__":
    main()
