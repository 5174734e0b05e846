"""Replay: a batch runs once, and for each unit only what lies downstream of its consumers runs again (the *tail*).

The consumer itself is not run again either: it is linear, so `consumer(x without u) = consumer(x) - consumer(u alone)`. Many
(example, unit) pairs share one run of the tail. The result is exact: the tail computes what the whole would.
"""

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch.fx import Node

from taylored import ops
from taylored._graph.values import ChannelGraph, Group
from taylored._modules import as_arguments, count_examples
from taylored._oracle.program import CONVOLUTIONS, LAYERS, OTHER_LAYERS, aten, export, shape_of
from taylored._torch_compat import symbol, tree_leaves, tree_unflatten

# Activations that may overwrite their input where nobody else reads it.
IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.silu.default: aten.silu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.add.Tensor: aten.add_.Tensor,
}
# A 3x3 convolution of float32 that may skip the zeros of its input: worth it on a processor with AVX-512 from so many
# output channels, below such a share of its input that is not zero (python benchmarks/sparse_conv.py).
SPARSE_OUTPUTS, SPARSE_DENSITY = 128, 0.7
CORRECTED = 1 << 22  # bytes of a value that are corrected, or of differences that are taken, together


@dataclasses.dataclass
class Tail:
    """What runs again for one group's units. entries: its consumers' calls (node -> consumer's name); nodes: they and all
    that follows, in order; clean: values from outside that they read; ready: position of the node after which all of
    those are there; bytes: at the peak, per pair; fixed: bytes beside them; flops: per pair."""

    group: Group
    entries: dict[Node, str]
    nodes: list[Node]
    clean: list[Node]
    ready: int
    dies: dict[Node, list[Node]]
    bytes: int
    fixed: int
    flops: int


