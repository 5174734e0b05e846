"""What comes out of an operator, without computing it: shapes alone, or values where there is little to compute.

torch's own kernels for the meta device are written in Python and take up to 2 ms a call; `SHAPES` has what models consist of, in
the usual case. In any other, or where shapes do not fit, theirs are called, for the result or the error. `BIAS_ONLY` serves a
model that looks at its data: convolutions and matrix products give their bias, as if no feature were there.
"""

import contextlib
import functools
import itertools

import torch

from taylored._graph.labels import tensors_of, unexpanded
from taylored._torch_compat import tree_map_only, writes

aten = torch.ops.aten
VIEWS = (aten.view, aten._unsafe_view, aten.reshape)


def packets(*names: str) -> list:
    """ATen's operators of those names, as far as this torch has them."""
    return [packet for packet in (getattr(aten, name, None) for name in names) if packet is not None]


# Element by element, though torch does not tag them so; those of the second line torch 2.10 does not.
ELEMENTWISE = frozenset(
    packets(
        "hardswish", "copy_", "prelu", "_prelu_kernel", "rrelu_with_noise", "glu_jvp", "where", "log_sigmoid_forward",
        "celu_", "elu_", "hardsigmoid_", "hardtanh_", "leaky_relu", "leaky_relu_", "selu_",
        "hardswish_", "mish_", "relu6_", "fill_", "zero_", "rrelu_with_noise_", "threshold_", "gelu_",
    )
)  # fmt: skip


def is_elementwise(func) -> bool:
    """Whether an operator's overload works element by element."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket in ELEMENTWISE


def usual(*tensors) -> bool:
    """Whether what comes out is contiguous and of their type too: all lie in memory in the order of their dimensions."""
    first, *others = (t for t in tensors if t is not None)
    return first.dtype.is_floating_point and all(t.dtype == first.dtype and _in_order(t) for t in (first, *others))


def _in_order(t) -> bool:
    if t.is_contiguous():
        return True
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    return all(a > b for a, b in itertools.pairwise([*strides, 0]))


def empty(like, shape) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)  # new_empty and empty_like are written in Python, too


def broadcast(tensors) -> torch.Size:
    first, *others = (t.shape for t in tensors)
    return first if all(shape == first for shape in others) else torch.broadcast_shapes(first, *others)  # in Python, too


def arithmetic_shape(func, x, *others):
    tensors = list(tensors_of((x, *others), {}))
    if x is tensors[0] and usual(*tensors) and all(isinstance(y, (torch.Tensor, int, float)) for y in others):
        with contextlib.suppress(RuntimeError):
            return empty(x, broadcast(tensors))
    return func(x, *others)


def in_place_shape(func, x, *options):
    return x if usual(x) else func(x, *options)


def mean_shape(func, x, dims=None, keepdim=False, **options):
    gone = {d % x.ndim for d in dims or () if -x.ndim <= d < x.ndim}
    if gone and len(gone) == len(dims) and usual(x) and not options:
        return empty(x, [1 if d in gone else size for d, size in enumerate(x.shape) if keepdim or d not in gone])
    return func(x, dims, keepdim, **options)


def cat_shape(func, tensors, dim=0):
    first = tensors[0]
    if usual(*tensors) and -first.ndim <= dim < first.ndim and all(t.ndim == first.ndim for t in tensors):
        dim %= first.ndim
        shapes = [[*t.shape[:dim], 0, *t.shape[dim + 1 :]] for t in tensors]
        if all(shape == shapes[0] for shape in shapes):
            shapes[0][dim] = sum(t.shape[dim] for t in tensors)
            return empty(first, shapes[0])
    return func(tensors, dim)


def convolution_shape(func, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    count, inputs, *kernel = weight.shape
    fits = x.shape[1] == inputs * groups and count % groups == 0 and (bias is None or bias.shape == (count,))
    if not transposed and fits and x.ndim == weight.ndim == len(stride) + 2 == len(padding) + 2 == len(dilation) + 2:
        sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
        places = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
        if min(places) > 0 and usual(x, weight, bias):
            return empty(x, (x.shape[0], count, *places))
    return func(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def addmm_shape(func, bias, a, b):
    if a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and bias.shape == b.shape[1:] and usual(bias, a, b.t()):
        return empty(a, (a.shape[0], b.shape[1]))
    return func(bias, a, b)


def layer_norm_shapes(func, x, shape, weight, bias, eps):
    fits = tuple(x.shape[-len(shape) :]) == tuple(shape) and all(t is None or t.shape == tuple(shape) for t in (weight, bias))
    if fits and usual(x, weight, bias):
        rest = (*x.shape[: -len(shape)], *[1] * len(shape))
        return empty(x, x.shape), empty(x, rest), empty(x, rest)
    return func(x, shape, weight, bias, eps)


def group_norm_shapes(func, x, weight, bias, count, channels, positions, groups, eps):
    fits = all(t is None or t.shape == (channels,) for t in (weight, bias))
    if fits and x.shape[:2] == (count, channels) and groups > 0 and channels % groups == 0 and usual(x, weight, bias):
        return empty(x, x.shape), empty(x, (count, groups)), empty(x, (count, groups))
    return func(x, weight, bias, count, channels, positions, groups, eps)


def softmax_shape(func, x, dim, *options):
    return empty(x, x.shape) if usual(x) and -x.ndim <= dim < x.ndim and not any(options) else func(x, dim, *options)


def batch_norm_shapes(func, x, *others):
    if any(isinstance(t, torch.Tensor) and t.shape != x.shape[1:2] for t in others):
        raise RuntimeError(f"batch norm: {x.shape[1]} channels meet {[tuple(t.shape) for t in tensors_of(others, {})]}")
    return (empty(x, x.shape) if x.is_contiguous() else torch.empty_like(x), *(empty(x, x.shape[1]) for _ in range(2)))


def grid_sampler_shape(func, x, grid, *options):
    return empty(x, (*x.shape[:2], *grid.shape[1:-1]))


def _instead(function, *names):
    return {packet: functools.partial(function, packet) for packet in packets(*names)}


def bias_only(func):
    """In the place of a convolution or matrix product: its bias, at every position (kept once). Enough for a forward pass that
    looks at its data to go on, such as a detector's, and a hundredth of the time."""

    def run(*args):
        meta = (torch.empty_like(a, device="meta") if isinstance(a, torch.Tensor) else a for a in args)
        shape = SHAPES.get(func, func)(*meta).shape
        if func is aten.convolution:
            bias = None if args[2] is None else args[2].reshape(-1, *[1] * (len(shape) - 2))
        else:
            bias = args[0] if func in (aten.addmm, aten.baddbmm) else None
        return (args[1].new_zeros([1] * len(shape)) if bias is None else bias.clone()).expand(shape)

    return run


