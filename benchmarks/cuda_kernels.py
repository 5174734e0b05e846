"""The operators on a GPU against eager PyTorch and torch.compile, at VGG16's map sizes: CUDA events, warm-up, medians, inputs
rotated so that none is still in the level 2 cache, contenders taking turns. Results are compared before anything is timed.
Without a GPU it says so and stops.

    python benchmarks/cuda_kernels.py
"""

import itertools
import statistics

import torch

from taylored import ops

BATCH = 32
VGG16 = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]  # channels, height and width
ROTATED = 512 << 20  # bytes of input that pass before one comes again: several times any level 2 cache
WARM_UP, CALLS = 5, 60


def medians(contenders, inputs):
    """Median milliseconds of each contender over inputs in turn, ``{name: callable} -> {name: float}``."""
    times = {name: [] for name in contenders}
    turns = itertools.cycle(inputs)
    for call in range(WARM_UP + CALLS):
        events = {}
        for name, function in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            arguments = next(turns)
            begin.record()
            function(*arguments)
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        if call >= WARM_UP:
            for name, (begin, end) in events.items():
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def rotated(make):
    """Enough sets of inputs to outgrow the cache."""
    first = make()
    size = sum(tensor.numel() * tensor.itemsize for tensor in first)
    return [first, *(make() for _ in range(min(63, ROTATED // size)))]


def compare(contenders, arguments, **tolerance):
    results = {name: function(*arguments) for name, function in contenders.items()}
    expected = results.pop("taylored")
    for name, result in results.items():
        torch.testing.assert_close(expected, result, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def row(label, contenders, inputs, moved):
    """One line: medians, ratios to ours, and the bandwidth that our median and the least traffic amount to."""
    found = medians(contenders, inputs)
    ours = found["taylored"]
    cells = "".join(f"{name:>16} {ms:8.3f} ms {ms / ours:5.2f}x" for name, ms in found.items())
    print(f"{label:40}{cells}{moved / ours / 1e6:10.0f} GB/s", flush=True)


def score(x, g):  # (a * g).mean((2, 3)).abs().mean(0), arXiv:1611.06440, summed over examples
    return (x.float() * g.float()).sum((2, 3))


def relu_and_score(y, g):
    return torch.ops.aten.threshold_backward(g, y, 0), score(y, g)


def statistics_of(x):
    wide = x.float()
    return wide.sum((2, 3)), wide.square().sum((2, 3)), (x == 0).sum((2, 3))


# name, ours, plain torch, number of maps read and written
OPERATORS = [
    ("contribution", ops.contribution, score, 2, 0),
    ("relu_backward", ops.relu_backward, relu_and_score, 2, 1),
    ("channel_statistics", ops.channel_statistics, statistics_of, 1, 0),
]


def time_maps():
    for name, ours, plain, reads, writes in OPERATORS:
        for dtype, layout in itertools.product((torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last)):
            for channels, side in VGG16:

                def make(shape=(BATCH, channels, side, side), dtype=dtype, layout=layout, reads=reads):
                    maps = [torch.randn(shape, device="cuda", dtype=dtype).relu() for _ in range(reads)]
                    return [x.contiguous(memory_format=layout) for x in maps]

                torch._dynamo.reset()
                contenders = {"taylored": ours, "eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
                inputs = rotated(make)
                compare(contenders, inputs[0], rtol=1e-4, atol=1e-2)
                x = inputs[0][0]
                kind = f"{str(dtype).removeprefix('torch.')} {'NCHW' if layout is torch.contiguous_format else 'NHWC'}"
                label = f"{name} {channels}x{side}x{side} {kind}"
                row(label, contenders, inputs, (reads + writes) * x.numel() * x.itemsize)


def time_compact():
    for shape in ((4096, 25088), (512, 512, 3, 3)):
        keep = {d: torch.randperm(shape[d])[: shape[d] // 2].sort().values.cuda() for d in (0, 1)}

        def ours(x, keep=keep):
            return ops.compact_(x, keep)

        def plain(x, keep=keep):
            return x.index_select(0, keep[0]).index_select(1, keep[1])

        x = torch.randn(shape, device="cuda")
        torch.testing.assert_close(ours(x.clone()), plain(x), rtol=0, atol=0)
        inputs = rotated(lambda shape=shape: [torch.randn(shape, device="cuda")])
        # What an input holds after a call is another tensor of the same shape: compacted again, it costs the same.
        row(f"compact_ {'x'.join(map(str, shape))}", {"taylored": ours, "eager": plain}, inputs, 0.75 * x.numel() * x.itemsize)


def main():
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU (torch.cuda.is_available() is False); nothing was measured")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {BATCH}; medians of {CALLS} calls")
    time_maps()
    time_compact()


if __name__ == "__main__":
    main()