class Replay:
    """A model exported with a dynamic batch, its batch norms folded into the convolutions before them, in float32."""

    dtype = tail_dtype = torch.float32

    def __init__(self, model, graph: ChannelGraph, example_inputs):
        self.graph = graph
        program = export(model, list(dict.fromkeys(name for group in graph.groups for name in group.inputs)), example_inputs)
        self.calls, self.batch, self.inputs, self.nodes = program.calls, program.batch, program.inputs, program.nodes
        self.output, self.output_spec = program.output, program.output_spec
        self.constants = {n: self._cast(t) for n, t in program.constants.items()}
        self.folded = {n: tuple(map(self._cast, pair)) for n, pair in program.folded.items()}
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.packed = {n: self._layer(n)[0].permute(2, 1, 3, 0).contiguous() for n in self.nodes if self._may_skip(n)}
        self.sparse: set[Node] = set()  # those of them that skip zeros on the present batch
        self.tails = {g.name: self._tail(g) for g in graph.groups}

    def _cast(self, tensor):
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def _layer(self, node) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias that a convolution runs with."""
        if node in self.folded:
            return self.folded[node]
        weight, *bias = node.args[1:3]
        return self.constants[weight], self.constants.get(bias[0]) if bias else None

    def _may_skip(self, node) -> bool:
        """Whether `ops.sparse_conv` can compute a node, and faster where there are zeros enough."""
        if node.target is not aten.conv2d.default or node.args[1] not in self.constants:
            return False
        weight, plain = self._layer(node)[0], ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups
        return (
            torch.backends.cpu.get_cpu_capability() == "AVX512"
            and (weight.device.type, weight.dtype) == ("cpu", torch.float32)
            and weight.shape[2:] == (3, 3)
            and len(weight) >= SPARSE_OUTPUTS
            and len(node.args) > 4
            and all(a == b for a, b in zip(node.args[3:], plain))
        )

    # .. what is where

    def _tail(self, group) -> Tail:
        entries = {n: self.calls[n] for n in self.nodes if self.calls.get(n) in group.inputs}  # not those without effect
        changed = set(entries)
        for node in self.nodes:
            if any(n in changed for n in node.all_input_nodes):
                changed.add(node)
        nodes = [n for n in self.nodes if n in changed]
        clean = self._reads(nodes, entries, changed)
        last = {n: node for node in nodes for n in node.all_input_nodes if n in changed}
        dies: dict[Node, list[Node]] = {}
        for n, node in last.items():
            dies.setdefault(node, []).append(n)
        outputs = set(self.output.all_input_nodes)
        live = peak = flops = fixed = 0
        for node in nodes:
            corrected = node in entries and self._corrects(node, changed)
            size, needs, beside = self._memory(node, corrected, clean)
            peak, fixed = max(peak, live + needs), max(fixed, beside)
            live += size - sum(self._memory(n, False, clean)[0] for n in dies.get(node, ()) if n not in outputs)
            flops += self._correction_flops(node, group, entries[node]) if corrected else self.flops(node)
        ready = max((self.position[n] for n in clean if n in self.position), default=0)
        return Tail(group, entries, nodes, list(clean), ready, dies, max(peak, 1), fixed, flops)

    def _reads(self, nodes, entries, changed) -> dict[Node, None]:
        """The clean values that a tail needs."""
        clean = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in changed and self._varies(n))
        clean |= dict.fromkeys(n for n in entries if self._corrects(n, changed))  # their own outputs, to be corrected
        return clean | dict.fromkeys(n.args[0] for n in entries if self._varies(n.args[0]))  # is the unit zero anyway?

    def _memory(self, node, corrected, clean) -> tuple[int, int, int]:
        """Bytes of a node's value in a tail; while it is computed, per pair; and those that do not depend on the pairs."""
        size = self._bytes(node)
        if corrected:  # the rows to correct, and what to subtract
            return size, size, 2 * max(size, CORRECTED)
        return size, 2 * size + sum(self._bytes(n) for n in node.all_input_nodes if n in clean), 0  # their rows are gathered

    def _corrects(self, node, changed) -> bool:
        """Whether a consumer's old output can be corrected: its input is unchanged but for the unit, its weight plain."""
        groups = node.args[6] if len(node.args) > 6 else 1
        return node.target in LAYERS and groups == 1 and node.args[0] not in changed and node.args[1] in self.constants

    def _varies(self, node) -> bool:
        """Whether a node's value differs between examples."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)
        return isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)

    def _bytes(self, node) -> int:
        """Of one example's clean value; views own nothing."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not self._varies(node):
            return 0
        return math.prod(value.shape[1:]) * (self.dtype.itemsize if value.is_floating_point() else value.element_size())

    def flops(self, node) -> int:
        """Of one example: two per multiply-add of convolutions and linear layers."""
        if node.target not in LAYERS + OTHER_LAYERS:
            return 0
        weight = node.args[1].meta["val"]
        transposed = "transpose" in str(node.target)
        return 2 * math.prod((node.args[0] if transposed else node).meta["val"].shape[1:]) * math.prod(weight.shape[1:])

    def _correction_flops(self, node, group, name):
        channels = node.args[1].meta["val"].shape[1]
        return self.flops(node) * group.inputs[name].shape[1] // channels

    def bound(self, chosen) -> float:
        """FLOPs of running the whole model once per unit over FLOPs of the tails."""
        whole = sum(self.flops(n) for n in self.nodes)
        return (
            whole
            * sum(len(u) for u in chosen.values())
            / max(1, sum(len(u) * self.tails[name].flops for name, u in chosen.items()))
        )

    # .. running

    def _run(self, node, value, size, in_place=()):
        """One node's value. value: node -> its value; size: examples (or pairs) that run together."""

        def argument(n):
            found = n.meta.get("val")
            return self._symbol(found, size) if isinstance(found, torch.SymInt) else value(n)

        if isinstance(node.meta.get("val"), torch.SymInt):
            return self._symbol(node.meta["val"], size)
        if node in self.sparse:
            return ops.sparse_conv(value(node.args[0]), self.packed[node], self._layer(node)[1])
        args, kwargs = (torch.fx.node.map_arg(a, argument) for a in (node.args, node.kwargs))
        if node in self.folded:
            args = (args[0], *self.folded[node], *args[3:])
        target = node.target
        if target in (aten.view.default, aten._unsafe_view.default):
            target = aten.reshape.default  # strides here are not those of the export
        elif target in IN_PLACE and node.args[0] in in_place and shape_of(node.args[0]) == shape_of(node):
            target = IN_PLACE[target]
        return target(*args, **kwargs)

    def _symbol(self, value, size):
        return int(symbol(value).subs(self.batch, size))

    def live(self, tails) -> list[int]:
        """Bytes of one example's values that `forward` keeps after each node, for those tails."""
        last = self._last_uses(tails)
        change = [0] * (len(self.nodes) + 2)
        for node, i in self.position.items():
            change[i] += self._bytes(node)
            change[last[node] + 1] -= self._bytes(node)
        return list(itertools.accumulate(change))

    def _last_uses(self, tails) -> dict[Node, int]:
        """After which position a value is no longer needed."""
        last = {n: self.position[node] for node in self.nodes for n in node.all_input_nodes}
        last |= dict.fromkeys(self.output.all_input_nodes, len(self.nodes))
        for tail in tails:
            for n in tail.clean:
                last[n] = max(last[n], tail.ready)
        return last

    def forward(self, inputs, visit=None, tails=()):
        """Run a batch; returns the output. visit(tail, values) is called for each of the tails, in order of `ready`, as
        soon as its clean values are there; values are dropped after their last use."""
        args, kwargs = as_arguments(inputs)
        leaves = tree_leaves((args, kwargs))
        values = dict(self.constants)
        size = count_examples(leaves)
        values |= {n: self._cast(t) if isinstance(t, torch.Tensor) else t for n, t in zip(self.inputs, leaves, strict=True)}
        waiting = list(tails)
        dies: dict[int, list[Node]] = {}
        for n, i in self._last_uses(tails).items():
            if n not in self.constants:
                dies.setdefault(i, []).append(n)
        for i, node in enumerate(self.nodes):
            if node in self.packed:
                x = values[node.args[0]]
                dense = x.numel() - int(ops.channel_statistics(x)[2].sum()) > SPARSE_DENSITY * x.numel()
                (self.sparse.discard if dense else self.sparse.add)(node)
            values[node] = self._run(node, values.__getitem__, size)
            while waiting and waiting[0].ready <= i:
                visit(waiting.pop(0), values)
            for n in dies.get(i, ()):
                values.pop(n, None)
        return self._result(values.__getitem__)

    def _result(self, value):
        return tree_unflatten([value(n) if isinstance(n, Node) else n for n in self.output.args[0]], self.output_spec)

    def replay(self, tail: Tail, values, rows, segments):
        """The model's output for pairs. rows: [P] the example of each; segments: (unit, start, stop), which pairs are of
        which unit."""
        changed: dict[Node, object] = {}
        gathered: dict[Node, torch.Tensor] = {}

        def value(n):
            if n in changed:
                return changed[n]
            if not self._varies(n):
                return values[n]
            if n not in gathered:
                gathered[n] = values[n].index_select(0, rows)
            return gathered[n]

        for node in tail.nodes:
            name = tail.entries.get(node)
            if name is None:
                own = [n for n in tail.dies.get(node, ()) if _is_fresh(n)]
                changed[node] = self._run(node, value, len(rows), own)
            else:
                slots = tail.group.inputs[name]
                if self._corrects(node, changed):
                    changed[node] = self._corrected(node, values, rows, segments, slots)
                else:
                    source: Any = node.args[0]
                    x = value(source)
                    x = x.clone() if source in changed else x
                    axis = self.graph.layers[name].axis
                    for unit, start, stop in segments:
                        x[start:stop].index_fill_(axis, slots[unit], 0)
                    changed[node] = self._run(node, lambda n, source=source, x=x: x if n is source else value(n), len(rows))
                    gathered.pop(source, None)
            for n in tail.dies.get(node, ()):
                if n not in self.output.all_input_nodes:
                    changed.pop(n, None)
        return self._result(value)

    def _corrected(self, node, values, rows, segments, slots):
        """The consumer's old output, less what the unit gave to it."""
        old = values[node]
        new = self._empty(node, len(rows), old)
        for pairs, index, share in self._shares(node, values, rows, segments, slots, self._layer(node)[0]):
            torch.sub(take_rows(old, index), share, out=new[pairs])
        return new

    def _shares(self, node, values, rows, segments, slots, weight):
        """(pairs, their examples, what the unit gives to a consumer there): few pairs at a time, so that it stays in the
        cache. In the weight's type."""
        x = values[node.args[0]]
        axis = 1 if node.target in CONVOLUTIONS else x.ndim - 1
        step = max(1, CORRECTED // max(1, self._bytes(node)))
        for unit, start, stop in segments:
            given = x.movedim(axis, 0)[slots[unit]].movedim(0, axis).to(weight.dtype)
            by = weight.index_select(1, slots[unit])
            for part in range(start, stop, step):
                pairs = slice(part, min(part + step, stop))
                yield pairs, rows[pairs], node.target(take_rows(given, rows[pairs]), by, None, *node.args[3:])

    def _empty(self, node, pairs, like):
        """Memory for a node's value."""
        layout = torch.channels_last if len(shape_of(node)) == 4 else torch.contiguous_format
        return torch.empty(pairs, *shape_of(node)[1:], dtype=self.tail_dtype, device=like.device, memory_format=layout)

    def active(self, tail: Tail, values, units) -> torch.Tensor:
        """[N, units] bool: where the unit is not zero at all of its consumers."""
        found = []
        for node, name in tail.entries.items():
            x = values[node.args[0]].movedim(self.graph.layers[name].axis, 1)
            zeros = ops.channel_statistics(x)[2]  # [N, C]
            found.append((zeros != math.prod(x.shape[2:]))[:, tail.group.inputs[name][units]].any(2))
        return torch.stack(found).any(0)


def _is_fresh(node) -> bool:
    """Whether nothing else can see the node's memory: it is no view, and only one node reads it."""
    return len(node.users) == 1 and node.target in (*LAYERS, *OTHER_LAYERS, *IN_PLACE)


def take_rows(tensor, index):
    """The rows of an ascending index: a view where they are neighbours."""
    first, last = int(index[0]), int(index[-1])
    return tensor[first : last + 1] if last - first == len(index) - 1 else tensor.index_select(0, index)