def sparing(func, args, kwargs):
    """func(*args, **kwargs), where some tensors are one value all along a dimension, as `bias_only` makes them: arithmetic is
    done once for all of it; what is written to otherwise gets memory of its own."""
    tensors = list(tensors_of(args, kwargs))
    if not any(0 in t.stride() for t in tensors):
        return func(*args, **kwargs)
    in_place = writes(func) and args and isinstance(args[0], torch.Tensor)
    if is_elementwise(func) and not {"out", "memory_format"} & kwargs.keys():
        small = [unexpanded(a) if isinstance(a, torch.Tensor) else a for a in args]
        few = {key: unexpanded(a) if isinstance(a, torch.Tensor) else a for key, a in kwargs.items()}
        if not in_place:
            whole = broadcast(tensors)
            return tree_map_only(torch.Tensor, lambda out: out.expand(whole), func(*small, **few))
        if broadcast(tensors_of(small, few)) == small[0].shape:
            func(*small, **few)
            return args[0]
    if in_place and 0 in args[0].stride():
        args[0].set_(args[0].contiguous())
    return func(*args, **kwargs)


def normalised(func, x, weight, bias, mean, var, training, *options):
    """Batch norm in evaluation, of a map that is one value everywhere: once for all positions."""
    small = x if training else unexpanded(x)
    small = small.expand([x.shape[1] if d == 1 else size for d, size in enumerate(small.shape)])
    out, *rest = func(small, weight, bias, mean, var, training, *options)
    return out.expand(x.shape), *rest


def interpolated(func, x, size, *options):
    """Interpolation of a map that is one value everywhere: that value."""
    small = unexpanded(x)
    if size is None or any(s != 1 for s in small.shape[2:]):
        return func(x, size, *options)
    return small.expand(*x.shape[:2], *size)


def pooled_regions(x, boxes, scale, height, width, *options):
    """torchvision's roi_align. Of maps that are one value everywhere: that value."""
    values = unexpanded(x)
    if values.shape[2:] != (1, 1):
        return torch.ops.torchvision.roi_align(x, boxes, scale, height, width, *options)
    return values[boxes[:, 0].long()].expand(-1, -1, height, width)


SHAPES = {
    **_instead(arithmetic_shape, "add", "sub", "mul", "div", "rsub", "sigmoid", "silu", "gelu", "tanh", "relu", "hardswish"),
    **_instead(arithmetic_shape, "hardsigmoid", "hardtanh", "leaky_relu", "mish"),
    **_instead(in_place_shape, "silu_", "hardswish_", "hardsigmoid_", "hardtanh_", "leaky_relu_", "mish_"),
    **_instead(mean_shape, "mean"),
    **_instead(cat_shape, "cat"),
    **_instead(convolution_shape, "convolution"),
    **_instead(addmm_shape, "addmm"),
    **_instead(layer_norm_shapes, "native_layer_norm"),
    **_instead(group_norm_shapes, "native_group_norm"),
    **_instead(softmax_shape, "_softmax", "_log_softmax", "_safe_softmax"),
    **_instead(batch_norm_shapes, "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    **_instead(grid_sampler_shape, "grid_sampler_2d", "grid_sampler_3d"),
}
BIAS_ONLY = {
    **{packet: bias_only(packet) for packet in (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)},
    **dict.fromkeys(packets("view"), aten.reshape),  # what is kept once has no memory to be viewed
    **_instead(normalised, "native_batch_norm"),
    **_instead(interpolated, "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    "torchvision::roi_align": pooled_regions,
}
