"""The same by differences, in bfloat16: what is rounded is the change, which is small, and not the value beside which it would be
lost."""

import math
import operator

import torch
from torch.fx import Node

from taylored import ops
from taylored._oracle.exact import CORRECTED, Replay, take_rows
from taylored._oracle.program import LAYERS, OTHER_LAYERS, aten, shape_of
from taylored._torch_compat import tree_map

# What moves values or averages them: of a difference it makes the difference.
LINEAR = {operator.getitem} | {
    getattr(getattr(aten, name), overload)
    for name in (
        "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "slice", "select",
        "clone", "alias", "cat", "stack", "split", "split_with_sizes", "chunk", "unbind", "pixel_shuffle", "channel_shuffle",
        "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
    )
    for overload in getattr(aten, name).overloads()
}  # fmt: skip


class DifferenceReplay(Replay):
    """The same by differences: a tail carries how far its values are from the clean ones, in bfloat16, while those stay in
    float32. So what is rounded is the change, which is small, and not the value, beside which it would be lost. Layers and
    other linear operators apply to a difference as they are, without bias; any other f gives f(clean + difference) - f(clean).
    """

    tail_dtype = torch.bfloat16

    def __init__(self, model, graph, example_inputs):
        super().__init__(model, graph, example_inputs)
        self.packed = {}  # a difference is not zero where the value is
        self.weights = {n: self._layer(n)[0].to(self.tail_dtype) for n in self.nodes if self._is_layer(n)}

    def _is_layer(self, node) -> bool:
        return node.target in LAYERS + OTHER_LAYERS and node.args[1] in self.constants

    def _is_linear(self, node) -> bool:
        """Without a constant term, in all of its arguments at once."""
        if node.target is aten.add.Tensor:
            return not node.kwargs and all(
                isinstance(a, Node) and self._varies(a) and shape_of(a) == shape_of(node) for a in node.args
            )
        pads_with_zeros = node.target is aten.constant_pad_nd.default and not any(node.args[2:])
        return pads_with_zeros or node.target in LINEAR or self._is_layer(node)

    def _reads(self, nodes, entries, changed):
        clean = super()._reads(nodes, entries, changed)
        general = [n for node in nodes if not self._is_linear(node) for n in node.all_input_nodes]
        general += [node for node in nodes if not self._is_linear(node) and _bounds(node) is None]
        return clean | dict.fromkeys(n for n in (*general, *self.output.all_input_nodes) if self._varies(n))

    def _memory(self, node, corrected, clean):
        most = max(self._bytes(n) for n in (node, *node.all_input_nodes))
        size = self._bytes(node) // 2  # two bytes instead of four
        return size, size if corrected else 2 * size, 4 * max(most, CORRECTED)

    def replay(self, tail, values, rows, segments):
        changed: dict[Node, object] = {}  # node -> the difference; of what are no floats, the new value
        for node in tail.nodes:
            name = tail.entries.get(node)
            if name is not None and self._corrects(node, changed):
                changed[node] = self._empty(node, len(rows), values[node])
                for pairs, _, share in self._shares(node, values, rows, segments, tail.group.inputs[name], -self.weights[node]):
                    changed[node][pairs] = share
            else:
                arrived = changed
                if name is not None:
                    x = node.args[0]
                    arrived = changed | {x: self._without(tail.group, name, x, changed.get(x), values, rows, segments)}
                changed[node] = self._difference(node, arrived, values, rows, tail.dies.get(node, ()))
            for n in tail.dies.get(node, ()):
                if n not in self.output.all_input_nodes:
                    changed.pop(n, None)
        return self._result(lambda n: self._new(n, changed, values, rows, slice(None)))

    def _new(self, node, changed, values, rows, pairs):
        """A node's value for some pairs: clean, plus the difference."""

        def add(clean, difference):
            return difference.float().add_(clean) if difference.is_floating_point() else difference

        if not self._varies(node):
            return values[node]
        clean = tree_map(lambda t: take_rows(t, rows[pairs]) if t.numel() else t, values[node])  # batch norm has empty outputs
        return tree_map(add, clean, tree_map(lambda t: t[pairs], changed[node])) if node in changed else clean

    def _without(self, group, name, x, difference, values, rows, segments):
        """The difference of a consumer's input once the unit is gone: there it is all that there was."""
        slots, axis = group.inputs[name], self.graph.layers[name].axis
        difference = self._empty(x, len(rows), values[x]).zero_() if difference is None else difference.clone()
        for unit, start, stop in segments:
            gone = take_rows(values[x], rows[start:stop]).index_select(axis, slots[unit])
            difference[start:stop].index_copy_(axis, slots[unit], -gone.to(self.tail_dtype))
        return difference

    def _difference(self, node, changed, values, rows, dying):
        """What a node makes of its inputs' differences."""

        def difference(n):
            if n in changed or not self._varies(n):
                return changed.get(n, values.get(n))
            return self._empty(n, len(rows), values[n]).zero_()

        if self._is_layer(node):
            return node.target(difference(node.args[0]), self.weights[node], None, *node.args[3:])
        if node.target is aten.add.Tensor and self._is_linear(node) and len(came := set(node.args) & changed.keys()) == 1:
            return changed[came.pop()]  # the other one is as it was
        if self._is_linear(node):
            return self._run(node, difference, len(rows))
        if (bounds := _bounds(node)) is not None:
            x = node.args[0]
            clean = values[x] if ops.is_dense(values[x]) else values[x].contiguous()
            own = x in dying and len(x.users) == 1 and (self._is_layer(x) or not self._is_linear(x))  # and no view
            if not own or changed[x].stride()[1:] != clean.stride()[1:] or not ops.is_dense(changed[x]):
                strides = (clean[:1].numel(), *clean.stride()[1:])
                copy = torch.empty_strided(changed[x].shape, strides, dtype=self.tail_dtype, device=clean.device)
                changed = {x: copy.copy_(changed[x])}
            ops.clamp_difference_(changed[x], clean, rows, *bounds)
            return changed[x]
        return self._general(node, changed, values, rows)

    def _general(self, node, changed, values, rows):
        """f(clean + difference) - f(clean), few pairs at a time."""
        own = [n for n in node.all_input_nodes if n in changed]  # their sums are nobody else's
        step = max(1, CORRECTED // max(1, *(self._bytes(n) for n in (node, *node.all_input_nodes))))
        parts = []
        for start in range(0, len(rows), step):
            pairs = slice(start, min(start + step, len(rows)))
            new = self._run(node, lambda n, pairs=pairs: self._new(n, changed, values, rows, pairs), pairs.stop - start, own)
            old = self._new(node, {}, values, rows, pairs)
            parts.append(tree_map(lambda a, b: a.sub_(b).to(self.tail_dtype) if a.is_floating_point() else a, new, old))
        return tree_map(lambda *parts: torch.cat(parts), *parts) if len(parts) > 1 else parts[0]


def _bounds(node) -> tuple[float, float] | None:
    """Those of a node that clamps, such as ReLU."""
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.hardtanh.default:
        low, high = map(float, (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]))
        return low, high
    return None
