"""The CUDA kernels, without a GPU: the sources nvcc compiles run under tests/simt's execution model and are held to the CPU
operators, to the same bits under hostile schedules, to the checker's silence and to the least memory traffic."""

import math

import numpy as np
import pytest
import simt_build as simt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taylored import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last"]
MAP_OPS = ["contribution", "relu_backward", "channel_statistics"]
HOSTILE = [
    {"schedule": schedule, "seed": seed, "resident_blocks": 1 + 2 * seed} for schedule in simt.SCHEDULES for seed in range(5)
]

name = lambda value: str(value).removeprefix("torch.")  # noqa: E731
each_op = pytest.mark.parametrize("op", MAP_OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def kernels():
    return simt.load("kernels")


# -- reductions over maps ----------------------------------------------------------------------------------------------


def random_maps(shape, dtype, seed=0):
    """x, about a quarter zeros, and g."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    return (x * (torch.rand(shape, generator=generator) > 0.25)).to(dtype), g.to(dtype)


def as_memory(x, layout):
    """x as it lies in memory: a NumPy array, 16-bit floats as integers."""
    last = layout == "channels_last" and math.prod(x.shape[2:]) > 1
    memory = (x.movedim(1, -1) if last else x).contiguous()
    return (memory.view(torch.int16) if x.itemsize == 2 else memory).numpy().copy()


def run(kernels, op, x, g, layout, options):
    """What the kernel makes of two maps: its outputs, as the CPU operator returns them, and the model's report."""
    memory = as_memory(x, layout)
    n, c, positions = *x.shape[:2], math.prod(x.shape[2:])
    # With one channel channels_last is contiguous, too: so says torch.
    view = (n, c, positions, layout == "contiguous" or c == 1)
    wide = np.float64 if x.dtype == torch.float64 else np.float32
    types = [wide, wide, np.int64] if op == "channel_statistics" else [wide]
    results = [np.full(x.shape[:2], -1, t) for t in types]
    other = None if op == "channel_statistics" else as_memory(g, layout)
    out = np.full_like(memory, -1) if op == "relu_backward" else None
    report = getattr(kernels, op)(options, name(x.dtype), view, memory, other, out, results)
    outputs = [torch.from_numpy(r) for r in results]
    if out is not None:
        gradient = torch.from_numpy(out).view(x.dtype)
        outputs.insert(0, gradient.movedim(-1, 1) if gradient.shape != x.shape else gradient)
    return outputs, report


def on_cpu(op, x, g):
    results = ops.channel_statistics(x) if op == "channel_statistics" else getattr(ops, op)(x, g)
    return results if isinstance(results, tuple) else (results,)


def check(kernels, op, x, g, layout, options):
    x = x.relu() if op == "relu_backward" else x
    outputs, report = run(kernels, op, x, g, layout, options)
    simt.assert_clean(kernels, report)
    sizes = on_cpu(op, x.abs(), g.abs())  # of the terms of each sum: what rounding is relative to
    for ours, theirs, size in zip(outputs, on_cpu(op, x, g), sizes, strict=True):
        if ours.dtype == torch.int64 or (op == "relu_backward" and ours is outputs[0]):  # zeros, and the gradient
            assert torch.equal(ours, theirs)
        else:
            assert ours.dtype == theirs.dtype
            tolerance = 2.0**-48 if x.dtype == torch.float64 else 2.0**-20
            assert ((ours - theirs).abs() <= tolerance * size).all()
    return outputs, report


small = st.lists(st.integers(0, 12), min_size=2, max_size=5).filter(lambda shape: math.prod(shape) < 20_000)
few_large = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(30, 90), st.integers(30, 90))
many_small = st.tuples(st.integers(1, 2), st.integers(1, 700), st.integers(1, 5), st.integers(1, 5))
one_row = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1900, 20_000))


@each_op
@each_dtype
@each_layout
def test_map_kernel_equals_the_cpu_operator(kernels, op, dtype, layout):
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.one_of(small, few_large, many_small, one_row), st.integers(0, 99), st.sampled_from([0, 0, 1]))
    def holds(shape, seed, off):
        x, g = random_maps(shape, dtype, seed)
        options = {"seed": seed, "misalign": {"g": off * x.itemsize}}  # one pointer off: one element at a time
        check(kernels, op, x, g, layout, options)

    holds()


@each_op
@each_layout
@pytest.mark.parametrize("shape", [(n, c, *p) for n in (1, 5) for c in (1, 3) for p in ((), (1, 1), (0,), (2, 1))], ids=str)
def test_maps_of_one_channel_or_one_position(kernels, op, layout, shape):
    check(kernels, op, *random_maps(shape, torch.float32), layout, {"schedule": "ascending"})


@each_op
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_largest_maps(kernels, op, layout, dtype):
    x, g = random_maps((1, 2, 512, 512), dtype)
    _, report = check(kernels, op, x, g, layout, {"schedule": "ascending"})
    assert "fold_splits" in report["kernels"]


@each_op
@each_dtype
@each_layout
@pytest.mark.parametrize("shape", [(2, 20, 7, 7), (1, 20, 40, 40), (1, 1, 131, 131)], ids=str)
def test_map_kernel_gives_the_same_bits_under_hostile_schedules(kernels, op, dtype, layout, shape):
    x, g = random_maps(shape, dtype)
    first = None
    for options in HOSTILE:
        outputs, report = run(kernels, op, x, g, layout, options)
        simt.assert_clean(kernels, report)
        bits = [output.contiguous().view(torch.uint8) for output in outputs]
        first = first or bits
        assert all(map(torch.equal, bits, first))


