"""Rules of operators that move values: every element goes to a new place, and its label with it.

Most move labels with the very same operator. What takes the channel dimension apart is exact only while every piece keeps its
meaning with fewer channels.
"""

import itertools
import math

import torch

from taylored._graph.labels import Labels, compress, tensors_of, varying, with_ndim
from taylored._graph.shapes import VIEWS, aten
from taylored._graph.values import FIXED

SHUFFLES = (aten.channel_shuffle, aten.native_channel_shuffle)


def opaque(labels, args, kwargs, out, reason):
    """What goes in is frozen, what comes out has no labels: for that reason, if there were any."""
    for tensor in (labelled := [t for t in tensors_of(args, kwargs) if labels.get(t)]):
        labels.freeze_all(tensor, reason)
    if labelled:
        labels.lose(out, reason)


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


def movement(labels: Labels, func, args, kwargs, out):
    """Every element goes to a new place: the same op on the labels says where.

    A dimension cut in two keeps its meaning with fewer channels if every piece loses as many; channels that pixel_shuffle
    spreads out in space, if they go with all others of their output channel."""
    x = args[0]
    labels.share_uniform(out, x)
    move = aten.reshape if func.overloadpacket in VIEWS else func
    result = []
    for label in labels.get(x):
        moved = compress(_moved(move, label, x.shape, args[1:], kwargs, out))
        axes = varying(moved)
        if any(cut(func, x, out, d) for d in varying(label)) and repeats(label) and repeats(moved):
            labels.freeze(label, f"{func.overloadpacket} in {labels.where()!r} cuts up channels that each hold several places")
            continue
        if len(axes) > len(varying(label)):
            spread = func.overloadpacket is aten.pixel_shuffle
            axis = x.ndim - 3 if spread else axes[-1]
            rows = moved.movedim(axis, 0).reshape(moved.shape[axis], -1)
            (labels.unite_rows if spread else labels.split_evenly)(rows)
        elif func.overloadpacket in SHUFFLES and 1 in varying(label):
            labels.split_evenly(label.movedim(1, 0).reshape(args[1], -1).t())
        result.append(moved)
    labels.set(out, result)


def part(labels: Labels, func, args, kwargs, out):
    """slice, select, narrow, gather...: exact only while it leaves the labelled dimensions whole."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    if func.overloadpacket is aten.slice:
        labels.note_slice(out, x, dim)
    labels.share_uniform(out, x, part=out.numel() < x.numel())
    if func.overloadpacket is aten.slice and out.shape == x.shape:
        labels.set(out, labels.get(x))
        return
    result = labels.require_all(x, f"{func.overloadpacket} in {labels.where()!r} takes part of the channels", (dim,))
    labels.set(out, [compress(func(label.expand(x.shape), *args[1:], **kwargs)) for label in result])


def indexed(labels: Labels, func, args, kwargs, out):
    """x[indices], with tensors of integers: the dimensions without an index go on, what is taken of the others stays."""
    x, indices = args[:2]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return opaque(
            labels, (x, *(i for i in indices if i is not None)), {}, out, f"a mask in {labels.where()!r} selects values"
        )
    for i in indices:
        if i is not None:
            labels.freeze_all(i, f"an index in {labels.where()!r} is computed from them")
    dims = [d for d, i in enumerate(indices) if i is not None]
    result = labels.require_all(x, f"an index in {labels.where()!r} takes part of the channels", dims)
    anywhere = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in indices]
    labels.set(out, [compress(func(label.expand(x.shape), anywhere)) for label in result])


def written(labels: Labels, func, args, kwargs, out):
    """x[indices] = values, with integers for the leading dimensions: the others meet."""
    x, indices, values = args[:3]
    rest = x.ndim - len(indices)
    if any(i is None or i.dtype in (torch.bool, torch.uint8) for i in indices) or (values.numel() != 1 and values.ndim < rest):
        return opaque(labels, (x, values), {}, out, f"written by index in {labels.where()!r}")
    reason = f"written into a buffer in {labels.where()!r}"
    for i in indices:
        labels.freeze_all(i, f"an index in {labels.where()!r} is computed from them")
    fresh = labels.is_uniform(x)
    labels.freeze_all(x, reason, range(len(indices)))
    if values.numel() != 1:
        result = labels.freeze_all(values, reason, range(values.ndim - rest))
        if fresh:
            labels.set(x, [with_ndim(label.reshape(label.shape[values.ndim - rest :]), x.ndim) for label in result])
        for axis in () if fresh else range(-rest, 0):
            labels.match(labels.channels(x, axis), labels.channels(values, axis), reason)
    labels.set(out, labels.get(x))


def split(labels: Labels, func, args, kwargs, out):
    """Pieces of equal size must lose as many channels each; unequal pieces cannot change."""
    x, unbound = args[0], func.overloadpacket is aten.unbind
    for piece in out:
        labels.share_uniform(piece, x, part=True)
    position = 1 if unbound else 2
    dim = (args[position] if len(args) > position else kwargs.get("dim", 0)) % x.ndim
    result = labels.get(x)
    alike = not unbound and len({p.shape[dim] for p in out}) == 1
    if not alike:
        result = labels.require_all(
            x, f"{func.overloadpacket} in {labels.where()!r} cuts the channels into unequal pieces", (dim,)
        )
    for label in result:
        if alike and dim in varying(label):
            labels.split_evenly(torch.stack([piece.reshape(-1) for piece in label.split(out[0].shape[dim], dim)], 1))
        for tensor, piece in zip(out, func(label.expand(x.shape), *args[1:], **kwargs), strict=True):
            labels.set(tensor, (*labels.get(tensor), compress(piece)))


def glu(labels: Labels, func, args, kwargs, out):
    """One half of the channels times the sigmoid of the other: they go in pairs."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.ndim
    result = []
    for label in labels.get(x):
        if label.shape[dim] > 1:
            label, gate = label.chunk(2, dim)
            labels.unite(label, gate)
        result.append(label)
    labels.set(out, result)


