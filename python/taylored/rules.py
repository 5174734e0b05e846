"""What an operator does to labels: one rule for each.

Labels are integers that ride along with a tensor's channels (`labels.LabelMode`, the `mode` of every rule); channels with
equal or united labels live and die together. A rule is called as rule(mode, func, args, kwargs, out) when the operator
func has made out of args, and sets the labels of out. Data movement moves labels with the very same ATen operator,
arithmetic unites those that meet. `trace_rule` teaches rules for operators of one's own.
"""

import contextlib
import functools
import itertools
import math

import torch
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
SHUFFLES = (aten.channel_shuffle, aten.native_channel_shuffle)
FIXED = -1  # the label of a slot that no unit owns


def varying(label: torch.Tensor) -> tuple[int, ...]:
    """The dimensions along which a label tensor is not broadcast."""
    return tuple(i for i, size in enumerate(label.shape) if size > 1)


def compress(label: torch.Tensor) -> torch.Tensor:
    """Narrow every dimension along which the labels do not change to size 1."""
    label = once(label)
    for i, size in enumerate(label.shape):
        if size > 1 and bool((label == label.narrow(i, 0, 1)).all()):
            label = label.narrow(i, 0, 1)
    return label


def once(x) -> torch.Tensor:
    """Narrow every dimension along which x is one value in memory."""
    for d, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(d, 0, 1)
    return x


def tensors_of(args, kwargs):
    for value in itertools.chain(args, kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))


def padded(label, ndim):
    return label if label.ndim == ndim else label.reshape((1,) * (ndim - label.ndim) + tuple(label.shape))


def _size(tensor, axis, ndim):
    axis -= ndim - tensor.ndim
    return tensor.shape[axis] if axis >= 0 else 1


def slot_at(label: torch.Tensor | None, ndim: int, axis: int):
    """Labels [C] of one dimension of an `ndim`-dimensional tensor, ready to broadcast."""
    if label is None or label.numel() == 1:
        return ()
    return (label.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)]),)


# --------------------------------------------------------------------------------------------------------------------
# Rules: what an ATen operator does to labels. rule(mode, func, args, kwargs, out) sets the labels of out; those of
# convolutions and matrix products return the labels that their FLOPs are proportional to.
# --------------------------------------------------------------------------------------------------------------------


def pointwise(mode, func, args, kwargs, out):
    """Element by element: what meets is united."""
    out = out[0] if isinstance(out, (tuple, list)) else out
    operands = list(tensors_of(args, kwargs))
    before = mode.get(out)
    if not before and out is args[0] and id(out) not in mode.uniform and out.numel() > 1:
        # Written in place over something without labels that others may see through a view.
        for t in operands[1:]:
            mode.freeze_all(t, f"written into a buffer in {mode.where()!r}")
        return
    labels = mode.meet(operands, out.shape)
    if labels:
        mode.uniform.discard(id(out))
        mode.set(out, before or labels)


def same(mode, func, args, kwargs, out):
    """The output has its input's shape and meaning, slot for slot (copies, dropout, *_like)."""
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if tensor.shape == args[0].shape:
            mode.set(tensor, mode.get(args[0]))
            if id(args[0]) in mode.uniform:
                mode.uniform.add(id(tensor))


def uniform(mode, func, args, kwargs, out):
    """Fresh constants and noise have no channels of their own; a hard-coded size shows in the rehearsal."""
    mode.uniform.add(id(out))
    mode.alive.append(out)


def noise(mode, func, args, kwargs, out):
    """Random values in place: no channel differs from another."""
    if not mode.get(out):
        uniform(mode, func, args, kwargs, out)


def metadata(mode, func, args, kwargs, out):
    """Nothing to carry."""


def repeats(label) -> bool:
    """Whether a channel has several places along the dimensions that its label varies along: what it was flattened to, or
    spread to by pixel_unshuffle. In which order they are, labels do not say."""
    return label.unique().numel() < label.numel()


