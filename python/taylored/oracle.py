"""The oracle: the true score of a unit, measured by zeroing it at its consumers (arXiv:1611.06440, section 2.2).

The paper runs the whole model once per unit. Here the model is exported once; a batch of examples runs once, and for each
unit only what lies downstream of its consumers runs again (the *tail*). The consumer itself is not run again either: it is
linear, so `consumer(x without u) = consumer(x) - consumer(u alone)`. Many (example, unit) pairs share one run of the tail,
and examples on which the unit is zero anyway are left out. The result is exact: the tail computes what the whole would.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten
from tqdm import tqdm

from taylored import ops
from taylored.files import digest, write_atomically
from taylored.trace import ChannelGraph, Group, as_arguments, count_examples, in_mode, run_on, twice, unwrapped, zeroed

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
# A 3x3 convolution of float32 that may skip the zeros of its input: worth it on a processor with AVX-512 from so many
# output channels, below such a share of its input that is not zero (python benchmarks/sparse_conv.py).
SPARSE_OUTPUTS, SPARSE_DENSITY = 128, 0.7
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAVE_EVERY = 5.0  # seconds


class NotReplayable(Exception):
    """The model cannot be exported, or not so that its examples are told apart."""


def oracle(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable,
    loss_fn: Callable,
    *,
    mode: str = "abs",
    units: dict[str, Iterable[int]] | None = None,
    precision: str = "float32",
    memory: str | int = "1GiB",
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """The change of the mean loss over all examples when a unit is gone, for every unit: group name -> float64 [units].

    batches yields (inputs, targets), the same at every iteration; loss_fn(model(inputs), targets) is a mean over the
    batch. mode: "loss", the change with its sign; "abs", its absolute value, taken after averaging over all examples.
    units: group name -> indices of the units to measure (default: all); the others' entries are NaN. precision:
    "bfloat16" computes in that type and is faster; its rank agreement with float32 on a sample is printed. memory: what
    the values kept and computed may take beside the model and the data, in bytes or as "512MiB", "2GiB". checkpoint: a
    file to which what is done is saved every few seconds, and from which the same call goes on. In a process group of
    torch.distributed every rank measures its share of the units, and all return the same.

    A model that cannot be exported with a dynamic batch runs whole, once per unit, masked at the consumers: slower, and
    said in a warning. Raises ValueError for unusable arguments, FloatingPointError if the loss is not finite.
    """
    if mode not in ("abs", "loss"):
        raise ValueError(f"mode must be 'abs' or 'loss', got {mode!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    budget = parse_memory(memory)
    model = unwrapped(model)
    chosen = _chosen(graph, units)
    with in_mode(model, training=False), torch.inference_mode():
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("batches is empty: there is nothing to measure on")
        rank, world = _rank_and_world()
        mine = {name: indices[rank::world] for name, indices in chosen.items()}
        journal = _Journal(checkpoint, rank, world, _fingerprint(model, chosen, precision, budget), mine, graph)
        show = progress and rank == 0
        try:
            replay = Replay(model, graph, first[0], PRECISIONS[precision])
        except NotReplayable as reason:
            warnings.warn(f"the oracle runs the whole model for each unit: {reason}", stacklevel=2)
            _measure_whole(model, graph, batches, loss_fn, mine, PRECISIONS[precision], journal, show)
        else:
            _measure(replay, batches, loss_fn, mine, budget, journal, show)
        journal.save()
    result = {}
    for group in graph.groups:
        if group.name in chosen:
            total = journal.sums[group.name]
            if world > 1:
                device = next(model.parameters()).device if torch.distributed.get_backend() == "nccl" else "cpu"
                shared = total.to(device)
                torch.distributed.all_reduce(shared)
                total = shared.cpu()
            change = torch.full((group.units,), math.nan, dtype=torch.float64)
            change[chosen[group.name]] = total[chosen[group.name]] / journal.examples
            if not change[chosen[group.name]].isfinite().all():
                raise FloatingPointError(f"the loss is not finite without some unit of {group.name!r}")
            result[group.name] = change.abs() if mode == "abs" else change
    if precision != "float32" and rank == 0 and progress:
        print(_agreement(model, graph, first, loss_fn, chosen, budget))
    return result


def parse_memory(memory: str | int) -> int:
    """Bytes of "512MiB", "2GiB", "1.5GB" or an integer."""
    if isinstance(memory, int) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kKMGT]?)(i?)B?\s*", str(memory))
    if not found or not float(found[1]):
        raise ValueError(f"memory must be bytes, or text like '512MiB' or '2GiB', got {memory!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def _chosen(graph, units) -> dict[str, torch.Tensor]:
    if units is None:
        return {g.name: torch.arange(g.units) for g in graph.groups}
    chosen = {}
    for name, indices in units.items():
        try:
            group = graph.group(name)
        except KeyError as error:
            raise ValueError(f"units names {name!r}, which is no group of the graph") from error
        chosen[name] = torch.as_tensor(indices, dtype=torch.int64).unique()
        if len(chosen[name]) and not 0 <= chosen[name][0] <= chosen[name][-1] < group.units:
            raise ValueError(f"units[{name!r}] must lie in 0..{group.units - 1}, got {chosen[name].tolist()}")
    return chosen


def _rank_and_world() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


# -- the model as a program --------------------------------------------------------------------------------------------


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
    """A model exported with a dynamic batch, its batch norms folded into the convolutions before them."""

    def __init__(self, model, graph: ChannelGraph, example_inputs, dtype: torch.dtype):
        self.graph, self.dtype = graph, dtype
        program = _export(model, example_inputs)
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
        entries = {n: name for name in group.inputs for n in self._calls(name)}
        changed = set(entries)
        for node in self.nodes:
            if any(n in changed for n in node.all_input_nodes):
                changed.add(node)
        nodes = [n for n in self.nodes if n in changed]
        clean = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in changed and self._varies(n))
        clean |= dict.fromkeys(n for n in entries if self._corrects(n, changed))  # their own outputs, to be corrected
        clean |= dict.fromkeys(n.args[0] for n in entries if self._varies(n.args[0]))  # is the unit zero anyway?
        last = {n: node for node in nodes for n in node.all_input_nodes if n in changed}
        dies: dict[Node, list[Node]] = {}
        for n, node in last.items():
            dies.setdefault(node, []).append(n)
        outputs = set(self.output.all_input_nodes)
        live = peak = flops = fixed = 0
        for node in nodes:
            size = self._bytes(node)
            corrected = node in entries and node in clean
            if corrected:  # the rows to correct, and what to subtract
                fixed = max(fixed, 2 * max(size, CORRECTED))
                peak = max(peak, live + size)
            else:
                reads = sum(self._bytes(n) for n in node.all_input_nodes if n in clean)  # their rows are gathered
                peak = max(peak, live + 2 * size + reads)
            live += size - sum(self._bytes(n) for n in dies.get(node, ()) if n not in outputs)
            flops += self._correction_flops(node, group, entries[node]) if corrected else self.flops(node)
        ready = max((self.position[n] for n in clean if n in self.position), default=0)
        return Tail(group, entries, nodes, list(clean), ready, dies, max(peak, 1), fixed, flops)

    def _calls(self, name):
        """The nodes that apply a layer: none if evaluation does not run it (an auxiliary head)."""
        inside = [n for n in self.nodes if _module_of(n) == name]
        calls = [n for n in inside if n.target in LAYERS + OTHER_LAYERS]
        if inside and not calls:
            raise NotReplayable(f"{name!r} was exported as {', '.join(str(n.target) for n in inside)}, not as one layer")
        return calls

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
        """Of one example's value; views own nothing."""
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
        """The consumer's old output, less what the unit gave to it; few pairs at a time, so that what is subtracted stays in
        the cache."""
        x, old = values[node.args[0]], values[node]
        weight = self._layer(node)[0]
        axis = 1 if node.target in CONVOLUTIONS else x.ndim - 1
        new = torch.empty_like(old[:1]).expand(len(rows), *old.shape[1:])
        new = torch.empty_like(new, memory_format=torch.channels_last if old.ndim == 4 else torch.contiguous_format)
        step = max(1, CORRECTED // max(1, self._bytes(node)))
        for unit, start, stop in segments:
            given, by = x.movedim(axis, 0)[slots[unit]].movedim(0, axis), weight.index_select(1, slots[unit])
            for part in range(start, stop, step):
                index = rows[part : min(part + step, stop)]
                share = node.target(_take(given, index), by, None, *node.args[3:])
                torch.sub(_take(old, index), share, out=new[part : part + len(index)])
        return new

    def active(self, tail: Tail, values, units) -> torch.Tensor:
        """[N, units] bool: where the unit is not zero at all of its consumers."""
        found = None
        for node, name in tail.entries.items():
            x = values[node.args[0]].movedim(self.graph.layers[name].axis, 1)
            zeros = ops.channel_statistics(x)[2]  # [N, C]
            nonzero = (zeros != math.prod(x.shape[2:]))[:, tail.group.inputs[name][units]].any(2)
            found = nonzero if found is None else found | nonzero
        return found


def _export(model, example_inputs):
    args, kwargs = as_arguments(example_inputs)
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
    for norm in list(graph.nodes):
        if norm.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        layer, *arguments = norm.args[:5]
        if layer.target not in CONVOLUTIONS or len(layer.users) > 1 or layer.args[1] not in constants:
            continue
        one, zero = (make(_shape(layer)[1], dtype=torch.float64) for make in (torch.ones, torch.zeros))
        old = layer.args[2] if len(layer.args) > 2 else None
        scale, shift, mean, var, bias = (constants[n].double() if n is not None else None for n in (*arguments, old))
        scale = (one.to(mean.device) if scale is None else scale) / torch.sqrt(var + norm.args[6])
        shift = zero.to(mean.device) if shift is None else shift
        weight = constants[layer.args[1]].double() * scale.reshape(-1, *[1] * (len(_shape(layer)) - 1))
        bias = (-mean if bias is None else bias - mean) * scale + shift
        dtype = constants[layer.args[1]].dtype
        folded[layer] = weight.to(dtype), bias.to(dtype)
        for part in list(norm.users):
            part.replace_all_uses_with(layer)
            graph.erase_node(part)
        graph.erase_node(norm)
    return folded


def _shape(node) -> tuple:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _module_of(node) -> str:
    """The name of the module that a node was exported from; "name@1" is its second call."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    return stack[-1][0].split("@")[0]


def _is_fresh(node) -> bool:
    """Whether nothing else can see the node's memory: it is no view, and only one node reads it."""
    return len(node.users) == 1 and node.target in (*LAYERS, *OTHER_LAYERS, *IN_PLACE)


# -- measuring ---------------------------------------------------------------------------------------------------------

CHUNK = 1 << 29  # bytes of a chunk of pairs beyond which more at once bring nothing
CORRECTED = 1 << 22  # bytes of a consumer's output that are corrected together


def _measure(replay: Replay, batches, loss_fn, mine, budget, journal, show) -> None:
    """Add to the journal's sums by how much each unit changes the loss of each example."""
    # What evaluation does not run changes nothing: the sums of a group without entries stay zero.
    tails = [replay.tails[name] for name, units in mine.items() if len(units) and replay.tails[name].entries]
    tails.sort(key=lambda tail: tail.ready)
    live = replay.live(tails)
    most = max(1, int(budget / 2 / max(max(live), 1)))  # examples at once: half of the budget is for the pairs
    with _progress(batches, sum(len(mine[t.group.name]) * t.flops for t in tails), show) as bar:
        for inputs, targets, number, size in _pieces(batches, most):
            journal.starts(number, size)
            base = _losses(loss_fn, replay.forward(inputs), targets)

            def visit(tail, values, targets=targets, size=size, base=base):
                units = mine[tail.group.name]
                which, examples = replay.active(tail, values, units).T.nonzero(as_tuple=True)
                room = min(max(budget - size * live[tail.ready] - tail.fixed, 0), CHUNK)
                step = max(1, int(room / tail.bytes))
                bar.update((len(units) * size - len(which)) * tail.flops)
                for start in range(0, len(which), step):
                    u, rows = which[start : start + step], examples[start : start + step]
                    if not journal.skips():
                        found, counts = u.unique_consecutive(return_counts=True)
                        ends = counts.cumsum(0)
                        segments = list(zip(units[found].tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))
                        output = replay.replay(tail, values, rows, segments)
                        change = _losses(loss_fn, output, _rows(targets, rows)) - base[rows]
                        journal.add(tail.group.name, units[u], change)
                    bar.update(len(u) * tail.flops)

            replay.forward(inputs, visit, tails)


def _measure_whole(model, graph, batches, loss_fn, mine, dtype, journal, show) -> None:
    """The same by running the whole model once per unit, its consumers' inputs zeroed."""
    total = sum(map(len, mine.values()))

    def losses(inputs, targets):
        with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype != torch.float32):
            return _losses(loss_fn, run_on(model, inputs), targets)

    with _progress(batches, total, show) as bar:
        for inputs, targets, number, size in _pieces(batches, math.inf):
            journal.starts(number, size)
            base = losses(inputs, targets)
            for name, units in mine.items():
                for unit in units:
                    if not journal.skips():
                        with zeroed(model, graph, {name: unit[None]}):
                            change = losses(inputs, targets) - base
                        journal.add(name, unit.expand(size), change)
                    bar.update(size)


