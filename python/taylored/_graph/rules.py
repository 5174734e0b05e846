"""What an operator does to labels: one rule for each.

A rule is called as rule(labels, func, args, kwargs, out) when the operator func has made out of args, and sets the labels of
out; `labels` are those of all tensors (`Labels`, which says what a rule may ask). Rules of convolutions and matrix products
return the labels that their FLOPs are proportional to. Arithmetic unites labels that meet; what moves data moves them (moves.py).
`RULES` has them all, and `trace_rule` teaches more.
"""

import functools
import math
import re
from collections.abc import Callable

import torch

from taylored._graph.labels import (
    Labels,
    along_axis,
    tensors_of,
    varying,
)
from taylored._graph.moves import cat, glu, indexed, movement, opaque, pad, part, split, stack, written
from taylored._graph.shapes import ELEMENTWISE, aten, is_elementwise, packets
from taylored._torch_compat import argument_defaults, operator_name


def pointwise(labels: Labels, func, args, kwargs, out):
    """Element by element: what meets is united."""
    out = out[0] if isinstance(out, (tuple, list)) else out
    operands = list(tensors_of(args, kwargs))
    if not isinstance(out, torch.Tensor):  # a comparison of all, such as equal
        for t in operands:
            labels.freeze_all(t, f"{func.overloadpacket} in {labels.where()!r} looks at all of them")
        return
    before = labels.get(out)
    shared = not labels.is_uniform(out) or labels.is_part(out)
    if not before and out is args[0] and shared and out.numel() > 1:
        labels.write_slice(out, operands[1:], f"written into a buffer in {labels.where()!r}")
        return
    result = labels.broadcast(operands, out.shape)
    if result:
        labels.set(out, before or result)


def same(labels: Labels, func, args, kwargs, out):
    """The output has its input's shape and meaning, slot for slot (copies, dropout, *_like)."""
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if tensor.shape == args[0].shape:
            labels.set(tensor, labels.get(args[0]))
            if labels.is_uniform(args[0]):
                labels.set_uniform(tensor)


def uniform(labels: Labels, func, args, kwargs, out):
    """Fresh constants and noise have no channels of their own; a hard-coded size shows in the rehearsal."""
    labels.set_uniform(out)


def noise(labels: Labels, func, args, kwargs, out):
    """Random values in place: no channel differs from another."""
    if not labels.get(out):
        uniform(labels, func, args, kwargs, out)


def metadata(labels: Labels, func, args, kwargs, out):
    """Nothing to carry."""


def _beside(labels: Labels, func, x, dims) -> list[torch.Tensor]:
    """The labels that go on where an operator works along dims, [.., 1 at dims, ..]; those along dims stay, or go all at once."""
    found = labels.require_all(x, f"{func.overloadpacket} in {labels.where()!r} works over the channels", dims)
    for d in dims:
        found = tuple(label.narrow(d, 0, 1) for label in found)
    return list(found)


def in_space(labels: Labels, func, args, kwargs, out):
    """Pooling and interpolation work along the last dimensions, as many as their name says; all others go on."""
    x, dims = args[0], range(args[0].ndim - _space(func), args[0].ndim)
    result = _beside(labels, func, x, dims)
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        labels.set(tensor, result)


def _space(func):
    return int(re.search(r"([123])d", operator_name(func))[1])


def unpooling(labels: Labels, func, args, kwargs, out):
    """Values go where their indices say: a map's channel and that of its indices are one."""
    x, indices = args[:2]
    found = labels.broadcast([x, indices], x.shape)
    labels.set(x, found)
    in_space(labels, func, (x,), {}, out)


def at_points(labels: Labels, func, args, kwargs, out):
    """Pooling within boxes, sampling at points: the map's channels, dimension 1, go on, coordinates stay."""
    labels.freeze_all(args[1], f"coordinates in {labels.where()!r}")
    label = labels.take(args[0], 1, f"{func.overloadpacket} in {labels.where()!r} mixes positions that have labels")
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        labels.emit(tensor, 1, label)


