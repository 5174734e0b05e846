"""Shapes are those that torch's own kernels give; what is one value everywhere is computed once, and the same."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from taylored._graph.shapes import BIAS_ONLY, SHAPES, sparing

aten = torch.ops.aten
FLOATS = [torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16]


@st.composite
def tensors(draw, shape, dtypes=FLOATS):
    """On the meta device, in one of the ways in which tensors lie in memory."""
    layout = draw(st.sampled_from(["contiguous"] * 4 + ["permuted", "slice", "stepped", "expanded", "channels last"]))
    dtype = draw(st.sampled_from(dtypes))
    if layout == "permuted":
        order = draw(st.permutations(range(len(shape))))
        return torch.empty([shape[d] for d in order], dtype=dtype, device="meta").permute(
            [order.index(d) for d in range(len(shape))]
        )
    if layout in ("slice", "stepped") and shape:
        d, step = draw(st.integers(0, len(shape) - 1)), 1 + (layout == "stepped")
        whole = torch.empty(
            [s * step + (1 if i == d else 0) if i == d else s for i, s in enumerate(shape)], dtype=dtype, device="meta"
        )
        return whole.narrow(d, 1, shape[d] * step)[(slice(None),) * d + (slice(None, None, step),)]
    if layout == "expanded":
        small = [1 if draw(st.booleans()) else size for size in shape]
        return torch.empty(small, dtype=dtype, device="meta").expand(shape)
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if layout == "channels last" and len(shape) == 4 else x


sizes, shapes = st.integers(1, 5), st.lists(st.integers(0, 4), max_size=4)


@st.composite
def arithmetic(draw):
    shape = draw(shapes)
    other = draw(
        st.one_of(st.just(shape), shapes, st.just([1 if draw(st.booleans()) else s for s in shape[draw(st.integers(0, 4)) :]]))
    )
    x = draw(tensors(shape, [*FLOATS, torch.int64]))
    y = draw(st.one_of(tensors(other, [*FLOATS, torch.int64]), st.sampled_from([2, 0.5, True])))
    return draw(st.sampled_from([aten.add, aten.sub, aten.mul, aten.div, aten.rsub])), (x, y)


@st.composite
def unary(draw):
    names = ["sigmoid", "silu", "gelu", "tanh", "relu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "mish"]
    names += ["silu_", "hardswish_", "hardsigmoid_", "hardtanh_", "leaky_relu_", "mish_"]
    return getattr(aten, draw(st.sampled_from(names))), (draw(tensors(draw(shapes))),)


@st.composite
def mean(draw):
    x, dims = draw(tensors(draw(shapes), [*FLOATS, torch.int64])), draw(st.lists(st.integers(-5, 4), max_size=4))
    return aten.mean, (x, dims) if draw(st.booleans()) else (x, dims, draw(st.booleans()))


@st.composite
def cat(draw):
    shape, d = draw(st.lists(sizes, min_size=1, max_size=4)), draw(st.integers(-5, 4))
    several = []
    for _ in range(draw(st.integers(1, 4))):
        other = [draw(sizes) if i == d % len(shape) or draw(st.integers(0, 9)) == 0 else s for i, s in enumerate(shape)]
        several.append(draw(tensors(other, [*[torch.float32] * 9, torch.float64])))
    return aten.cat, (several, d) if d or draw(st.booleans()) else (several,)


@st.composite
def convolution(draw):
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, count = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    places, kernel = ([draw(st.integers(1, most)) for _ in range(rank)] for most in (9, 3))
    wrong = draw(st.sampled_from([0, 0, 0, 0, 1]))  # channels that do not fit
    x = draw(tensors([draw(st.integers(0, 2)), inputs + wrong, *places], [torch.float32]))
    transposed = draw(st.sampled_from([False, False, False, True]))
    weight = draw(
        tensors([inputs, count // groups, *kernel] if transposed else [count, inputs // groups, *kernel], [torch.float32])
    )
    bias = draw(st.one_of(st.none(), tensors([count], [torch.float32])))
    steps = ([draw(st.integers(low, 2)) for _ in range(rank)] for low in (1, 0, 1))
    return aten.convolution, (x, weight, bias, *steps, transposed, [0] * rank, groups)


@st.composite
def addmm(draw):
    n, k, m = draw(sizes), draw(sizes), draw(sizes)
    wrong = draw(st.sampled_from([0, 0, 0, 1]))
    bias = draw(tensors(draw(st.sampled_from([[m], [m], [1], [n, m], [m + 1]]))))
    return aten.addmm, (bias, draw(tensors([n, k])), draw(tensors([k + wrong, m])))


@st.composite
def layer_norm(draw):
    shape = draw(st.lists(sizes, min_size=1, max_size=4))
    own = shape[draw(st.integers(0, len(shape) - 1)) :]
    other = own if draw(st.integers(0, 3)) else [s + 1 for s in own]
    weight, bias = (draw(st.one_of(st.none(), tensors(other if i else own, [torch.float32]))) for i in range(2))
    return aten.native_layer_norm, (draw(tensors(shape, [torch.float32])), own, weight, bias, 1e-5)


@st.composite
def group_norm(draw):
    count, channels, *space = shape = draw(st.lists(sizes, min_size=2, max_size=4))
    weight, bias = (draw(st.one_of(st.none(), tensors([channels + draw(st.booleans())], [torch.float32]))) for _ in range(2))
    x = draw(tensors(shape, [torch.float32]))
    return aten.native_group_norm, (x, weight, bias, count, channels, math.prod(space), draw(st.integers(1, 5)), 1e-5)


@st.composite
def softmax(draw):
    func = draw(st.sampled_from([aten._softmax, aten._log_softmax, aten._safe_softmax]))
    options = () if func is aten._safe_softmax else (False,)
    return func, (draw(tensors(draw(shapes))), draw(st.integers(-5, 4)), *options)


def outcome(function, arguments):
    try:
        out = function(*arguments)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return "refused"
    return [(t.shape, t.dtype, t.device, steps(t)) for t in (out if isinstance(out, tuple) else (out,))]


def steps(t):
    """Strides, where they mean something."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []


