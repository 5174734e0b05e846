"""Every operator equals its float64 reference, over shapes, dtypes and layouts, and passes torch.library.opcheck."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taylored import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = st.lists(st.integers(0, 19), min_size=2, max_size=5)
some = settings(max_examples=60, deadline=None)


def laid_out(shape, layout, dtype, seed):
    """contiguous, channels last, or with gaps; about a quarter zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.25)
    x = x.to(dtype)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "gaps":
        return torch.stack([x, x], -1)[..., 0]
    return x


@some
@given(SIZES, st.sampled_from(["contiguous", "channels_last", "gaps"]), st.sampled_from(["contiguous", "channels_last"]),
       st.sampled_from(DTYPES), st.integers(0, 99))  # fmt: skip
def test_maps_are_reduced_as_in_float64(shape, layout, other_layout, dtype, seed):
    x, g = laid_out(shape, layout, dtype, seed), laid_out(shape, other_layout, dtype, seed + 1)
    t = ops.contribution(x, g)
    assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near(t, reference.contribution(x, g), reference.contribution(x.abs(), g.abs()))
    y = x.relu()
    gradient, t = ops.relu_backward(y, g)
    assert torch.equal(gradient, torch.where(y > 0, g, torch.zeros_like(g)))
    near(t, reference.contribution(y, g), reference.contribution(y, g.abs()))
    found, expected, sizes = ops.channel_statistics(x), reference.channel_statistics(x), reference.channel_statistics(x.abs())
    near(found[0], expected[0], sizes[0])
    near(found[1], expected[1], sizes[1])
    assert torch.equal(found[2], expected[2])


def near(sums, expected, size):
    """Sums may be off by the round-off of their terms, whose absolute values add up to size: they may cancel."""
    tolerance = 1e-14 if sums.dtype == torch.float64 else 1e-6
    assert ((sums.double() - expected.double()).abs() <= tolerance * size.double()).all()


def test_sums_of_large_maps_stay_exact_and_do_not_depend_on_threads():
    x = torch.rand(1, 3, 300, 301) + 1
    t = ops.contribution(x, x)
    torch.testing.assert_close(t.double(), reference.contribution(x, x), rtol=1e-6, atol=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.contribution(x, x), t)
        assert torch.equal(ops.contribution(x, x), t)
    finally:
        torch.set_num_threads(threads)


@some
@given(st.lists(st.integers(1, 23), min_size=1, max_size=4), st.data(), st.integers(0, 99))
def test_compaction_equals_index_select_and_stays_inside(shape, data, seed):
    dtype = data.draw(st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.uint8]))
    memory = torch.randint(
        0, 2 if dtype == torch.bool else 100, (math.prod(shape) + 64,), generator=torch.Generator().manual_seed(seed)
    )
    memory = memory.to(dtype)
    order = data.draw(st.permutations(range(len(shape))))
    packed = memory[32:-32].view([shape[d] for d in order])
    x = packed.permute([order.index(d) for d in range(len(shape))])
    before, fences = x.clone(), (memory[:32].clone(), memory[-32:].clone())
    keep = {}
    for dimension in data.draw(st.sets(st.integers(0, len(shape) - 1))):
        chosen = data.draw(st.sets(st.integers(0, shape[dimension] - 1), min_size=1))
        keep[dimension] = torch.tensor(sorted(chosen))
    result = ops.compact_(x, keep)
    assert torch.equal(result, reference.compact(before, keep))
    assert result.data_ptr() == x.data_ptr() and ops.is_dense(result)
    assert torch.equal(memory[:32], fences[0]) and torch.equal(memory[-32:], fences[1])


@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (600, 4900), (1500, 1000)])
def test_compaction_of_large_tensors_on_several_threads(shape):
    x = torch.randn(shape)
    keep = {d: torch.randperm(shape[d])[: shape[d] // 2].sort().values for d in (0, 1)}
    assert torch.equal(ops.compact_(x.clone(), keep), reference.compact(x, keep))


@some
@given(st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from(DTYPES)),
                max_size=5), st.data())  # fmt: skip