def gathered(labels: Labels, func, args, kwargs, out):
    """gather: of every line along a dimension, what the index says; along the others map and index meet."""
    x, dim, index = args[0], args[1] % args[0].ndim, args[2]
    reason = f"{func.overloadpacket} in {labels.where()!r} takes part of the channels"
    labels.set(x, labels.require_all(x, reason, (dim,)))
    lines = [label.narrow(dim, 0, 1) for label in labels.get(x)]
    if any(index.shape[d] != x.shape[d] for label in lines for d in varying(label)):
        return opaque(labels, (x, index), {}, out, reason)
    labels.set(out, [*lines])
    labels.set(out, labels.broadcast([out, index], out.shape))


def unfolded(labels: Labels, func, args, kwargs, out):
    """im2col: every channel becomes as many rows as the kernel has places; the new last dimension has positions."""
    x, kernel = args[0], math.prod(args[1])
    label = labels.take(x, x.ndim - 3, f"{func.overloadpacket} in {labels.where()!r} mixes positions that have labels")
    labels.emit(out, out.ndim - 2, None if label is None else label.repeat_interleave(kernel))


def folded(labels: Labels, func, args, kwargs, out):
    """col2im: as many rows as the kernel has places become one channel."""
    x, kernel = args[0], math.prod(args[2])
    label = labels.take(x, x.ndim - 2, f"{func.overloadpacket} in {labels.where()!r} mixes positions that have labels")
    if label is not None:
        rows = label.reshape(-1, kernel)
        labels.unite_rows(rows)
        label = rows[:, 0]
    labels.emit(out, out.ndim - 3, label)


def complex_view(labels: Labels, func, args, kwargs, out):
    """A last dimension of two for a complex number, or the other way round."""
    x = args[0]
    if out.ndim > x.ndim:
        labels.set(out, [label.unsqueeze(-1) for label in labels.get(x)])
    else:
        kept = labels.require_all(x, f"{func.overloadpacket} in {labels.where()!r} works over the channels", (x.ndim - 1,))
        labels.set(out, [label.narrow(-1, 0, 1).squeeze(-1) for label in kept])


