"""A model as a program of which parts can run again: what the oracle computes with.

The model is exported once; a batch of examples runs once, and for each unit only what lies downstream of its consumers runs
again (the *tail*). The consumer itself is not run again either: it is linear, so `consumer(x without u) = consumer(x) -
consumer(u alone)`. Many (example, unit) pairs share one run of the tail. The result is exact: the tail computes what the
whole would. `DifferenceReplay` computes the differences alone, in bfloat16.
"""

import dataclasses
import itertools
import math
import operator

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only, tree_unflatten

from taylored import ops
from taylored.trace import ChannelGraph, Group, as_arguments, count_examples, twice

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
LAYERS = (*CONVOLUTIONS, aten.linear.default)
# Others that consumers may be: run again whole, with the unit's channels zeroed.
OTHER_LAYERS = tuple(
    getattr(getattr(aten, name), overload)
    for name, overload in [
        ("conv1d", "padding"), ("conv2d", "padding"), ("conv3d", "padding"), ("conv_transpose1d", "default"),
        ("conv_transpose2d", "input"), ("conv_transpose3d", "input"), ("convolution", "default"),
    ]
)  # fmt: skip
# Activations that may overwrite their input where nobody else reads it.
IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.silu.default: aten.silu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.add.Tensor: aten.add_.Tensor,
}
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
# A 3x3 convolution of float32 that may skip the zeros of its input: worth it on a processor with AVX-512 from so many
# output channels, below such a share of its input that is not zero (python benchmarks/sparse_conv.py).
SPARSE_OUTPUTS, SPARSE_DENSITY = 128, 0.7
CORRECTED = 1 << 22  # bytes of a value that are corrected, or of differences that are taken, together


class NotReplayable(Exception):
    """The model cannot be exported, or not so that its examples are told apart."""


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
        consumers = list(dict.fromkeys(name for group in graph.groups for name in group.inputs))
        program = _export(model, consumers, example_inputs)
        self.calls = _calls(program.graph, consumers)
        self.output_spec = program.call_spec.out_spec
        signature = program.graph_signature
        tensors = {**program.state_dict, **program.constants}
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        named |= signature.inputs_to_lifted_tensor_constants
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        constants = {n: tensors[named[n.name]].detach() for n in placeholders if n.name in named}
        folded = _fold_batch_norms(program.graph, constants)
        self.constants = {n: self._cast(t) for n, t in constants.items()}
        self.folded = {n: tuple(map(self._cast, pair)) for n, pair in folded.items()}
        self.inputs = [n for n in placeholders if n.name not in named]
        self.output = next(n for n in program.graph.nodes if n.op == "output")
        self.nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output") and n.users]
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.batch = _batch_symbol(self.inputs, self.nodes)
        self.packed = {n: self._layer(n)[0].permute(2, 1, 3, 0).contiguous() for n in self.nodes if self._may_skip(n)}
        self.sparse: set[Node] = set()  # those of them that skip zeros on the present batch
        self.tails = {g.name: self._tail(g) for g in graph.groups}

    def _cast(self, tensor):
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def _layer(self, node) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias that a convolution runs with."""
        return self.folded[node] if node in self.folded else tuple(map(self.constants.get, node.args[1:3]))

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
        elif target in IN_PLACE and node.args[0] in in_place and _shape(node.args[0]) == _shape(node):
            target = IN_PLACE[target]
        return target(*args, **kwargs)

    def _symbol(self, value, size):
        return int(value.node.expr.subs(self.batch, size))

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

    def replay(self, tail: Tail, values, rows: torch.Tensor, segments):
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
                    x = value(node.args[0])
                    x = x.clone() if node.args[0] in changed else x
                    axis = self.graph.layers[name].axis
                    for unit, start, stop in segments:
                        x[start:stop].index_fill_(axis, slots[unit], 0)
                    changed[node] = self._run(node, lambda n, node=node, x=x: x if n is node.args[0] else value(n), len(rows))
                    gathered.pop(node.args[0], None)
            for n in tail.dies.get(node, ()):
                if n not in self.output.all_input_nodes:
                    changed.pop(n, None)
        return self._result(value)

    def _corrected(self, node, values, rows, segments, slots):
        """The consumer's old output, less what the unit gave to it."""
        old = values[node]
        new = self._empty(node, len(rows), old)
        for pairs, index, share in self._shares(node, values, rows, segments, slots, self._layer(node)[0]):
            torch.sub(_take(old, index), share, out=new[pairs])
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
                yield pairs, rows[pairs], node.target(_take(given, rows[pairs]), by, None, *node.args[3:])

    def _empty(self, node, pairs, like):
        """Memory for a node's value."""
        layout = torch.channels_last if len(_shape(node)) == 4 else torch.contiguous_format
        return torch.empty(pairs, *_shape(node)[1:], dtype=self.tail_dtype, device=like.device, memory_format=layout)

    def active(self, tail: Tail, values, units) -> torch.Tensor:
        """[N, units] bool: where the unit is not zero at all of its consumers."""
        found = None
        for node, name in tail.entries.items():
            x = values[node.args[0]].movedim(self.graph.layers[name].axis, 1)
            zeros = ops.channel_statistics(x)[2]  # [N, C]
            nonzero = (zeros != math.prod(x.shape[2:]))[:, tail.group.inputs[name][units]].any(2)
            found = nonzero if found is None else found | nonzero
        return found


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
                isinstance(a, Node) and self._varies(a) and _shape(a) == _shape(node) for a in node.args
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
        clean = tree_map(lambda t: _take(t, rows[pairs]) if t.numel() else t, values[node])  # batch norm has empty outputs
        return tree_map(add, clean, tree_map(lambda t: t[pairs], changed[node])) if node in changed else clean

    def _without(self, group, name, x, difference, values, rows, segments):
        """The difference of a consumer's input once the unit is gone: there it is all that there was."""
        slots, axis = group.inputs[name], self.graph.layers[name].axis
        difference = self._empty(x, len(rows), values[x]).zero_() if difference is None else difference.clone()
        for unit, start, stop in segments:
            gone = _take(values[x], rows[start:stop]).index_select(axis, slots[unit])
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
        return tuple(map(float, (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])))
    return None


