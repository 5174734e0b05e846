"""The operators on a GPU against themselves on the CPU: what the machine code does, where tests/test_cuda_kernels.py has shown
what the source means. Skipped, with a reason, where there is no GPU: ``pytest -m gpu``."""

import pytest
import torch

from taylored import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 3, 4), (2, 0, 4), (2, 3, 0), (3, 1), (3, 40), (2, 5, 7, 7), (8, 96, 14, 14), (3, 301, 5, 9), (2, 64, 112, 112),
          (1, 3, 512, 512), (2, 6, 9, 31, 33)]  # fmt: skip
LAYOUTS = ["contiguous", "channels_last", "gaps", "misaligned"]


def laid_out(x, layout):
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "gaps":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "misaligned":  # begins one element into its memory
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def on_both(op, *maps):
    return op(*maps), op(*(laid_out_on_gpu(x) for x in maps))


def laid_out_on_gpu(x):
    """The same strides and offset on the GPU."""
    size = x.untyped_storage().nbytes() // x.itemsize
    memory = x.new_empty(0).set_(x.untyped_storage(), 0, (size,), (1,)).cuda()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def assert_same_sums(gpu, cpu, terms, dtype):
    """terms: the sums of the terms' sizes, which rounding is relative to."""
    assert gpu.dtype == cpu.dtype and gpu.shape == cpu.shape
    if cpu.dtype == torch.int64:
        assert torch.equal(gpu.cpu(), cpu)
    else:
        tolerance = 2.0**-48 if dtype == torch.float64 else 2.0**-20
        assert ((gpu.cpu() - cpu).abs() <= tolerance * terms).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_equal_the_cpus_and_repeat_bit_for_bit(shape, dtype, layout):
    torch.manual_seed(0)
    x = laid_out(torch.where(torch.rand(shape) > 0.25, torch.randn(shape), torch.zeros(())).to(dtype), layout)
    g, y = laid_out(torch.randn(shape).to(dtype), layout), laid_out(x.relu(), layout)

    cpu, gpu = on_both(ops.contribution, x, g)
    assert_same_sums(gpu, cpu, ops.contribution(x.abs(), g.abs()), dtype)
    (gradient, t), (gpu_gradient, gpu_t) = on_both(ops.relu_backward, y, g)
    assert torch.equal(gpu_gradient.cpu(), gradient)
    assert gpu_gradient.stride() == torch.empty_like(laid_out_on_gpu(y)).stride()
    assert_same_sums(gpu_t, t, ops.contribution(y, g.abs()), dtype)
    cpu, gpu = on_both(ops.channel_statistics, x)
    for ours, theirs, terms in zip(gpu, cpu, ops.channel_statistics(x.abs()), strict=True):
        assert_same_sums(ours, theirs, terms, dtype)

    x, g = laid_out_on_gpu(x), laid_out_on_gpu(g)
    first = ops.contribution(x, g)
    assert all(torch.equal(ops.contribution(x, g), first) for _ in range(5))


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (600, 4900), (70, 3, 11, 5), (1500, 1000)], ids=str)
def test_compaction_is_exact(shape, dtype, where):
    torch.manual_seed(0)
    x = torch.randint(0, 100, shape).to(dtype).cuda()
    keep = {d: torch.randperm(shape[d])[: shape[d] // 2].sort().values.to(where) for d in (0, 1)}
    expected = x.index_select(0, keep[0].cuda()).index_select(1, keep[1].cuda())
    tensors = [x.clone() for _ in range(10)]
    other = x[:7].clone()
    ops.compact_many_([*tensors, other], [keep] * len(tensors) + [{0: torch.tensor([2, 5])}])
    assert all(torch.equal(ops.front(tensor, keep), expected) for tensor in tensors)
    assert torch.equal(other[:2], x[[2, 5]])


def test_bad_arguments_are_refused():
    x = torch.randn(4, 3, device="cuda")
    for keep in ([3, 1], [0, 9], [-1, 2]):
        with pytest.raises(RuntimeError, match="keep"):
            ops.compact_(x, {0: torch.tensor(keep)})
    with pytest.raises(RuntimeError, match="where"):
        ops.contribution(x, x.cpu())
    with pytest.raises(RuntimeError, match="x must be on the GPU"):
        ops.compact_(x.cpu(), {0: torch.tensor([1], device="cuda")})


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_a_scored_step_is_captured_in_a_graph(reduction):
    torch.manual_seed(0)
    x, g = (torch.randn(4, 33, 9, 9, device="cuda") for _ in range(2))
    total = torch.zeros(33, dtype=torch.float64, device="cuda")

    def step():
        ops.accumulate_(total, [ops.contribution(x, g), ops.contribution(g, x)], reduction, 0.5)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    once, graph = total.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    total.zero_()
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(total, 3 * once)
    on_cpu = torch.zeros(33, dtype=torch.float64)
    t = ops.contribution(x.cpu(), g.cpu())
    ops.accumulate_(on_cpu, [t, t], reduction, 0.5)
    torch.testing.assert_close(once.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


def test_the_current_stream_is_used():
    x = torch.ones(64, 64, 64, 64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.mul_(2)
        t = ops.contribution(x, x)
    side.synchronize()
    assert torch.equal(t, torch.full_like(t, 4 * 64 * 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    library, x = torch.ops.taylored, torch.randn(2, 5, 3, 4, device="cuda").to(dtype)
    cut = [torch.tensor([1]), torch.tensor([0, 3])]
    for a in (x, x.to(memory_format=torch.channels_last)):
        torch.library.opcheck(library.contribution.default, (a, a))
        torch.library.opcheck(library.relu_backward.default, (a.relu(), a))
        torch.library.opcheck(library.channel_statistics.default, (a,))
        torch.library.opcheck(library.compact_.default, (a.clone(), [0, 1], cut))
        torch.library.opcheck(library.compact_many_.default, ([a.clone(), a.clone()], [1, 1], [0, 1], cut))
    total, t = torch.zeros(5, device="cuda"), torch.randn(2, 5, device="cuda")
    torch.library.opcheck(library.accumulate_.default, (total, [t], 0, 1.0))