def cut(func, x, out, dim) -> bool:
    """Whether a movement takes a dimension of its input apart."""
    if func.overloadpacket in VIEWS:
        inner = math.prod(x.shape[dim + 1 :])
        return any(inner < math.prod(out.shape[d:]) < inner * x.shape[dim] for d in range(out.ndim))
    axis = {**dict.fromkeys(SHUFFLES, 1), aten.pixel_shuffle: x.ndim - 3}
    return axis.get(func.overloadpacket) == dim


def _moved(move, label, shape, args, kwargs, out):
    """A label where `move` has put it, as small as may be: what stays in the first and last dimensions is moved once for all."""
    before, after = list(shape), list(out.shape)
    if move is aten.reshape:
        for ends in (range(min(len(before), len(after))), range(-1, -min(len(before), len(after)) - 1, -1)):
            for d in itertools.takewhile(lambda d: before[d] == after[d] and label.shape[d] == 1, ends):
                before[d] = after[d] = 1
        return label.expand(before).reshape(after)
    return move(label.expand(shape), *args, **kwargs)


def movement(mode, func, args, kwargs, out):
    """Every element goes to a new place: the same op on the labels says where.

    A dimension cut in two keeps its meaning with fewer channels if every piece loses as many; channels that pixel_shuffle
    spreads out in space, if they go with all others of their output channel."""
    x = args[0]
    mode.uniform.discard(id(x))
    move = aten.reshape if func.overloadpacket in VIEWS else func
    labels = []
    for label in mode.get(x):
        moved = compress(_moved(move, label, x.shape, args[1:], kwargs, out))
        axes = varying(moved)
        if any(cut(func, x, out, d) for d in varying(label)) and repeats(label) and repeats(moved):
            mode.freeze(label, f"{func.overloadpacket} in {mode.where()!r} cuts up channels that each hold several places")
            continue
        if len(axes) > len(varying(label)):
            spread = func.overloadpacket is aten.pixel_shuffle
            axis = x.ndim - 3 if spread else axes[-1]
            rows = moved.movedim(axis, 0).reshape(moved.shape[axis], -1)
            (mode.tie if spread else mode.balance)(rows)
        elif func.overloadpacket in SHUFFLES and 1 in varying(label):
            mode.balance(label.movedim(1, 0).reshape(args[1], -1).t())
        labels.append(moved)
    mode.set(out, labels)


def part(mode, func, args, kwargs, out):
    """slice, select, narrow, gather...: exact only while it leaves the labelled dimensions whole."""
    x = args[0]
    mode.uniform.discard(id(x))
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    if func.overloadpacket is aten.slice and out.shape == x.shape:
        mode.set(out, mode.get(x))
        return
    labels = mode.whole(x, f"{func.overloadpacket} in {mode.where()!r} takes part of the channels", (dim,))
    mode.set(out, [compress(func(label.expand(x.shape), *args[1:], **kwargs)) for label in labels])


def indexed(mode, func, args, kwargs, out):
    """x[indices], with tensors of integers: the dimensions without an index go on, what is taken of the others stays."""
    x, indices = args[:2]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return opaque(mode, args[:1], {}, out, f"a mask in {mode.where()!r} selects values")
    dims = [d for d, i in enumerate(indices) if i is not None]
    labels = mode.whole(x, f"an index in {mode.where()!r} takes part of the channels", dims)
    anywhere = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in indices]
    mode.set(out, [compress(func(label.expand(x.shape), anywhere)) for label in labels])