def cat(labels: Labels, func, args, kwargs, out):
    """Along the joined dimension labels follow one another; along the others they meet."""
    tensors = [t for t in args[0] if t.ndim == out.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    joined, others = [], []
    for t in tensors:
        mine = [x for x in labels.get(t) if t.shape[dim] > 1 and x.shape[dim] > 1]
        others.append([x for x in labels.get(t) if not mine or x is not mine[0]])
        size = t.shape[dim]
        none = (
            labels.fresh(size) if labels.is_uniform(t) else torch.full((size,), FIXED)
        )  # zeros for a state that is not there yet
        joined.append(mine[0] if mine else none.reshape([size if i == dim else 1 for i in range(out.ndim)]))
    result = []
    if any(bool((j != FIXED).any()) for j in joined):
        rest = torch.broadcast_shapes(*[tuple(1 if i == dim else s for i, s in enumerate(j.shape)) for j in joined])
        parts = [j.expand([j.shape[dim] if i == dim else s for i, s in enumerate(rest)]) for j in joined]
        result.append(torch.cat(parts, dim))
    for axis in range(out.ndim):
        if axis != dim and out.shape[axis] > 1:
            found = [next((x for x in mine if x.shape[axis] > 1), None) for mine in others]
            there = [x for x in found if x is not None]
            for x in there:
                if len(there) < len(found):
                    labels.unite_along(x, f"joined with a constant in {labels.where()!r}", (axis,))
                else:
                    labels.match(there[0], x, "")
            if there and len(there) == len(found) and not any(there[0] is x for x in result):
                result.append(there[0])
    labels.set(out, result)


def stack(labels: Labels, func, args, kwargs, out):
    """A new dimension without labels; along the others they meet."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    labels.set(out, [x.unsqueeze(dim) for x in labels.broadcast(args[0], args[0][0].shape)])


def pad(labels: Labels, func, args, kwargs, out):
    """Padding in space leaves channels alone; padding of channels makes slots that no unit owns."""
    x = args[0]
    pads = list(args[1])
    padded = {x.ndim - 1 - i // 2 for i, p in enumerate(pads) if p}
    result = []
    for label in labels.get(x):
        touched = padded & set(varying(label))
        if not touched:
            result.append(label)
        elif func.overloadpacket is aten.constant_pad_nd and all(p >= 0 for p in pads):
            result.append(compress(aten.constant_pad_nd(label.expand(x.shape), pads, FIXED)))
        else:
            labels.freeze(label, f"{func.overloadpacket} in {labels.where()!r} pads the channels")
    labels.set(out, result)