def test_compaction_of_many_equals_that_of_each(kinds, data):
    tensors, keep = [], []
    for count, shape, dtype in kinds:  # as many that are alike, next to each other
        cut = {}
        for d in data.draw(st.sets(st.integers(-len(shape), -1))):
            cut[d] = torch.tensor(sorted(data.draw(st.sets(st.integers(0, shape[d] - 1)))), dtype=torch.int64)
        tensors += [torch.randn(shape).to(dtype) for _ in range(count)]
        keep += [cut] * count
    expected = [reference.compact(x, cut) for x, cut in zip(tensors, keep, strict=True)]
    ops.compact_many_(tensors, keep)
    assert all(torch.equal(ops.front(x, cut), y) for x, cut, y in zip(tensors, keep, expected, strict=True))


@pytest.mark.parametrize("bad", [
    (torch.ones(5, 3), {0: torch.tensor([5])}), (torch.ones(5, 4)[:, ::2], {0: torch.tensor([1])}),
    (torch.ones(5, 3), {2: torch.tensor([1])}), (torch.ones(5, 3), {0: torch.tensor([1.0])}),
    (torch.ones(5, 3), {0: torch.tensor([1]), -2: torch.tensor([1])}),
])  # fmt: skip
def test_one_of_many_that_does_not_fit_is_refused_and_nothing_moves(bad):
    x, keep = torch.arange(12.0).view(4, 3), {0: torch.tensor([1, 3])}
    before = x.clone()
    with pytest.raises(RuntimeError, match="compact_"):
        ops.compact_many_([x, bad[0]], [keep, bad[1]])
    for counts in ([1], [1, 2], [2, -1], [1, 1, 0]):
        with pytest.raises(RuntimeError, match="number of cuts per tensor"):
            torch.ops.taylored.compact_many_([x, x.clone()], counts, [0, 0], [keep[0], keep[0]])
    assert torch.equal(x, before)


@pytest.mark.parametrize("keep", [{0: [3, 1]}, {0: [0, 0]}, {0: [0, 9]}, {0: [-1, 2]}])
def test_bad_indices_are_refused_and_nothing_moves(keep):
    x = torch.randn(4, 3)
    before = x.clone()
    with pytest.raises(RuntimeError, match="keep"):
        ops.compact_(x, {d: torch.tensor(i) for d, i in keep.items()})
    with pytest.raises(RuntimeError, match="dense"):
        ops.compact_(x[:, :2], {0: torch.tensor([0, 2])})
    assert torch.equal(x, before)


@some
@given(st.tuples(st.integers(0, 3), st.integers(1, 37), st.integers(1, 9), st.integers(1, 9)), st.integers(1, 150),
       st.sampled_from(["contiguous", "channels_last", "gaps"]), st.booleans(), st.integers(0, 99))  # fmt: skip
def test_a_convolution_that_skips_zeros_equals_a_dense_one(shape, outputs, layout, biased, seed):
    x, generator = laid_out(shape, layout, torch.float32, seed).relu(), torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, shape[1], 3, 3, generator=generator)
    bias = torch.randn(outputs, generator=generator) if biased else None
    found = ops.sparse_conv(x, weight.permute(2, 1, 3, 0), bias)
    expected = reference.sparse_conv(x, weight, bias)
    assert found.shape == expected.shape and found.dtype == torch.float32
    near(found, expected, reference.sparse_conv(x.abs(), weight.abs(), bias.abs() if biased else None))


def test_a_convolution_that_skips_zeros_does_not_depend_on_threads_and_lets_nan_through():
    x, weight = torch.randn(3, 20, 33, 31).relu(), torch.randn(3, 20, 3, 140)
    x[1, 7, 5, 6] = math.nan
    once, threads = ops.sparse_conv(x, weight), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        torch.testing.assert_close(ops.sparse_conv(x, weight), once, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)
    there = torch.zeros(3, 33, 31, dtype=torch.bool)
    there[1, 4:7, 5:8] = True
    assert torch.equal(once.isnan(), there[:, None].expand(-1, 140, -1, -1))


@some
@given(st.lists(st.integers(0, 19), min_size=1, max_size=4), st.integers(0, 9), st.booleans(), st.integers(0, 99),
       st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-0.5, 0.5)]))  # fmt: skip
def test_a_clamp_of_differences_is_the_difference_of_clamps(shape, pairs, last, seed, bounds):
    layout = "channels_last" if last and len(shape) > 1 else "contiguous"
    clean = laid_out(shape, layout, torch.float32, seed)
    d = laid_out([pairs if shape[0] else 0, *shape[1:]], layout, torch.bfloat16, seed + 1)
    rows = torch.randint(max(shape[0], 1), d.shape[:1])
    expected = reference.clamp_difference(d, clean, rows, *bounds)
    ops.clamp_difference_(d, clean, rows, *bounds)
    # float32 rounds the sum, bfloat16 the result
    assert ((d.double() - expected).abs() <= 2**-8 * expected.abs() + 2**-22).all()