def _pieces(batches, most):
    """(inputs, targets, number, examples): the batches, those of more than `most` examples in parts."""
    number = 0
    for inputs, targets in batches:
        size = count_examples(inputs)
        parts = math.ceil(size / most) if math.isfinite(most) else 1
        for rows in torch.arange(size).chunk(parts):
            cut = (lambda value: value) if parts == 1 else (lambda value, rows=rows: _rows(value, rows))
            yield cut(inputs), cut(targets), number, len(rows)
            number += 1


def _take(tensor, index):
    """The rows of an ascending index: a view where they are neighbours."""
    first, last = int(index[0]), int(index[-1])
    return tensor[first : last + 1] if last - first == len(index) - 1 else tensor.index_select(0, index)


def _rows(value, rows):
    return tree_map_only(torch.Tensor, lambda t: t[rows.to(t.device)] if t.ndim else t, value)


def _losses(loss_fn, output, targets) -> torch.Tensor:
    """The loss of each example by itself, float64 [N], on the CPU."""
    output = tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, output)

    def one(o, t):
        return loss_fn(*tree_map_only(torch.Tensor, lambda x: x[None], (o, t)))

    try:
        losses = torch.func.vmap(one)(output, targets)
    except (RuntimeError, ValueError):  # not every loss can be mapped: data-dependent code, targets that are no tensors
        each = (torch.tensor([i]) for i in range(count_examples(output)))
        losses = torch.stack([loss_fn(_rows(output, i), _rows(targets, i)) for i in each])
    if losses.ndim != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(losses.shape[1:])} for one example")
    return losses.double().cpu()