# channels, height and width: VGG16's and ResNet-50's
REAL = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14), (512, 7), (64, 112), (64, 56), (128, 28), (1024, 14), (2048, 7)]


@each_op
@each_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name)
def test_traffic_of_maps_is_minimal(kernels, op, layout, dtype):
    for channels, size in REAL:
        x, g = random_maps((1, channels, size, size), dtype)
        outputs, report = run(kernels, op, x, g, layout, {"schedule": "ascending"})
        simt.assert_clean(kernels, report)
        moved = [kernel[way] for kernel in report["kernels"].values() for way in ("loads", "stores", "atomics")]
        inputs = [x] if op == "channel_statistics" else [x, g]
        least = sum(tensor.numel() * tensor.itemsize for tensor in [*inputs, *outputs])
        bytes_moved, sectors = (sum(m[what] for m in moved) for what in ("bytes", "sectors"))
        assert least <= bytes_moved <= 1.02 * least, (channels, size)
        assert bytes_moved >= (0.98 if size >= 8 else 0.9) * 32 * sectors, (channels, size)


# -- accumulate_ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name)
def test_accumulate_equals_the_cpu_operator_and_keeps_its_bits(kernels, reduction, dtype):
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(0, 40), st.integers(1, 150), st.lists(st.booleans(), min_size=1, max_size=4), st.integers(0, 99))
    def holds(examples, units, wide, seed):
        torch.manual_seed(seed)
        t = [torch.randn(examples, units, dtype=torch.float64 if w else torch.float32) for w in wide]
        before = torch.rand(units, dtype=dtype)
        expected = ops.accumulate_(before.clone(), t, reduction, 0.3)
        first = None
        for options in HOSTILE[:: 1 if seed < 30 else 7]:
            total = before.clone()
            arrays = [one.numpy() for one in t]
            report = kernels.accumulate_(options, total.numpy(), arrays, ops.REDUCTIONS[reduction], 0.3)
            simt.assert_clean(kernels, report)
            first = total if first is None else first
            assert torch.equal(total, first)
        torch.testing.assert_close(first, expected, rtol=1e-12 if dtype == torch.float64 else 2e-7, atol=1e-12)

    holds()


# -- compact_ ----------------------------------------------------------------------------------------------------------

KEEPS = {
    "random": lambda random, size: np.flatnonzero(random.random(size) < random.random()),
    "all": lambda random, size: np.arange(size),
    "one": lambda random, size: random.integers(size, size=1),
    "first": lambda random, size: np.arange(1 + random.integers(size)),
    "last": lambda random, size: np.arange(random.integers(size), size),
}


def random_cut(random, item, kind):
    """A shape of up to some 100 KB in one to four dimensions, and what to keep of at least one of them."""
    rank = random.integers(1, 5)
    target = 2 ** random.uniform(4, 17) / item
    shape = np.maximum(1, target ** random.dirichlet(np.ones(rank))).astype(int)
    shape[random.integers(rank)] += 1
    cut = random.permutation(rank)[: random.integers(1, min(rank, 3) + 1)]
    keep = [None] * rank
    for d in cut:
        kept = KEEPS[kind if d == cut[0] else random.choice(list(KEEPS))](random, shape[d])
        keep[d] = kept.astype(np.int64) if len(kept) else np.zeros(1, np.int64)
    return tuple(shape), keep


def select(x, keep):
    for d, kept in enumerate(keep):
        x = x if kept is None else x.take(kept, d)
    return x


@pytest.mark.parametrize("kind", KEEPS)
@pytest.mark.parametrize("item", [1, 2, 4, 8, 16])
def test_compaction_is_exact(kernels, item, kind):
    random = np.random.default_rng([item, *kind.encode()])
    for case in range(24):
        shape, keep = random_cut(random, item, kind)
        dtype = np.dtype({16: "c16"}.get(item, f"u{item}"))
        x = [random.bytes(math.prod(shape) * item) for _ in range(random.integers(1, 4))]
        x = [np.frombuffer(bytearray(one), dtype).reshape(shape) for one in x]
        expected = [select(one, keep).tobytes() for one in x]
        options = HOSTILE[case % len(HOSTILE)] | {"misalign": {"x0": item * int(random.integers(2))}}
        report = kernels.compact_(options, x, keep)
        simt.assert_clean(kernels, report)
        assert [one.tobytes()[: len(kept)] for one, kept in zip(x, expected)] == expected, (shape, keep)


@pytest.mark.parametrize("shape", [(96, 64, 3, 3), (300, 200)], ids=str)
def test_compaction_of_two_dimensions_under_hostile_schedules(kernels, shape):
    random = np.random.default_rng(0)
    keep = [np.sort(random.permutation(size)[: size // 2]) for size in shape[:2]] + [None] * (len(shape) - 2)
    original = random.random(shape, np.float32)
    for options in HOSTILE:
        x = original.copy()
        simt.assert_clean(kernels, kernels.compact_(options, [x], keep))
        expected = select(original, keep)
        assert np.array_equal(x.ravel()[: expected.size], expected.ravel())


def test_offsets_of_compaction_beyond_32_bits(kernels):
    random = np.random.default_rng(1)
    shape = (70_000, 3, 90_000)
    keep = [np.sort(random.permutation(70_000)[:50_000]), None, np.sort(random.permutation(90_000)[:60_000])]
    for j in random.integers(50_000 * 3 * 60_000, size=200):
        row, middle, column = np.unravel_index(j, (50_000, 3, 60_000))
        source = int(np.ravel_multi_index((keep[0][row], middle, keep[2][column]), shape))
        assert kernels.compact_offsets(shape, keep, int(j)) == (source, j)