def written(mode, func, args, kwargs, out):
    """x[indices] = values, with integers for the leading dimensions: the others meet."""
    x, indices, values = args[:3]
    rest = x.ndim - len(indices)
    if any(i is None or i.dtype in (torch.bool, torch.uint8) for i in indices) or (values.numel() != 1 and values.ndim < rest):
        return opaque(mode, (x, values), {}, out, f"written by index in {mode.where()!r}")
    reason = f"written into a buffer in {mode.where()!r}"
    fresh = id(x) in mode.uniform
    mode.freeze_all(x, reason, range(len(indices)))
    if values.numel() != 1:
        mode.uniform.discard(id(x))
        labels = mode.freeze_all(values, reason, range(values.ndim - rest))
        if fresh:
            mode.set(x, [padded(label.reshape(label.shape[values.ndim - rest :]), x.ndim) for label in labels])
        for axis in () if fresh else range(-rest, 0):
            mode.bind(mode.channels(x, axis), mode.channels(values, axis), reason)
    mode.set(out, mode.get(x))


def split(mode, func, args, kwargs, out):
    """Pieces of equal size must lose as many channels each; unequal pieces cannot change."""
    x, unbound = args[0], func.overloadpacket is aten.unbind
    mode.uniform.discard(id(x))
    position = 1 if unbound else 2
    dim = (args[position] if len(args) > position else kwargs.get("dim", 0)) % x.ndim
    labels = mode.get(x)
    alike = not unbound and len({p.shape[dim] for p in out}) == 1
    if not alike:
        labels = mode.whole(x, f"{func.overloadpacket} in {mode.where()!r} cuts the channels into unequal pieces", (dim,))
    for piece in out:
        mode.set(piece, ())
    for label in labels:
        if alike and dim in varying(label):
            mode.balance(torch.stack([piece.reshape(-1) for piece in label.split(out[0].shape[dim], dim)], 1))
        for tensor, piece in zip(out, func(label.expand(x.shape), *args[1:], **kwargs), strict=True):
            mode.set(tensor, (*mode.get(tensor), compress(piece)))


def glu(mode, func, args, kwargs, out):
    """One half of the channels times the sigmoid of the other: they go in pairs."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.ndim
    labels = []
    for label in mode.get(x):
        if label.shape[dim] > 1:
            label, gate = label.chunk(2, dim)
            mode.unite(label, gate)
        labels.append(label)
    mode.set(out, labels)


def cat(mode, func, args, kwargs, out):
    """Along the joined dimension labels follow one another; along the others they meet."""
    tensors = [t for t in args[0] if t.ndim == out.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    joined, others = [], []
    for t in tensors:
        mode.uniform.discard(id(t))
        mine = [x for x in mode.get(t) if t.shape[dim] > 1 and x.shape[dim] > 1]
        others.append([x for x in mode.get(t) if not mine or x is not mine[0]])
        joined.append(mine[0] if mine else torch.full([t.shape[dim] if i == dim else 1 for i in range(out.ndim)], FIXED))
    labels = []
    if any(bool((j != FIXED).any()) for j in joined):
        rest = torch.broadcast_shapes(*[tuple(1 if i == dim else s for i, s in enumerate(j.shape)) for j in joined])
        parts = [j.expand([j.shape[dim] if i == dim else s for i, s in enumerate(rest)]) for j in joined]
        labels.append(torch.cat(parts, dim))
    for axis in range(out.ndim):
        if axis != dim and out.shape[axis] > 1:
            found = [next((x for x in mine if x.shape[axis] > 1), None) for mine in others]
            there = [x for x in found if x is not None]
            for x in there:
                if len(there) < len(found):
                    mode.spread(x, f"joined with a constant in {mode.where()!r}", (axis,))
                else:
                    mode.bind(there[0], x, "")
            if there and len(there) == len(found) and not any(there[0] is x for x in labels):
                labels.append(there[0])
    mode.set(out, labels)


def stack(mode, func, args, kwargs, out):
    """A new dimension without labels; along the others they meet."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    mode.set(out, [x.unsqueeze(dim) for x in mode.meet(args[0], args[0][0].shape)])