def _export(model, consumers, example_inputs):
    """The model as a program in which the input of consumer number i is marked so. (Of which module an operator comes, torch
    does not say reliably where one has several names.)"""
    args, kwargs = as_arguments(example_inputs)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, i=i: (ops.mark(args[0], i), *args[1:]))
        for i, name in enumerate(consumers)
    ]
    try:
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = twice(*tree_map_only(torch.Tensor, torch.clone, (args, kwargs)))  # a batch of one looks constant
            shapes = torch.export.ShapesCollection()
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.ndim:
                    shapes[tensor] = {0: torch.export.Dim.AUTO}
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            return program.run_decompositions({})
    except Exception as error:  # whatever the model's code runs into
        lines = str(error).strip().splitlines() or [""]
        raise NotReplayable(f"it cannot be exported ({type(error).__name__}: {lines[0]})") from error
    finally:
        for handle in handles:
            handle.remove()


def _calls(graph, consumers) -> dict[Node, str]:
    """The nodes that apply a consumer -> its name; takes the marks out of the graph."""
    calls = {}
    for node in list(graph.nodes):
        if node.target is ops.MARK:
            name, users = consumers[node.args[1]], list(node.users)
            if not all(user.target in LAYERS + OTHER_LAYERS and user.args[0] is node for user in users):
                what = ", ".join(str(user.target) for user in users)
                raise NotReplayable(f"{name!r} was exported as {what}, not as one layer")
            calls |= dict.fromkeys(users, name)
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return calls


def _batch_symbol(inputs, nodes):
    """The symbol that stands for the number of examples; every tensor must have it in front, or not at all."""
    symbols = {_shape(n)[0].node.expr for n in inputs if _shape(n) and isinstance(_shape(n)[0], torch.SymInt)}
    if len(symbols) != 1 or not next(iter(symbols)).is_Symbol:
        raise NotReplayable("its batch dimension is not dynamic")
    symbol = next(iter(symbols))
    for node in nodes:
        if node.op != "call_function":
            raise NotReplayable(f"its graph has a {node.op} node")
        for value in tree_leaves(node.meta.get("val")):
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            if any(isinstance(size, torch.SymInt) and (d or size.node.expr != symbol) for d, size in enumerate(shape)):
                raise NotReplayable(f"{node.name} has shape {shape}: examples are not along its first dimension")
    return symbol


def _fold_batch_norms(graph, constants) -> dict[Node, tuple[torch.Tensor, torch.Tensor]]:
    """Batch norm in evaluation is a scale and a shift: give them to the convolution before it. Returns that one's new
    weight and bias, and takes the batch norm out of the graph."""
    folded = {}

    def values(node, otherwise, channels):
        return torch.full((channels,), otherwise, dtype=torch.float64) if node is None else constants[node].double()

    for norm in list(graph.nodes):
        if norm.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        layer, *arguments = norm.args[:5]
        if layer.target not in CONVOLUTIONS or len(layer.users) > 1 or layer.args[1] not in constants:
            continue
        channels = _shape(layer)[1]
        if layer not in folded:  # several batch norms in a row fold into it one after the other
            old = values(layer.args[2] if len(layer.args) > 2 else None, 0.0, channels)
            folded[layer] = constants[layer.args[1]].double(), old.to(constants[layer.args[1]].device)
        weight, bias = folded[layer]
        scale, shift, mean, var = (values(*pair, channels).to(bias.device) for pair in zip(arguments, (1.0, 0.0, 0.0, 1.0)))
        scale = scale / torch.sqrt(var + norm.args[6])
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        folded[layer] = weight, (bias - mean) * scale + shift
        for part in list(norm.users):
            part.replace_all_uses_with(layer)
            graph.erase_node(part)
        graph.erase_node(norm)
    return {layer: tuple(t.to(constants[layer.args[1]].dtype) for t in pair) for layer, pair in folded.items()}


def _shape(node) -> tuple:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _is_fresh(node) -> bool:
    """Whether nothing else can see the node's memory: it is no view, and only one node reads it."""
    return len(node.users) == 1 and node.target in (*LAYERS, *OTHER_LAYERS, *IN_PLACE)


def _take(tensor, index):
    """The rows of an ascending index: a view where they are neighbours."""
    first, last = int(index[0]), int(index[-1])
    return tensor[first : last + 1] if last - first == len(index) - 1 else tensor.index_select(0, index)