def test_a_clamp_of_differences_lets_nan_through_and_changes_nothing_where_arguments_do_not_fit():
    d, clean = torch.zeros(2, 37, dtype=torch.bfloat16), torch.ones(3, 37)
    d[1, 5] = clean[2, 7] = math.nan
    ops.clamp_difference_(d, clean, torch.tensor([0, 2]), 0.0, math.inf)
    assert d.isnan().nonzero().tolist() == [[1, 5], [1, 7]]
    good = {"d": torch.ones(2, 4, 3, 3).bfloat16(), "clean": torch.ones(5, 4, 3, 3), "rows": torch.tensor([0, 4])}
    for bad in [
        {"rows": torch.tensor([0, 5])}, {"rows": torch.tensor([-1, 0])}, {"rows": torch.tensor([0])}, {"d": good["d"].float()},
        {"clean": good["clean"].double()}, {"clean": torch.ones(5, 4, 3, 2)}, {"clean": torch.ones(5, 4, 9)},
        {"clean": good["clean"].to(memory_format=torch.channels_last)}, {"d": good["d"][..., ::2], "clean": torch.ones(5, 4, 3, 2)},
    ]:  # fmt: skip
        arguments = good | bad
        with pytest.raises(RuntimeError, match="clamp_difference_"):
            ops.clamp_difference_(*arguments.values(), 0.0, 0.5)
        assert bool((arguments["d"] == 1).all())


@some
@given(st.integers(0, 9), st.integers(0, 40), st.integers(1, 3), st.sampled_from(["abs", "batch", "square"]), st.booleans())
def test_accumulate_equals_its_formula(examples, units, consumers, reduction, wide):
    t = [torch.randn(examples, units, dtype=torch.float64 if wide else torch.float32) for _ in range(consumers)]
    total = torch.rand(units, dtype=torch.float64)
    expected = reference.accumulate(total, t, reduction, 0.3)
    ops.accumulate_(total, t, reduction, 0.3)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    x = torch.randn(2, 3, 4)
    for other in (torch.randn(2, 3, 5), torch.randn(2, 3, 4, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            ops.contribution(x, other)
    with pytest.raises(RuntimeError):
        ops.contribution(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    for bad in [{"x": x}, {"weight": torch.ones(3, 4, 3, 2)}, {"bias": torch.ones(5)}, {"x": torch.ones(1, 3, 4, 4).double()}]:
        with pytest.raises(RuntimeError, match="sparse_conv"):
            ops.sparse_conv(**{"x": torch.ones(1, 3, 4, 4), "weight": torch.ones(3, 3, 3, 2)} | bad)
    with pytest.raises(ValueError, match="reduction"):
        ops.accumulate_(torch.zeros(3), [torch.zeros(1, 3)], "median", 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    library, x = torch.ops.taylored, torch.randn(2, 5, 3, 4).to(dtype)
    last = x.to(memory_format=torch.channels_last)
    for a in (x, last):
        torch.library.opcheck(library.contribution.default, (a, a))
        torch.library.opcheck(library.relu_backward.default, (a.relu(), a))
        torch.library.opcheck(library.channel_statistics.default, (a,))
        dims, keep = [0, 1], [torch.tensor([1]), torch.tensor([0, 3])]
        torch.library.opcheck(library.compact_.default, (a.clone(), dims, keep))
        torch.library.opcheck(library.compact_many_.default, ([a.clone(), a.clone()], [1, 1], dims, keep))
    torch.library.opcheck(library.accumulate_.default, (torch.zeros(5), [torch.randn(2, 5)], 0, 1.0))
    for bias in (None, torch.ones(6)):
        torch.library.opcheck(library.sparse_conv.default, (torch.randn(2, 5, 4, 3), torch.randn(3, 5, 3, 6), bias))
    arguments = (torch.randn(3, 5).bfloat16(), torch.randn(2, 5), torch.tensor([0, 1, 1]), 0.0, 6.0)
    torch.library.opcheck(library.clamp_difference_.default, arguments)
    torch.library.opcheck(library.record.default, (torch.zeros(()), x, x, -1, -1))
