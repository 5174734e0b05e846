"""A 3x3 convolution that skips its input's zeros against torch's own, both channels-last, by the share of the input that is
not zero. Agreement is checked first.

    python benchmarks/sparse_conv.py
"""

import torch
from timer import Table, side_by_side

from taylored import ops

SHAPES = [(8, 64, 64, 56), (8, 128, 128, 56), (16, 256, 256, 28), (32, 512, 512, 14), (64, 512, 512, 4), (256, 512, 512, 2)]


@torch.inference_mode()
def main():
    torch.manual_seed(0)
    table = Table("one 3x3 convolution, float32", "taylored")
    for count, channels, outputs, size in SHAPES:
        weight = torch.randn(outputs, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        packed, bias = weight.permute(2, 1, 3, 0).contiguous(), torch.randn(outputs)
        for share in (1.0, 0.75, 0.5, 0.25, 0.1):
            x = torch.randn(count, channels, size, size) * (torch.rand(count, channels, size, size) < share)
            x = x.contiguous(memory_format=torch.channels_last)
            contenders = {
                "taylored": lambda x=x, packed=packed, bias=bias: ops.sparse_conv(x, packed, bias),
                "torch": lambda x=x, weight=weight, bias=bias: torch.conv2d(x, weight, bias, 1, 1),
            }
            ours, theirs = (run() for run in contenders.values())
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
            table.row(f"{count}x{channels}x{size}x{size}, {share:.0%}", side_by_side(contenders))


if __name__ == "__main__":
    main()