def dims_of(func, args, kwargs) -> list[int]:
    """The dimensions that an operator is told to work along: all, where it is told none; the last one first."""
    defaults = argument_defaults(func)
    position, name = next(((i, n) for i, n in enumerate(defaults) if n in ("dim", "dims")), (len(args), ""))
    dims = args[position] if position < len(args) else kwargs.get(name, defaults.get(name))
    dims = range(args[0].ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return sorted({d % args[0].ndim for d in dims}, reverse=True)


def along(labels: Labels, func, args, kwargs, out):
    """Adds up, sorts or picks along its dimensions; the others go on. What is taken over channels would change with them."""
    x, dims = args[0], dims_of(func, args, kwargs)
    result = _beside(labels, func, x, dims)
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        kept = result
        if tensor.ndim != x.ndim:
            for d in dims:
                kept = [label.squeeze(d) for label in kept]
        labels.set(tensor, kept)


def softmax(labels: Labels, func, args, kwargs, out):
    """Mixes all values along its dimension."""
    dim = args[1] % args[0].ndim
    labels.set(out, labels.require_all(args[0], f"softmax over the channels in {labels.where()!r}", (dim,)))


def batch_norm(labels: Labels, func, args, kwargs, out):
    """One scale, shift, mean and variance per channel."""
    x = args[0]
    label = labels.take(x, 1, f"batch norm {labels.where()!r} takes statistics over them")
    for t in args[1:5]:
        if isinstance(t, torch.Tensor) and t.numel() > 1:
            labels.match(label, labels.channels(t, 0), f"batch norm {labels.where()!r} of something without labels")
            if label is None:
                label = labels.channels(t, 0)
    labels.emit(out[0], 1, label)


def group_norm(labels: Labels, func, args, kwargs, out):
    """Statistics over a block of channels: the block is one unit."""
    x, groups = args[0], args[6]
    label = labels.take(x, 1, f"group norm {labels.where()!r} takes statistics over them")
    for t in args[1:3]:
        if isinstance(t, torch.Tensor):
            labels.match(label, labels.channels(t, 0), f"group norm {labels.where()!r} of something without labels")
    if label is not None:
        if groups == 1 and not labels.planned:
            labels.freeze(label, f"group norm {labels.where()!r} takes statistics over all channels")
        labels.unite_rows(label.reshape(groups, -1))
    labels.emit(out[0], 1, label)


def layer_norm(labels: Labels, func, args, kwargs, out):
    """Statistics over all channels: none of them can go without changing the others."""
    x, normalized = args[0], len(args[1])
    dims = range(x.ndim - normalized, x.ndim)
    reason = f"layer norm {labels.where()!r} takes statistics over the channels"
    result = labels.require_all(x, reason, dims)
    for t in args[2:4]:
        if isinstance(t, torch.Tensor):
            labels.freeze_all(t, reason)
    labels.set(out[0], result)


def weight_norm(labels: Labels, func, args, kwargs, out):
    """Each filter over its norm: filters keep their labels, what the norm is taken over stays."""
    v, g, dim = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    labels.freeze_all(v, f"weight norm in {labels.where()!r} divides by a norm over them", dims=others)
    label = labels.channels(v, dim)
    labels.match(label, labels.channels(g, dim), labels.why(v))
    labels.set(out[0], labels.get(v))
    labels.emit(out[1], dim, label)


def renorm(labels: Labels, func, args, kwargs, out):
    """What is at an index of a dimension over its norm, where that is too large: like weight norm."""
    x, dim = args[0], args[2] % args[0].ndim
    others = [d for d in range(x.ndim) if d != dim]
    labels.set(out, labels.freeze_all(x, f"renorm in {labels.where()!r} divides by a norm over them", dims=others))


def loss(labels: Labels, func, args, kwargs, out):
    """Two maps are compared: their channels go together. As a loss, in training mode, it may then be one of fewer channels;
    otherwise it is a value like any other, and stays what it is."""
    if labels.training and out.ndim == 0:
        labels.broadcast(list(args[:2]), torch.broadcast_shapes(args[0].shape, args[1].shape))
    elif out.ndim:
        pointwise(labels, func, args, kwargs, out)
    else:
        opaque(labels, args, kwargs, out, f"{func.overloadpacket} in {labels.where()!r} adds up over the channels")


def statistic(labels: Labels, func, args, kwargs, out):
    """A statistic of whole tensors, such as spectral norm's: nothing in them can go."""
    opaque(labels, args, kwargs, out, f"{func.overloadpacket} in {labels.where()!r} depends on all of them")


def convolution(labels: Labels, func, args, kwargs, out):
    """Binds the input's channels to the weight's, emits the weight's filters. A group of channels is one unit."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    x_label = labels.take(x, 1, f"a convolution in {labels.where()!r} mixes positions that have labels")
    filters, inputs = labels.channels(weight, int(transposed)), labels.channels(weight, int(not transposed))
    if groups > 1:
        labels.grouped.add(labels.where())
    if labels.where() not in labels.grouped:
        labels.match(x_label, inputs, labels.why(x if x_label is None else weight))
        contracted = x_label
    else:
        one_kernel = filters is None and weight.stride(0) == 0 and out.shape[1] == x.shape[1] == groups
        if one_kernel:
            filters = x_label  # expanded over as many channels as there are
        # A transposed convolution's weight is [in, out/groups, ...], any other's is [out, in/groups, ...].
        whole, shared, contracted = (inputs, filters, None) if transposed else (filters, inputs, None)
        if shared is not None:
            labels.freeze(shared, "the channels within one group of a grouped convolution")
        if whole is None or x_label is None:
            labels.match(x_label, whole, labels.why(x if x_label is None else weight))
        else:
            labels.unite_rows(torch.cat([whole.reshape(groups, -1), x_label.reshape(groups, -1)], 1))
            order = whole if transposed else shared  # in which it takes the channels of a group
            if order is not None:
                labels.in_order(x_label.reshape(-1, len(order)), order.expand(len(x_label) // len(order), -1))
        if transposed and whole is not None:
            # Any labels of the group will do; different ones, for those that are all the same are no labels (`compress`).
            blocks = whole.reshape(groups, -1)
            filters = blocks[:, torch.arange(out.shape[1] // groups) % blocks.shape[1]].reshape(-1)
        else:
            filters = whole
    if isinstance(bias, torch.Tensor):
        labels.match(filters, labels.channels(bias, 0), f"bias of {labels.where()!r}")
    labels.applied(True, filters, out.shape[1], contracted, labels.why(weight))
    labels.emit(out, 1, filters)
    rows = labels.channels(weight, 0)
    return [filters if rows is None and not transposed else rows, labels.channels(weight, 1)]


def deformed(labels: Labels, func, args, kwargs, out):
    """torchvision's deform_conv2d: a convolution of channels, at places that have labels of nobody's."""
    x, weight, offset, mask, bias = args[:5]
    for t in (offset, mask):
        labels.freeze_all(t, f"places in {labels.where()!r} are computed from them")
    return convolution(labels, func, (x, weight, bias, None, None, None, False, None, args[11]), {}, out)


def matmul(labels: Labels, func, args, kwargs, out):
    """mm, addmm, bmm, baddbmm: contracts x's last dimension with w's second to last."""
    added = args[0] if func.overloadpacket in (aten.addmm, aten.baddbmm) else None
    x, w = args[1:3] if added is not None else args[:2]
    x_label, inputs, rows, filters = (labels.channels(*t) for t in ((x, -1), (w, -2), (x, -2), (w, -1)))
    labels.match(x_label, inputs, labels.why(x if x_label is None else w))
    if x.ndim == 3:
        for t in (x, w):
            labels.freeze_all(t, f"{func.overloadpacket} in {labels.where()!r} is batched over labels", dims=(0,))
    labels.applied(False, filters, w.shape[-1], x_label, labels.why(w))
    labels.set(out, (*along_axis(rows, out.ndim, -2), *along_axis(filters, out.ndim, -1)))
    if added is not None:
        labels.set(out, labels.broadcast([added, out], out.shape))
    return [rows, x_label if x_label is not None else inputs, filters]


def _rules(function, *names):
    return dict.fromkeys(packets(*names), function)


Rule = Callable[..., "list[torch.Tensor | None] | None"]
RULES: dict[object, Rule] = {
    **dict.fromkeys(ELEMENTWISE, pointwise),
    **_rules(same, "_conj", "resolve_conj", "_conj_physical", "resolve_neg", "_neg_view"),
    **_rules(same, "clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "native_dropout", "empty_like"),
    **_rules(same, "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "dropout", "bernoulli"),
    **_rules(uniform, "empty", "zeros", "ones", "full", "rand", "randn", "new_empty", "new_zeros", "new_ones", "new_full"),
    **_rules(noise, "bernoulli_", "uniform_", "normal_"),
    **_rules(metadata, "is_same_size", "_assert_async", "_has_compatible_shallow_copy_type", "sym_size", "size"),
    **_rules(movement, "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze"),
    **_rules(movement, "rot90", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_"),
    **_rules(movement, "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "repeat", "flip"),
    **_rules(part, "slice", "select", "narrow", "unfold"),
    **_rules(along, "index_select", "cumsum", "cumprod", "sort", "topk", "roll", "median"),
    **_rules(at_points, "grid_sampler_2d", "grid_sampler_3d"),
    **_rules(indexed, "index"),
    **_rules(written, "index_put", "index_put_"),
    **_rules(split, "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unbind"),
    **_rules(cat, "cat"),
    **_rules(glu, "glu"),
    **_rules(stack, "stack"),
    **_rules(pad, "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    **_rules(pad, "replication_pad1d", "replication_pad2d", "replication_pad3d"),
    **_rules(in_space, "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d"),
    **_rules(in_space, "avg_pool2d", "avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "_adaptive_avg_pool2d"),
    **_rules(in_space, "_adaptive_avg_pool3d", "adaptive_avg_pool2d", "fractional_max_pool2d", "fractional_max_pool3d"),
    **_rules(in_space, "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"),
    **_rules(in_space, "upsample_trilinear3d", "upsample_linear1d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
    **_rules(in_space, "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa", "_upsample_nearest_exact1d"),
    **_rules(in_space, "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    **_rules(unpooling, "max_unpool2d", "max_unpool3d"),
    **_rules(gathered, "gather"),
    **_rules(unfolded, "im2col"),
    **_rules(folded, "col2im"),
    **_rules(along, "_fft_r2c", "_fft_c2r", "_fft_c2c"),
    **_rules(complex_view, "view_as_real", "view_as_complex"),
    **_rules(along, "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "max", "min", "norm"),
    **_rules(along, "linalg_vector_norm", "argmax", "argmin", "prod", "logsumexp", "all", "any"),
    **_rules(softmax, "_softmax", "_log_softmax", "_safe_softmax"),
    **_rules(batch_norm, "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    **_rules(batch_norm, "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm"),
    **_rules(group_norm, "native_group_norm"),
    **_rules(layer_norm, "native_layer_norm"),
    **_rules(weight_norm, "_weight_norm_interface"),
    **_rules(renorm, "renorm"),
    **_rules(loss, "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss"),
    **_rules(statistic, "mv", "dot", "vdot", "linalg_householder_product"),
    **_rules(convolution, "convolution"),
    **_rules(matmul, "mm", "addmm", "bmm", "baddbmm"),
}
# Operators of libraries that need not be there, by name.
FOREIGN = {
    **dict.fromkeys(("torchvision::roi_align", "torchvision::roi_pool"), at_points),
    "torchvision::deform_conv2d": deformed,
}


def trace_rule(op: str, like: str | None = None) -> Callable:
    """Teach `trace` what an operator does to channels; explain() names those without a rule, whose channels stay.

    op: "namespace::name". like: an operator with a rule that means the same for channels, in the same arguments:
    "aten::relu" (element by element), "aten::avg_pool2d" (channel by channel), "aten::cat", ...:

        taylored.trace_rule("mylib::swish", like="aten::silu")

    Without it this is a decorator for a rule of one's own, called as rule(labels, func, args, kwargs, out) whenever the
    operator func has made out of args, which sets the labels of out (labels are int64; equal ones live and die together):

        @taylored.trace_rule("mylib::scale")  # x [N, C, ...] times one factor per channel [C]
        def rule(labels, func, args, kwargs, out):
            label = labels.channels(args[0], 1)  # [C], or None where x has no labels
            labels.match(label, labels.channels(args[1], 0), "scaled by constants")  # alone they stay, for that reason
            labels.emit(out, 1, label)

    labels.freeze_all(tensor, reason) keeps all channels of a tensor; labels that a rule neither gives to what comes out, nor
    unites, nor freezes, stay, too. A rule is believed: prove it by `verify`. Raises ValueError if there is no such operator, or
    like has no rule.
    """
    packet = _packet("op", op)
    if like is None:
        return lambda rule: _learn(packet, _watched(rule)) and rule
    source = _packet("like", like)
    rule = RULES.get(source)
    if rule is None and any(is_elementwise(getattr(source, o)) for o in source.overloads()):
        rule = pointwise
    if rule is None:
        raise ValueError(f"like={like!r} is an operator without a rule")
    return _learn(packet, rule)


def _watched(rule):
    """A rule that cannot forget a label: what it does not speak of stays."""

    @functools.wraps(rule)
    def run(labels, func, args, kwargs, out):
        extent = labels.extent()
        dimensions = rule(labels, func, args, kwargs, out)
        reason = f"the rule of {operator_name(func)} does not say what becomes of them in {labels.where()!r}"
        labels.freeze_forgotten(args, kwargs, out, extent, reason)
        return dimensions

    return run


def _packet(argument, name):
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be an operator's name like 'mylib::scale', got {type(name).__name__}")
    namespace, _, op = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), op, None) if op else None
    if packet is None:
        raise ValueError(f"{argument}={name!r} is no operator that torch knows; it is named like 'aten::relu'")
    return packet


def _learn(packet, rule):
    RULES[packet] = rule
    return rule


def rule_of(func) -> Rule | None:
    """The rule of an operator's overload."""
    if (rule := RULES.get(func.overloadpacket)) is None:
        rule = pointwise if is_elementwise(func) else FOREIGN.get(operator_name(func))
    return rule