def _progress(batches, work, show):
    total = work * sum(len(tree_leaves(targets)[0]) for _, targets in batches) if show and hasattr(batches, "__len__") else None
    return tqdm(total=total, disable=not show, desc="oracle", unit="FLOP", unit_scale=True, leave=False)


class _Journal:
    """The sums so far, and how far that is: in memory, and in a file that a killed run can go on from."""

    def __init__(self, path, rank, world, fingerprint, mine, graph):
        self.path = None if path is None else Path(path if world == 1 else f"{path}.{rank}-of-{world}")
        self.fingerprint = fingerprint
        self.sums = {name: torch.zeros(graph.group(name).units, dtype=torch.float64) for name in mine}
        self.examples, self.place, self.saved = 0, (0, 0), time.monotonic()
        self.resumed = (0, 0)  # the piece of the data and the step in it that a former run has come to
        if self.path is not None and self.path.exists():
            self._load()

    def _load(self):
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads(file.metadata()["oracle"])
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"checkpoint={str(self.path)!r} is damaged or of another kind: {error}") from error
        if header["fingerprint"] != self.fingerprint or sums.keys() != self.sums.keys():
            raise ValueError(
                f"checkpoint={str(self.path)!r} is of another model, choice of units, precision, memory or number of processes: "
                "name another file, or delete it"
            )
        self.sums, self.resumed = sums, tuple(header["place"])

    def starts(self, number, examples):
        """A piece of the data begins. Its examples are counted whether or not a former run has measured them."""
        self.place = (number, 0)
        self.examples += examples

    def skips(self) -> bool:
        """Called before each step, in the same order in every run: whether a former run has taken it."""
        self.place = (self.place[0], self.place[1] + 1)
        return self.place <= self.resumed

    def add(self, name, units, change):
        self.sums[name].index_add_(0, units, change)
        if self.path is not None and time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self):
        if self.path is not None:
            header = json.dumps({"fingerprint": self.fingerprint, "place": self.place})
            write_atomically(self.path, serialize(self.sums, metadata={"oracle": header}))
            self.saved = time.monotonic()


def _fingerprint(model, chosen, precision, budget) -> str:
    units = {f"units of {name}": indices for name, indices in chosen.items()}
    return digest(f"{precision} {budget} {_rank_and_world()[1]}", {**model.state_dict(), **units})


def _agreement(model, graph, batch, loss_fn, chosen, budget, count=64) -> str:
    """Spearman's rho of the changes in bfloat16 with those in float32, on some units and one batch."""
    from scipy.stats import spearmanr

    every = [(name, int(u)) for name, units in chosen.items() for u in units]
    sample: dict[str, list[int]] = {}
    for name, unit in every[:: max(1, len(every) // count)]:
        sample.setdefault(name, []).append(unit)
    fast, exact = (
        oracle(model, graph, [batch], loss_fn, mode="loss", units=sample, precision=p, memory=budget, progress=False)
        for p in ("bfloat16", "float32")
    )
    a, b = (torch.cat([r[name][units] for name, units in sample.items()]).numpy() for r in (fast, exact))
    return f"bfloat16 ranks {len(a)} sampled units on one batch as float32 does with Spearman's rho {spearmanr(a, b)[0]:.4f}"