@pytest.mark.parametrize("draw", [arithmetic, unary, mean, cat, convolution, addmm, layer_norm, group_norm, softmax])
def test_shapes_are_those_of_torch(draw):
    @settings(max_examples=300, deadline=None)
    @given(draw())
    def check(call):
        func, arguments = call
        assert outcome(SHAPES[func], arguments) == outcome(func, arguments)

    check()


def kept_once(data, shape):
    """A tensor of that shape which is one value all along some of its dimensions, in memory too."""
    small = [1 if data.draw(st.booleans()) else size for size in shape]
    return torch.randn(small).expand(shape)


IN_PLACE = {
    "relu_": lambda x, y: x.relu_(), "hardswish_": lambda x, y: F.hardswish(x, inplace=True), "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(y), "copy_": lambda x, y: x.copy_(y), "zero_": lambda x, y: x.zero_(),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, 3.0), "index_put_": lambda x, y: x.index_put_((torch.tensor([0]),), y[:1]),
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=0.5), "rows": lambda x, y: x[:1].add_(1),
}  # fmt: skip
ARITHMETIC = {
    "relu": lambda x, y: x.relu(), "add": lambda x, y: x.add(y, alpha=2), "where": lambda x, y: torch.where(y > 0, x, y),
    "clamp": lambda x, y: x.clamp(min=y), "pow": lambda x, y: x.pow(2), "less": lambda x, y: x < y, "scalar": lambda x, y: 2 - x,
    "clone": lambda x, y: x.clone(), "contiguous": lambda x, y: x.contiguous().view(-1), "reshape": lambda x, y: x.reshape(-1),
    "cat": lambda x, y: torch.cat([x, y]), "mean": lambda x, y: x.mean(0), "scaled": lambda x, y: x * y[:1],
}  # fmt: skip


class Sparing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return sparing(func, args, kwargs or {})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([*IN_PLACE, *ARITHMETIC]), st.data())
def test_what_is_one_value_is_computed_once_and_the_same(shape, name, data):
    x, y = kept_once(data, shape), kept_once(data, shape)
    dense = x.clone(memory_format=torch.contiguous_format)
    function = (IN_PLACE | ARITHMETIC)[name]
    with Sparing():
        found = function(x, y)
    expected = function(dense, y)
    torch.testing.assert_close(found, expected)
    if name != "rows":  # a view that is written to otherwise than once has memory of its own
        torch.testing.assert_close(x, dense)
        assert (found is x) == (name in IN_PLACE)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 4), st.booleans(), st.sampled_from([aten.upsample_nearest2d, aten.upsample_bilinear2d]),
       st.data())  # fmt: skip
def test_normalised_and_resized_it_is_the_same(shape, training, upsample, data):
    x, vectors = kept_once(data, shape), [torch.rand(shape[1]) + 0.1 for _ in range(4)]
    dense = x.clone(memory_format=torch.contiguous_format)
    training = training and dense[:, 0].numel() > 1
    options = (*vectors[:2], *(v.clone() for v in vectors[2:]), training, 0.1, 1e-5)
    found = BIAS_ONLY[aten.native_batch_norm](x, *vectors, training, 0.1, 1e-5)
    torch.testing.assert_close(found[0], aten.native_batch_norm(dense, *options)[0], rtol=1e-4, atol=1e-4)
    arguments = ([5, 3], False) if upsample is aten.upsample_bilinear2d else ([5, 3],)
    torch.testing.assert_close(BIAS_ONLY[upsample](x, *arguments), upsample(dense, *arguments))


def test_arithmetic_on_what_is_one_value_takes_no_memory_of_its_size():
    x = torch.randn(1, 8, 1, 1).expand(1000, 8, 1000, 1000)  # 32 GB
    with Sparing():
        y = (F.relu(x, inplace=True) * torch.randn(8, 1, 1) + 1).sigmoid()
    assert y.shape == x.shape and y.untyped_storage().nbytes() == 32
    assert torch.equal(y[0, :, 0, 0], y[-1, :, -1, -1]) and bool((x[0] >= 0)[:, 0, 0].all())