def pad(mode, func, args, kwargs, out):
    """Padding in space leaves channels alone; padding of channels makes slots that no unit owns."""
    x = args[0]
    pads = list(args[1])
    padded = {x.ndim - 1 - i // 2 for i, p in enumerate(pads) if p}
    labels = []
    for label in mode.get(x):
        touched = padded & set(varying(label))
        if not touched:
            labels.append(label)
        elif func.overloadpacket is aten.constant_pad_nd and all(p >= 0 for p in pads):
            labels.append(compress(aten.constant_pad_nd(label.expand(x.shape), pads, FIXED)))
        else:
            mode.freeze(label, f"{func.overloadpacket} in {mode.where()!r} pads the channels")
    mode.set(out, labels)


def per_channel(mode, func, args, kwargs, out):
    """Pooling and interpolation work in space, channel by channel (dimension 1)."""
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        mode.emit(tensor, 1, mode.channels(args[0], 1))


def places(mode, func, args, kwargs, out):
    """Pooling within boxes, sampling at points: the map's channels go on, coordinates stay."""
    mode.freeze_all(args[1], f"coordinates in {mode.where()!r}")
    per_channel(mode, func, args, kwargs, out)


def dims_of(func, args, kwargs) -> list[int]:
    """The dimensions that an operator is told to work along: all, where it is told none; the last one first."""
    names = [argument.name for argument in func._schema.arguments]
    position = next((i for i, name in enumerate(names) if name in ("dim", "dims")), len(args))
    default = func._schema.arguments[position].default_value if position < len(names) else None
    dims = args[position] if position < len(args) else kwargs.get(names[position], default) if position < len(names) else None
    dims = range(args[0].ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return sorted({d % args[0].ndim for d in dims}, reverse=True)


def along(mode, func, args, kwargs, out):
    """Adds up, sorts or picks along its dimensions; the others go on. What is taken over channels would change with them."""
    x, dims = args[0], dims_of(func, args, kwargs)
    mode.uniform.discard(id(x))
    labels = mode.whole(x, f"{func.overloadpacket} in {mode.where()!r} works over the channels", dims)
    for d in dims:
        labels = [label.narrow(d, 0, 1) for label in labels]
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        kept = labels
        if tensor.ndim != x.ndim:
            for d in dims:
                kept = [label.squeeze(d) for label in kept]
        mode.set(tensor, kept)


def softmax(mode, func, args, kwargs, out):
    """Mixes all values along its dimension."""
    dim = args[1] % args[0].ndim
    mode.set(out, mode.whole(args[0], f"softmax over the channels in {mode.where()!r}", (dim,)))


# --------------------------------------------------------------------------------------------------------------------
# Shapes. torch's own kernels for the meta device are written in Python and take up to 2 ms a call; here is what models consist
# of, in the usual case. In any other, or where shapes do not fit, theirs are called, for the result or the error.
# --------------------------------------------------------------------------------------------------------------------


def usual(*tensors) -> bool:
    """Whether what comes out is contiguous and of their type too: all lie in memory in the order of their dimensions."""
    first, *others = (t for t in tensors if t is not None)
    return first.dtype.is_floating_point and all(t.dtype == first.dtype and _in_order(t) for t in (first, *others))


def _in_order(t) -> bool:
    if t.is_contiguous():
        return True
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    return all(a > b for a, b in itertools.pairwise([*strides, 0]))


def blank(like, shape) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)  # new_empty and empty_like are written in Python, too


def broadcast(tensors) -> torch.Size:
    first, *others = (t.shape for t in tensors)
    return first if all(shape == first for shape in others) else torch.broadcast_shapes(first, *others)  # in Python, too


def arithmetic_shape(func, x, *others):
    tensors = list(tensors_of((x, *others), {}))
    if x is tensors[0] and usual(*tensors) and all(isinstance(y, (torch.Tensor, int, float)) for y in others):
        with contextlib.suppress(RuntimeError):
            return blank(x, broadcast(tensors))
    return func(x, *others)


def in_place_shape(func, x, *options):
    return x if usual(x) else func(x, *options)


def mean_shape(func, x, dims=None, keepdim=False, **options):
    gone = {d % x.ndim for d in dims or () if -x.ndim <= d < x.ndim}
    if gone and len(gone) == len(dims) and usual(x) and not options:
        return blank(x, [1 if d in gone else size for d, size in enumerate(x.shape) if keepdim or d not in gone])
    return func(x, dims, keepdim, **options)


def cat_shape(func, tensors, dim=0):
    first = tensors[0]
    if usual(*tensors) and -first.ndim <= dim < first.ndim and all(t.ndim == first.ndim for t in tensors):
        dim %= first.ndim
        shapes = [[*t.shape[:dim], 0, *t.shape[dim + 1 :]] for t in tensors]
        if all(shape == shapes[0] for shape in shapes):
            shapes[0][dim] = sum(t.shape[dim] for t in tensors)
            return blank(first, shapes[0])
    return func(tensors, dim)


def convolution_shape(func, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    count, inputs, *kernel = weight.shape
    fits = x.shape[1] == inputs * groups and count % groups == 0 and (bias is None or bias.shape == (count,))
    if not transposed and fits and x.ndim == weight.ndim == len(stride) + 2 == len(padding) + 2 == len(dilation) + 2:
        sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
        places = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
        if min(places) > 0 and usual(x, weight, bias):
            return blank(x, (x.shape[0], count, *places))
    return func(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def addmm_shape(func, bias, a, b):
    if a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and bias.shape == b.shape[1:] and usual(bias, a, b.t()):
        return blank(a, (a.shape[0], b.shape[1]))
    return func(bias, a, b)


def layer_norm_shapes(func, x, shape, weight, bias, eps):
    fits = tuple(x.shape[-len(shape) :]) == tuple(shape) and all(t is None or t.shape == tuple(shape) for t in (weight, bias))
    if fits and usual(x, weight, bias):
        rest = (*x.shape[: -len(shape)], *[1] * len(shape))
        return blank(x, x.shape), blank(x, rest), blank(x, rest)
    return func(x, shape, weight, bias, eps)


def batch_norm_shapes(func, x, *others):
    if any(isinstance(t, torch.Tensor) and t.shape != x.shape[1:2] for t in others):
        raise RuntimeError(f"batch norm: {x.shape[1]} channels meet {[tuple(t.shape) for t in tensors_of(others, {})]}")
    return (blank(x, x.shape) if x.is_contiguous() else torch.empty_like(x), *(blank(x, x.shape[1]) for _ in range(2)))


def grid_sampler_shape(func, x, grid, *options):
    return blank(x, (*x.shape[:2], *grid.shape[1:-1]))


def _instead(function, *names):
    return {packet: functools.partial(function, packet) for packet in _rules(function, *names)}


def skimmed(func):
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
    """func(*args, **kwargs), where some tensors are one value all along a dimension, as `skimmed` makes them: arithmetic is done
    once for all of it; what is written to otherwise gets memory of its own."""
    tensors = list(tensors_of(args, kwargs))
    if not any(0 in t.stride() for t in tensors):
        return func(*args, **kwargs)
    in_place = func._schema.is_mutable and args and isinstance(args[0], torch.Tensor)
    arithmetic = torch.Tag.pointwise in func.tags or RULES.get(func.overloadpacket) is pointwise
    if arithmetic and not {"out", "memory_format"} & kwargs.keys():
        small = [once(a) if isinstance(a, torch.Tensor) else a for a in args]
        few = {key: once(a) if isinstance(a, torch.Tensor) else a for key, a in kwargs.items()}
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
    small = x if training else once(x)
    small = small.expand([x.shape[1] if d == 1 else size for d, size in enumerate(small.shape)])
    out, *rest = func(small, weight, bias, mean, var, training, *options)
    return out.expand(x.shape), *rest


def resized(func, x, size, *options):
    """Interpolation of a map that is one value everywhere: that value."""
    small = once(x)
    if size is None or any(s != 1 for s in small.shape[2:]):
        return func(x, size, *options)
    return small.expand(*x.shape[:2], *size)


def regions(x, boxes, scale, height, width, *options):
    """torchvision's roi_align. Of maps that are one value everywhere: that value."""
    values = once(x)
    if values.shape[2:] != (1, 1):
        return torch.ops.torchvision.roi_align(x, boxes, scale, height, width, *options)
    return values[boxes[:, 0].long()].expand(-1, -1, height, width)


def batch_norm(mode, func, args, kwargs, out):
    """One scale, shift, mean and variance per channel."""
    x = args[0]
    label = mode.channels(x, 1)
    for t in args[1:5]:
        if isinstance(t, torch.Tensor) and t.numel() > 1:
            mode.bind(label, mode.channels(t, 0), f"batch norm {mode.where()!r} of something without labels")
            if label is None:
                label = mode.channels(t, 0)
    mode.emit(out[0], 1, label)


def group_norm(mode, func, args, kwargs, out):
    """Statistics over a block of channels: the block is one unit."""
    x, groups = args[0], args[6]
    label = mode.channels(x, 1)
    for t in args[1:3]:
        if isinstance(t, torch.Tensor):
            mode.bind(label, mode.channels(t, 0), f"group norm {mode.where()!r} of something without labels")
    if label is not None:
        if groups == 1 and not mode.planned:
            mode.freeze(label, f"group norm {mode.where()!r} takes statistics over all channels")
        mode.tie(label.reshape(groups, -1))
    mode.emit(out[0], 1, label)


def layer_norm(mode, func, args, kwargs, out):
    """Statistics over all channels: none of them can go without changing the others."""
    x, normalized = args[0], len(args[1])
    dims = range(x.ndim - normalized, x.ndim)
    reason = f"layer norm {mode.where()!r} takes statistics over the channels"
    labels = mode.whole(x, reason, dims)
    for t in args[2:4]:
        if isinstance(t, torch.Tensor):
            mode.freeze_all(t, reason)
    mode.set(out[0], labels)


def weight_norm(mode, func, args, kwargs, out):
    """Each filter over its norm: filters keep their labels, what the norm is taken over stays."""
    v, g, dim = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    mode.freeze_all(v, f"weight norm in {mode.where()!r} divides by a norm over them", dims=others)
    label = mode.channels(v, dim)
    mode.bind(label, mode.channels(g, dim), mode.why(v))
    mode.set(out[0], mode.get(v))
    mode.emit(out[1], dim, label)


def statistic(mode, func, args, kwargs, out):
    """A statistic of whole tensors, such as spectral norm's: nothing in them can go."""
    opaque(mode, args, kwargs, out, f"{func.overloadpacket} in {mode.where()!r} depends on all of them")


def opaque(mode, args, kwargs, out, reason):
    """What goes in is frozen, what comes out has no labels."""
    for tensor in tensors_of(args, kwargs):
        mode.freeze_all(tensor, reason)
    mode.lose(out, reason)


def convolution(mode, func, args, kwargs, out):
    """Binds the input's channels to the weight's, emits the weight's filters. A group of channels is one unit."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    x_label = mode.channels(x, 1)
    filters, inputs = mode.channels(weight, int(transposed)), mode.channels(weight, int(not transposed))
    for label in mode.get(x):
        if 1 not in varying(label):
            mode.freeze(label, f"a convolution in {mode.where()!r} mixes positions that have labels")
    if groups > 1:
        mode.grouped.add(mode.where())
    if mode.where() not in mode.grouped:
        mode.bind(x_label, inputs, mode.why(x if x_label is None else weight))
        contracted = x_label
    else:
        # A transposed convolution's weight is [in, out/groups, ...], any other's is [out, in/groups, ...].
        whole, shared, contracted = (inputs, filters, None) if transposed else (filters, inputs, None)
        if shared is not None:
            mode.freeze(shared, "the channels within one group of a grouped convolution")
        if whole is None or x_label is None:
            mode.bind(x_label, whole, mode.why(x if x_label is None else weight))
        else:
            mode.tie(torch.cat([whole.reshape(groups, -1), x_label.reshape(groups, -1)], 1))
        if transposed and whole is not None:
            # Any labels of the group will do; different ones, for those that are all the same are no labels (`compress`).
            blocks = whole.reshape(groups, -1)
            filters = blocks[:, torch.arange(out.shape[1] // groups) % blocks.shape[1]].reshape(-1)
        else:
            filters = whole
    if isinstance(bias, torch.Tensor):
        mode.bind(filters, mode.channels(bias, 0), f"bias of {mode.where()!r}")
    mode.applied(filters, out.shape[1], contracted, mode.why(weight))
    mode.emit(out, 1, filters)
    return [mode.channels(weight, 0), mode.channels(weight, 1)]


def matmul(mode, func, args, kwargs, out):
    """mm, addmm, bmm, baddbmm: contracts x's last dimension with w's second to last."""
    added = args[0] if func.overloadpacket in (aten.addmm, aten.baddbmm) else None
    x, w = args[1:3] if added is not None else args[:2]
    x_label, inputs, rows, filters = (mode.channels(*t) for t in ((x, -1), (w, -2), (x, -2), (w, -1)))
    mode.bind(x_label, inputs, mode.why(x if x_label is None else w))
    if x.ndim == 3:
        for t in (x, w):
            mode.freeze_all(t, f"{func.overloadpacket} in {mode.where()!r} is batched over labels", dims=(0,))
    mode.applied(filters, w.shape[-1], x_label, mode.why(w))
    mode.set(out, (*slot_at(rows, out.ndim, -2), *slot_at(filters, out.ndim, -1)))
    if added is not None:
        mode.set(out, mode.meet([added, out], out.shape))
    return [rows, x_label if x_label is not None else inputs, filters]


def _rules(function, *names):
    packets = (getattr(aten, name, None) for name in names)
    return {packet: function for packet in packets if packet is not None}


SHAPES = {
    **_instead(arithmetic_shape, "add", "sub", "mul", "div", "rsub", "sigmoid", "silu", "gelu", "tanh", "relu", "hardswish"),
    **_instead(arithmetic_shape, "hardsigmoid", "hardtanh", "leaky_relu", "mish"),
    **_instead(in_place_shape, "silu_", "hardswish_", "hardsigmoid_", "hardtanh_", "leaky_relu_", "mish_"),
    **_instead(mean_shape, "mean"),
    **_instead(cat_shape, "cat"),
    **_instead(convolution_shape, "convolution"),
    **_instead(addmm_shape, "addmm"),
    **_instead(layer_norm_shapes, "native_layer_norm"),
    **_instead(batch_norm_shapes, "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    **_instead(grid_sampler_shape, "grid_sampler_2d", "grid_sampler_3d"),
}
SKIMMED = {
    **{packet: skimmed(packet) for packet in (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)},
    **_rules(aten.reshape, "view"),  # what is kept once has no memory to be viewed
    **_instead(normalised, "native_batch_norm"),
    **_instead(resized, "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    "torchvision::roi_align": regions,
}
RULES = {
    **_rules(pointwise, "hardswish_", "hardswish", "copy_", "prelu", "_prelu_kernel", "rrelu_with_noise", "glu_jvp", "where"),
    **_rules(same, "clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "native_dropout", "empty_like"),
    **_rules(same, "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "dropout", "bernoulli"),
    **_rules(uniform, "empty", "zeros", "ones", "full", "rand", "randn", "new_empty", "new_zeros", "new_ones", "new_full"),
    **_rules(noise, "bernoulli_", "uniform_", "normal_"),
    **_rules(metadata, "is_same_size", "_assert_async", "_has_compatible_shallow_copy_type", "sym_size", "size"),
    **_rules(movement, "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze"),
    **_rules(movement, "rot90"),
    **_rules(movement, "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "repeat", "flip"),
    **_rules(part, "slice", "select", "narrow", "unfold"),
    **_rules(along, "index_select", "cumsum", "cumprod", "sort", "topk", "roll", "median"),
    **_rules(places, "grid_sampler_2d", "grid_sampler_3d"),
    **_rules(indexed, "index"),
    **_rules(written, "index_put", "index_put_"),
    **_rules(split, "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unbind"),
    **_rules(cat, "cat"),
    **_rules(glu, "glu"),
    **_rules(stack, "stack"),
    **_rules(pad, "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    **_rules(pad, "replication_pad1d", "replication_pad2d", "replication_pad3d"),
    **_rules(per_channel, "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    **_rules(per_channel, "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    **_rules(per_channel, "adaptive_avg_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    **_rules(per_channel, "upsample_bilinear2d", "upsample_trilinear3d", "upsample_linear1d", "upsample_bicubic2d"),
    **_rules(per_channel, "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d", "max_unpool2d"),
    **_rules(along, "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "max", "min", "norm"),
    **_rules(along, "linalg_vector_norm", "argmax", "argmin", "prod", "logsumexp", "all", "any"),
    **_rules(softmax, "_softmax", "_log_softmax"),
    **_rules(batch_norm, "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    **_rules(batch_norm, "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm"),
    **_rules(group_norm, "native_group_norm"),
    **_rules(layer_norm, "native_layer_norm"),
    **_rules(weight_norm, "_weight_norm_interface"),
    **_rules(statistic, "mv", "dot", "vdot", "linalg_householder_product"),
    **_rules(convolution, "convolution"),
    **_rules(matmul, "mm", "addmm", "bmm", "baddbmm"),
}
# Operators of libraries that need not be there, by name.
FOREIGN = dict.fromkeys(("torchvision::roi_align", "torchvision::roi_pool"), places)


def trace_rule(op: str, like: str | None = None):
    """Teach `trace` what an operator does to channels; explain() names those without a rule, whose channels stay.

    op: "namespace::name". like: an operator with a rule that means the same for channels, in the same arguments:
    "aten::relu" (element by element), "aten::avg_pool2d" (channel by channel), "aten::cat", ...:

        taylored.trace_rule("mylib::swish", like="aten::silu")

    Without it this is a decorator for a rule of one's own, called as rule(mode, func, args, kwargs, out) whenever the
    operator func has made out of args, which sets the labels of out (labels are int64; equal ones live and die together):

        @taylored.trace_rule("mylib::scale")  # x [N, C, ...] times one factor per channel [C]
        def rule(mode, func, args, kwargs, out):
            label = mode.channels(args[0], 1)  # [C], or None where x has no labels
            mode.bind(label, mode.channels(args[1], 0), "scaled by constants")  # go together; alone, they stay, for that reason
            mode.emit(out, 1, label)

    mode.freeze_all(tensor, reason) keeps all channels of a tensor. A rule is believed: test it by comparing the model
    within `masked` with the compacted one. Raises ValueError if there is no such operator, or like has no rule.
    """
    packet = _packet("op", op)
    if like is None:
        return functools.partial(_learn, packet)
    source = _packet("like", like)
    rule = RULES.get(source)
    if rule is None and any(torch.Tag.pointwise in getattr(source, o).tags for o in source.overloads()):
        rule = pointwise
    if rule is None:
        raise ValueError(f"like={like!r} is an operator without a rule")
    return _learn(packet, rule)


def _packet(argument, name):
    namespace, _, op = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), op, None) if op else None
    if packet is None:
        raise ValueError(f"{argument}={name!r} is no operator that torch knows; it is named like 'aten::relu'")
    return packet


def _learn(packet, rule):
    RULES[packet] = rule
    return rule
