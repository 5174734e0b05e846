"""Find out which channels of a model live and die together.

`trace` runs the model once on the meta device (shapes, no data) and lets integer labels ride along with the
tensors: every dimension of every parameter and buffer gets fresh labels, data movement moves them with the very
same ATen operator, arithmetic unites the labels that meet. What is connected in the end is one unit. Comes in: a
module and example inputs. Goes out: a `ChannelGraph`.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONSUMERS = (*CONVOLUTIONS, nn.Linear, nn.RNNBase)  # what contracts over its first argument's channels
FIXED = -1  # the label of a slot that no unit owns


class TraceError(RuntimeError):
    """The model could not be traced, or does not run with fewer channels. Names the line of the model at fault."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Interchangeable units: the same layers in the same roles.

    layers: modules whose output channels (filters) the units consist of; consumers: modules that contract over
    them. slots maps (tensor name, dimension) to an int64 tensor [units, m]: the m indices of that dimension that
    each unit owns. inputs maps a consumer's name to such a tensor over the channels of its input.
    positions: elements of one unit, per example, at the consumer with the largest map (the paper's M).
    """

    name: str
    layers: tuple[str, ...]
    slots: dict[tuple[str, int], torch.Tensor]
    inputs: dict[str, torch.Tensor]
    positions: int

    @property
    def units(self) -> int:
        return len(next(iter(self.slots.values())))

    @property
    def consumers(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    def __len__(self):
        return self.units

    def __repr__(self):
        return f"Group({self.name!r}, units={self.units}, layers={list(self.layers)}, consumers={list(self.inputs)})"


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """`coefficient` times the product of the sizes of some dimensions: the FLOPs of an op, the size of a tensor.

    A dimension is an array with the component of each of its indices, FIXED where nothing can be removed."""

    coefficient: int
    dimensions: tuple[np.ndarray, ...]

    @property
    def value(self) -> int:
        return self.coefficient * math.prod(len(d) for d in self.dimensions)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A convolution, linear or recurrent layer. filters: the component of each output channel; inputs: the same of its
    input's channels, None where it does not contract over units (depthwise and grouped convolutions, the model's input).

    unlabelled: why filters without a component cannot be removed; axis: the channel dimension of its input; positions:
    input elements per example and channel; calls: how often one forward pass runs it."""

    name: str
    filters: np.ndarray
    inputs: np.ndarray | None
    is_convolution: bool
    is_grouped: bool
    unlabelled: str
    axis: int
    positions: int
    calls: int


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What `trace` found: the groups of removable units, and what every channel costs.

    layers: every convolution and linear layer, by name. shapes, dtypes: every parameter's and buffer's. components: for
    every (tensor, dimension) the component of each index; frozen: component -> why it cannot be removed. flops are those
    of the example inputs in eval mode, two per multiply-add, as torch.utils.flop_counter counts them.
    """

    model: str
    groups: tuple[Group, ...]
    layers: dict[str, Layer]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    parameters: tuple[str, ...]
    components: dict[tuple[str, int], np.ndarray]
    frozen: dict[int, str]
    flop_costs: tuple[Cost, ...]
    passes: tuple["Pass", ...]
    modules: weakref.WeakKeyDictionary  # module -> name

    def __getstate__(self):
        return {**self.__dict__, "modules": {}}

    def __deepcopy__(self, memo):
        return self  # a value: nothing in it changes

    def group(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; the groups are {[g.name for g in self.groups]}")

    @property
    def param_costs(self) -> tuple[Cost, ...]:
        """One for every parameter."""
        costs = []
        for name in self.parameters:
            dims = [self.components.get((name, d)) for d in range(len(self.shapes[name]))]
            fixed = math.prod(s for s, d in zip(self.shapes[name], dims, strict=True) if d is None)
            costs.append(Cost(fixed, tuple(d for d in dims if d is not None)))
        return tuple(costs)

    @property
    def units(self) -> int:
        return sum(g.units for g in self.groups)

    @property
    def flops(self) -> int:
        return sum(c.value for c in self.flop_costs)

    @property
    def params(self) -> int:
        return sum(math.prod(self.shapes[name]) for name in self.parameters)

    @property
    def filters(self) -> int:
        """Output channels of all convolutions."""
        return sum(len(layer.filters) for layer in self.layers.values() if layer.is_convolution)

    @property
    def prunable_filters(self) -> int:
        """Those of them that belong to a unit."""
        return sum(self._prunable(layer) for layer in self.layers.values() if layer.is_convolution)

    def _prunable(self, layer: Layer) -> int:
        return sum(self._removable(c) for c in layer.filters)

    def _removable(self, component) -> bool:
        return component != FIXED and int(component) not in self.frozen

    def explain(self, layer: str | None = None) -> str:
        """A table: every layer's filters, how many of them can go, in which group, and why the others cannot.

        layer: the name of one convolution or linear layer, to see that one alone."""
        if layer is not None and layer not in self.layers:
            raise KeyError(f"layer={layer!r} is no convolution or linear layer of the traced model: {list(self.layers)}")
        rows = []
        for entry in self.layers.values():
            if layer in (None, entry.name):
                groups = ", ".join(g.name for g in self.groups if entry.name in g.layers)
                without = "its only filter" if len(entry.filters) == 1 else entry.unlabelled
                reasons = dict.fromkeys(self.frozen.get(int(c), without) for c in entry.filters if not self._removable(c))
                prunable = self._prunable(entry)
                why = "; ".join(reasons) if prunable < len(entry.filters) else ""
                rows.append((entry.name, len(entry.filters), prunable, groups or "-", why))
        width, group_width = (max((len(r[i]) for r in rows), default=5) for i in (0, 3))
        lines = [f"{'layer':{width}}  filters  prunable  {'group':{group_width}}  why not"]
        lines += [f"{n:{width}}  {f:7}  {p:8}  {g:{group_width}}  {w}".rstrip() for n, f, p, g, w in rows]
        return "\n".join([repr(self), *lines])

    def source(self) -> nn.Module | None:
        """The model that was traced, where it is still alive, has the same modules, and has been cut as the graph has."""
        model = next((module for module, name in self.modules.items() if not name), None)
        if model is None or any(self.modules.get(module) != name for name, module in model.named_modules()):
            return None
        there = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
        return model if there == self.shapes else None

    def members(self, group: Group) -> list[int]:
        """The components that are a group's units."""
        key, slots = next(iter(group.slots.items()))
        return self.components[key][slots[:, 0].numpy()].tolist()

    def keep(self, removed: dict[str, torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
        """For every (tensor name, dimension) that loses something with the given units (group name -> unit indices), the
        indices that stay."""
        lost: dict[tuple[str, int], list[np.ndarray]] = {}
        for name, units in removed.items():
            for key, slots in self.group(name).slots.items():
                lost.setdefault(key, []).append(slots.numpy()[units.numpy()].ravel())
        return {(t, d): complement(np.concatenate(gone), self.shapes[t][d]) for (t, d), gone in lost.items()}

    def after(self, removed: dict[str, torch.Tensor]) -> "ChannelGraph":
        """The graph of the model once the given units (group name -> unit indices) are gone."""
        gone = np.zeros(1 + max((int(c.max(initial=0)) for c in self.components.values()), default=0), dtype=bool)
        keeps = {g.name: complement(removed.get(g.name, ()), g.units) for g in self.groups}
        for g in self.groups:
            (name, d), slots = next(iter(g.slots.items()))
            gone[self.components[name, d][slots[complement(keeps[g.name], g.units)].flatten().numpy()]] = True

        def left(dimension):
            return None if dimension is None else dimension[(dimension == FIXED) | ~gone[dimension]]

        def renumber(slots, dimension, keep):
            position = np.cumsum((dimension == FIXED) | ~gone[dimension]) - 1
            return torch.from_numpy(position[slots[keep].numpy()])

        shared = {id(d): left(d) for cost in self.flop_costs for d in cost.dimensions}
        components = {key: left(d) for key, d in self.components.items()}
        return dataclasses.replace(
            self,
            groups=tuple(
                dataclasses.replace(
                    g,
                    slots={key: renumber(s, self.components[key], keeps[g.name]) for key, s in g.slots.items()},
                    inputs={name: renumber(s, self.layers[name].inputs, keeps[g.name]) for name, s in g.inputs.items()},
                )
                for g in self.groups
            ),
            layers={
                name: dataclasses.replace(layer, filters=left(layer.filters), inputs=left(layer.inputs))
                for name, layer in self.layers.items()
            },
            shapes={
                name: tuple(len(components[name, d]) if (name, d) in components else s for d, s in enumerate(shape))
                for name, shape in self.shapes.items()
            },
            components=components,
            flop_costs=tuple(Cost(c.coefficient, tuple(shared[id(d)] for d in c.dimensions)) for c in self.flop_costs),
        )

    def __repr__(self):
        return (
            f"ChannelGraph({self.model}: {self.prunable_filters} of {self.filters} filters prunable, {self.units} units in "
            f"{len(self.groups)} groups, {self.flops:.4g} FLOPs, {self.params:,} parameters)"
        )


def complement(indices, size: int) -> torch.Tensor:
    left = np.ones(size, dtype=bool)  # for hundreds of short vectors three times as fast as torch
    left[np.asarray(indices, dtype=np.int64)] = False
    return torch.from_numpy(np.flatnonzero(left))


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass that was traced: its mode, its inputs (meta tensors, unless it had to run for real) and the
    shapes of its outputs; dynamic: whether these depend on its data."""

    training: bool
    real: bool
    dynamic: bool
    args: tuple
    kwargs: dict
    outputs: list


# --------------------------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------------------------


def varying(label: torch.Tensor) -> tuple[int, ...]:
    """The dimensions along which a label tensor is not broadcast."""
    return tuple(i for i, size in enumerate(label.shape) if size > 1)


def compress(label: torch.Tensor) -> torch.Tensor:
    """Narrow every dimension along which the labels do not change to size 1."""
    for i, (size, stride) in enumerate(zip(label.shape, label.stride(), strict=True)):
        if size > 1 and (stride == 0 or bool((label == label.narrow(i, 0, 1)).all())):
            label = label.narrow(i, 0, 1)
    return label


class LabelMode(TorchDispatchMode):
    """Carries labels along with every tensor that passes the dispatcher.

    A tensor's labels are a tuple of int64 tensors, each broadcastable to its shape, no two of which vary along the
    same dimension. Subclasses say what `unite` and `freeze` do: a trace notes them, a rehearsal checks them."""

    running = False  # whether any is; masks that are in force meanwhile step aside
    planned = False  # whether the model runs as a plan leaves it: one group of channels may be what is left of several

    def __init__(self, module_names: dict[int, str]):
        super().__init__()
        self.module_names = module_names
        self.stack: list[tuple[nn.Module, tuple, int]] = []  # module, arguments, number of the call
        self.calls = itertools.count()
        self.labels: dict[int, tuple[torch.Tensor, ...]] = {}
        self.alive: list[torch.Tensor] = []  # an id must not be reused while its labels are kept
        self.tied: dict[tuple[int, ...], torch.Tensor] = {}  # labels that `spread` has tied, by id and dimensions left
        self.uniform: set[int] = set()  # tensors with the same value, or fresh noise, in every channel
        self.lost: dict[int, str] = {}  # why a tensor has no labels, where an op is to blame
        self.meta: dict[int, torch.Tensor] = {}
        self.grouped: set[str] = set()  # grouped convolutions; they stay so when a plan leaves them one group
        self.owned: set[int] = set()  # the model's own tensors, and those of them that an op has used
        self.seen: set[int] = set()
        self.keep_real = False  # run on the model's device, not on meta
        self.dynamic = False  # whether an op's shape depended on its data

    def unite(self, a: torch.Tensor, b: torch.Tensor) -> None:
        raise NotImplementedError

    def freeze(self, label: torch.Tensor, reason: str) -> None:
        raise NotImplementedError

    def applied(self, filters, count, contracted, unlabelled) -> None:
        """A convolution or matrix product makes `count` channels labelled `filters` ([count], or None for the reason
        `unlabelled`) and contracts over the labels `contracted` ([C] or None: it does not mix units)."""

    def counted(self, flops: int, dimensions: list[torch.Tensor]) -> None:
        """An op costs `flops`, in proportion to the number of labels in each dimension."""

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def get(self, tensor) -> tuple[torch.Tensor, ...]:
        return self.labels.get(id(tensor), ())

    def set(self, tensor, labels) -> None:
        self.labels[id(tensor)] = tuple(labels)
        self.alive.append(tensor)

    def emit(self, tensor, axis: int, label: torch.Tensor | None) -> None:
        """Give a tensor labels [C] along one axis, and no others."""
        self.set(tensor, slot_at(label, tensor.ndim, axis))

    def lose(self, out, reason) -> None:
        """What an op made has no labels for that reason."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not self.get(tensor):
                self.lost[id(tensor)] = reason
                self.alive.append(tensor)

    def why(self, tensor) -> str:
        """Why a tensor has no labels in the dimension in question."""
        other = (
            "a weight computed from all of them (standardised, orthogonal)"
            if self.get(tensor)
            else "the model's input, or a value without labels"
        )
        return self.lost.get(id(tensor), other)

    def where(self) -> str:
        return self.module_names.get(id(self.stack[-1][0]), type(self.stack[-1][0]).__name__) if self.stack else "forward"

    def enter_module(self, module, args):
        self.stack.append((module, args, next(self.calls)))

    def leave_module(self, module, args, output):
        self.stack.pop()

    def to_meta(self, value):
        if isinstance(value, torch.Tensor):
            if id(value) in self.owned:
                self.seen.add(id(value))
            if value.is_meta or self.keep_real:
                return value
            if id(value) not in self.meta:
                self.meta[id(value)] = torch.empty_like(value, device="meta")
                self.alive.append(value)
            return self.meta[id(value)]
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return type(value)(self.to_meta(v) for v in value)
        return value

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        args = tuple(self.to_meta(a) for a in args)
        kwargs = {k: self.to_meta(v) for k, v in kwargs.items()}
        if not self.keep_real and "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = torch.device("meta")
        packet = func.overloadpacket
        function = func if self.keep_real or kwargs else SHAPES.get(packet, func)
        out = function(*args, **kwargs)
        self.dynamic |= torch.Tag.dynamic_output_shape in func.tags
        rule = RULES.get(packet)
        if rule is None:
            rule = pointwise if torch.Tag.pointwise in func.tags else FOREIGN.get(func._schema.name)
        dimensions = None
        if rule is not None:
            dimensions = rule(self, func, args, kwargs, out)
        else:
            name = func._schema.name
            opaque(self, args, kwargs, out, f'{name} in {self.where()!r} has no rule: taylored.trace_rule("{name}") can add one')
        if self.lost and (reason := next((self.lost[id(t)] for t in tensors_of(args, kwargs) if id(t) in self.lost), None)):
            self.lose(out, reason)
        if packet in flop_registry:
            self.counted(flop_registry[packet](*args, **kwargs, out_val=out), [d for d in dimensions or () if d is not None])
        return out

    # -- what rules are made of ------------------------------------------------------------------------------------

    def freeze_all(self, tensor, reason, dims=None) -> tuple[torch.Tensor, ...]:
        """Freeze the labels of a tensor that vary along one of dims (None: any); return the others."""
        kept = []
        for label in self.get(tensor):
            if dims is None or any(d in dims for d in varying(label)):
                self.freeze(label, reason)
            else:
                kept.append(label)
        return tuple(kept)

    def whole(self, tensor, reason, dims) -> tuple[torch.Tensor, ...]:
        """An op needs all that is along dims; returns the labels that go on, see `spread`."""
        return tuple(label for label in self.get(tensor) if self.spread(label, reason, dims))

    def spread(self, label, reason, dims) -> bool:
        """Nothing along dims may go by itself. Labels that vary along nothing else are frozen; others, of channels cut in
        two (heads, radices), are tied along dims, so that all of them go at once. Returns whether they can go."""
        others = [d for d in varying(label) if d not in dims]
        if len(others) == len(varying(label)):
            return True
        if not others:
            self.freeze(label, reason)
            return False
        key = (id(label), *others)
        if key not in self.tied:  # a detector takes its scores apart class by class
            self.tied[key] = label
            self.tie(label.movedim(others, list(range(len(others)))).reshape(math.prod(label.shape[d] for d in others), -1))
        return True

    def meet(self, operands, shape) -> tuple[torch.Tensor, ...]:
        """Unite the labels of tensors that are broadcast together to `shape`; returns the result's labels."""
        labelled = [(t, [_pad(x, len(shape)) for x in self.get(t)]) for t in operands if t.numel() != 1]
        if not any(labels for _, labels in labelled):
            return ()
        if len(labelled) == 1:
            return tuple(labelled[0][1])
        result: list[torch.Tensor] = []
        for axis, size in enumerate(shape):
            if size == 1:
                continue
            there = [(t, labels) for t, labels in labelled if _size(t, axis, len(shape)) > 1 and id(t) not in self.uniform]
            found = [[x for x in labels if x.shape[axis] > 1] for _, labels in there]
            if not any(found):
                continue
            if not all(found):
                for label in itertools.chain.from_iterable(found):
                    self.spread(label, f"meets a constant of {size} values in {self.where()!r}", (axis,))
                continue
            first = found[0][0]
            for other in itertools.chain.from_iterable(found):
                if other is not first:
                    self.unite(*torch.broadcast_tensors(first, other))
            if not any(first is x for x in result):
                result.append(first)
        return tuple(result)

    def channels(self, x, axis) -> torch.Tensor | None:
        """One label per index of x's dimension `axis`, [C]; labels that differ elsewhere in a slot are united."""
        axis %= x.ndim
        found = None
        for label in self.get(x):
            if axis not in varying(label):
                continue
            moved = label.movedim(axis, 0).reshape(label.shape[axis], -1)  # [C, rest]
            self.tie(moved)
            found = moved[:, 0]
        return found

    def tie(self, rows) -> None:
        """Unite the labels of each row with one another."""
        if rows.shape[1] > 1:
            self.unite(rows[:, :1].expand_as(rows), rows)

    def bind(self, a: torch.Tensor | None, b: torch.Tensor | None, reason: str) -> None:
        """Two dimensions must keep the same indices. Where only one has labels it cannot change."""
        if a is not None and b is not None:
            if a is not b:
                self.unite(*torch.broadcast_tensors(a, b))
        elif a is not None or b is not None:
            self.freeze(a if a is not None else b, reason)


def tensors_of(args, kwargs):
    for value in itertools.chain(args, kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))


def _pad(label, ndim):
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


def movement(mode, func, args, kwargs, out):
    """Every element goes to a new place: the same op on the labels says where.

    A dimension cut in two keeps its meaning with fewer channels if every piece loses the same positions; channels that
    pixel_shuffle spreads out in space, if they go with all others of their output channel."""
    x = args[0]
    mode.uniform.discard(id(x))
    move = aten.reshape if func.overloadpacket in (aten.view, aten._unsafe_view) else func
    labels = []
    for label in mode.get(x):
        moved = compress(move(label.expand(x.shape), *args[1:], **kwargs))
        axes = varying(moved)
        if len(axes) > len(varying(label)):
            axis = x.ndim - 3 if func.overloadpacket is aten.pixel_shuffle else axes[-1]
            mode.tie(moved.movedim(axis, 0).reshape(moved.shape[axis], -1))
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
            mode.set(x, [_pad(label.reshape(label.shape[values.ndim - rest :]), x.ndim) for label in labels])
        for axis in () if fresh else range(-rest, 0):
            mode.bind(mode.channels(x, axis), mode.channels(values, axis), reason)
    mode.set(out, mode.get(x))


def split(mode, func, args, kwargs, out):
    """Pieces of equal size must lose equal positions, so these are united; unequal pieces cannot change."""
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
        pieces = [compress(p) for p in func(label.expand(x.shape), *args[1:], **kwargs)]
        for tensor, piece in zip(out, pieces, strict=True):
            if alike and piece is not pieces[0] and dim in varying(label):
                mode.unite(pieces[0], piece)
            mode.set(tensor, (*mode.get(tensor), piece))


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


# What two operators return, in shape: on the meta device torch computes them step by step, at half the time of a trace.


def batch_norm_shapes(x, *others):
    if any(isinstance(t, torch.Tensor) and t.shape != x.shape[1:2] for t in others):
        raise RuntimeError(f"batch norm: {x.shape[1]} channels meet {[tuple(t.shape) for t in tensors_of(others, {})]}")
    return (torch.empty_like(x), *(x.new_empty(x.shape[1]) for _ in range(2)))


def grid_sampler_shape(x, grid, *options):
    return x.new_empty((*x.shape[:2], *grid.shape[1:-1]))


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
    **_rules(batch_norm_shapes, "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    **_rules(grid_sampler_shape, "grid_sampler_2d", "grid_sampler_3d"),
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


# --------------------------------------------------------------------------------------------------------------------
# The trace
# --------------------------------------------------------------------------------------------------------------------


class Tracer(LabelMode):
    """Notes which labels were united, which are frozen and why, and what the layers did."""

    def __init__(self, module_names, fully_connected):
        super().__init__(module_names)
        self.fully_connected = fully_connected
        self.edges: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.frozen: list[tuple[torch.Tensor, str]] = []
        self.filters: list[torch.Tensor] = []
        self.heads: list[torch.Tensor] = []  # filters of fully connected layers
        self.applications: dict[str, list] = {}
        self.costs: list[tuple[int, list[torch.Tensor]]] = []

    def unite(self, a, b):
        self.edges.append((a.reshape(-1), b.reshape(-1)))

    def freeze(self, label, reason):
        self.frozen.append((label.reshape(-1), reason))

    def counted(self, flops, dimensions):
        self.costs.append((flops, dimensions))

    def applied(self, filters, count, contracted, unlabelled):
        module, args, call = self.stack[-1] if self.stack else (None, (), -1)
        is_convolution = isinstance(module, CONVOLUTIONS)
        standard = isinstance(module, CONSUMERS) and args and isinstance(args[0], torch.Tensor)
        if contracted is not None and not (standard and self._takes(args[0], 1 if is_convolution else -1, contracted)):
            self.freeze(contracted, f"multiplied by weights in {self.where()!r}, outside of a convolution or linear layer")
            contracted = None
        if not standard:
            if filters is not None:
                self.filters.append(filters)  # a filter all the same, but explain() has no layer to list it under
            return
        if filters is not None:
            pointwise_in_space = is_convolution or args[0].ndim > 2 or self.fully_connected
            (self.filters if pointwise_in_space else self.heads).append(filters)
        axis = 1 if is_convolution else -1
        positions = args[0].numel() // max(1, args[0].shape[0] * args[0].shape[axis])
        facts = (filters, count, unlabelled, contracted, is_convolution, axis, positions, call)
        self.applications.setdefault(self.where(), []).append(facts)

    def _takes(self, x, axis, label):
        found = self.channels(x, axis)
        return found is not None and torch.equal(found, label)


def trace(model: nn.Module, example_inputs, *, fully_connected: bool = False) -> ChannelGraph:
    """Find the units of a model: what can be removed, together with what, and what it costs.

    The model runs once on the meta device, in eval mode (and in training mode too if that reaches parameters which
    eval mode does not, such as auxiliary heads); nothing about it changes. A model that looks at its data runs for
    real instead. example_inputs: one tensor, a tuple of positional or a dict of keyword arguments. fully_connected:
    also make the outputs of linear layers on [N, features] removable; by default, as in the paper, only filters are
    (and the outputs of linear layers that are applied at every position).

    Raises TraceError if the model does not run on the example inputs, naming the line where it fails.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must not be scripted: trace and prune the original, script what is left of it")
    args, kwargs = as_arguments(example_inputs)
    with torch.inference_mode(False):  # in inference mode operators arrive whole, convolutions and linear layers unseen
        tensors = named_tensors(model)
        try:
            run = _run(model, tensors, args, kwargs, fully_connected, real=False)
        except TraceError as on_meta:
            if any(t.is_meta for t in tensors.values()):
                raise
            try:
                run = _run(model, tensors, args, kwargs, fully_connected, real=True)
            except TraceError as error:
                raise error from on_meta
        rigid: dict[int, str] = {}
        graph = _build(model, tensors, *run, rigid)
        while found := _rigid(model, graph, bool(rigid)):
            rigid |= found
            graph = _build(model, tensors, *run, rigid)
        return graph


def as_arguments(example_inputs) -> tuple[tuple, dict]:
    """One tensor, a tuple of positional arguments or a dict of keyword arguments -> (args, kwargs)."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    raise TypeError(f"example_inputs must be a tensor, a tuple or a dict, got {type(example_inputs).__name__}")


def run_on(model: nn.Module, inputs):
    """The model's output for inputs in any of the forms that `as_arguments` takes."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def count_examples(batch) -> int:
    """The size of the first dimension of a batch, however nested: that of its first tensor that has one."""
    return next(len(t) for t in tree_leaves(batch) if isinstance(t, torch.Tensor) and t.ndim)


def wrappers(model: nn.Module):
    """The model, what it wraps (torch.compile's, DataParallel's and DistributedDataParallel's modules), and so on."""
    yield model
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if (inner := getattr(model, "module" if parallel else "_orig_mod", None)) is not None:
        yield from wrappers(inner)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrappers."""
    *_, inner = wrappers(model)
    return inner


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper, if there is one, with which several processes train the model as one."""
    return next((m for m in wrappers(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, shared ones once."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"model has an uninitialised lazy parameter {name!r}: run one forward pass first")
    return tensors


def check_fit(graph: ChannelGraph, model: nn.Module) -> None:
    """Raises ValueError unless the model's tensors are those that the graph is of."""
    there = {name: tuple(t.shape) for name, t in named_tensors(unwrapped(model)).items()}
    for name in (*graph.shapes, *there):
        if there.get(name) != graph.shapes.get(name):
            here, known = (f"shape {s[name]}" if name in s else "no such tensor" for s in (there, graph.shapes))
            raise ValueError(f"graph does not fit model: of {name!r} the model has {here}, the graph {known}; trace it anew")


def _run(model, tensors, args, kwargs, fully_connected, real):
    tracer = Tracer({id(m): name for name, m in model.named_modules()}, fully_connected)
    tracer.keep_real = real
    stand_ins = {n: t.detach().clone() if real else torch.empty_like(t, device="meta") for n, t in tensors.items()}
    offsets, total = {}, 0
    for name, tensor in stand_ins.items():
        labels = []
        for d, size in enumerate(tensor.shape):
            if size > 1:
                offsets[name, d] = total
                labels += slot_at(torch.arange(total, total + size), tensor.ndim, d)
                total += size
        tracer.set(tensor, labels)
    passes = [run_pass(model, stand_ins, tracer, False, args, kwargs)]
    costs, tracer.costs = tracer.costs, []
    unseen = [name for name, _ in model.named_parameters() if id(stand_ins[name]) not in tracer.seen]
    if unseen:
        try:
            passes.append(run_pass(model, stand_ins, tracer, True, *twice(args, kwargs)))
        except TraceError as error:
            warnings.warn(f"training mode could not be traced ({error})", stacklevel=3)
        unseen = [name for name in unseen if id(stand_ins[name]) not in tracer.seen]
        if unseen:
            warnings.warn(f"the forward pass never used {unseen}; they are left as they are", stacklevel=3)
    tracer.edges.append((torch.tensor([], dtype=torch.int64),) * 2)
    return tracer, tuple(passes), offsets, total, costs


def twice(args, kwargs):
    """A single example doubled along its batch dimension, for batch norm in training mode needs two."""

    def double(t):
        return torch.cat([t, t]) if t.ndim > 0 and len(t) == 1 else t

    return tree_map_only(torch.Tensor, double, args), tree_map_only(torch.Tensor, double, kwargs)


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool):
    """The model in training or eval mode; afterwards every module is in the mode it came in."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield model.train(training)
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextlib.contextmanager
def untouched(model: nn.Module):
    """Afterwards the modules' own attributes are what they were: a forward pass may keep values (anchors, position biases, a
    mask of the last size), and those of the meta device would be of no use to anybody."""
    usual = vars(nn.Module()).keys() - {"training"}
    before = {m: {key: value for key, value in vars(m).items() if key not in usual} for m in model.modules()}
    contents = [(v, v.copy()) for values in before.values() for v in values.values() if isinstance(v, (list, dict))]
    try:
        yield
    finally:
        for module, values in before.items():
            for key in vars(module).keys() - values.keys() - usual:
                del module.__dict__[key]
            module.__dict__.update(values)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def run_pass(model, stand_ins, mode: LabelMode, training: bool, args, kwargs) -> Pass:
    """One forward pass under a label mode, with other tensors in the place of the model's own; freezes its outputs."""
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(mode.enter_module),
        nn.modules.module.register_module_forward_hook(mode.leave_module, always_call=True),
    ]
    mode.stack.clear()
    mode.owned = {id(t) for t in stand_ins.values()}
    rng = torch.random.fork_rng(devices=[]) if mode.keep_real else contextlib.nullcontext()
    try:
        if not mode.keep_real:
            args, kwargs = (tree_map_only(torch.Tensor, mode.to_meta, a) for a in (args, kwargs))
        LabelMode.running = True
        with untouched(model), in_mode(model, training), torch.no_grad(), rng, torch.compiler.set_stance("force_eager"), mode:
            output = torch.func.functional_call(model, stand_ins, args, kwargs)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"{line_at_fault(error.__traceback__)}: {type(error).__name__}: {error}") from error
    finally:
        LabelMode.running = False
        for hook in hooks:
            hook.remove()
    outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    for tensor in outputs:
        mode.freeze_all(tensor, "the model's output")
    if not mode.keep_real:
        args, kwargs = (tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), a) for a in (args, kwargs))
    return Pass(training, mode.keep_real, mode.dynamic, args, kwargs, [tuple(t.shape) for t in outputs])


@contextlib.contextmanager
def zeroed(model: nn.Module, graph: ChannelGraph, units: dict[str, torch.Tensor]):
    """Within the context the model computes as if the units (group name -> unit indices) were removed: their channels are
    zero at the inputs of all their consumers."""
    check_fit(graph, model)
    model = unwrapped(model)
    lost: dict[str, list[torch.Tensor]] = {}
    for name, indices in units.items():
        for consumer, slots in graph.group(name).inputs.items():
            lost.setdefault(consumer, []).append(slots[indices].flatten())
    handles = []
    watch_hooks()
    try:
        for consumer, indices in lost.items():
            layer = graph.layers[consumer]
            mask = torch.ones(len(layer.inputs))
            mask[torch.cat(indices)] = 0
            handles.append(model.get_submodule(consumer).register_forward_pre_hook(_zeroing(mask, layer.axis)))
        yield model
    finally:
        for handle in handles:
            handle.remove()
        watch_hooks()


def watch_hooks() -> None:
    """Let compiled code look whether hooks have come or gone, which torch leaves out; what was compiled before is made anew.

    Called before hooks come and after they went: torch.compile may have been loaded, and used, in between."""
    if "torch._dynamo" in sys.modules and torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def _zeroing(mask, axis):
    def hook(_module, args):
        if LabelMode.running:
            return args
        x = args[0]
        m = mask.to(x.device, x.dtype)
        return (x * m.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]), *args[1:])

    return hook


LIBRARIES = tuple(f"{Path(file).parent}/" for file in (torch.__file__, __file__))


def line_at_fault(traceback=None) -> str:
    """'file.py:12': the innermost line of a traceback, or of the running stack, that is the model's own."""
    if traceback is not None:
        found = [(t.tb_frame, t.tb_lineno) for t in _walk(traceback, "tb_next")]
    else:
        found = [(f, f.f_lineno) for f in _walk(sys._getframe(), "f_back")][::-1]
    for frame, line in reversed(found):
        file = frame.f_code.co_filename
        if not file.startswith((*LIBRARIES, "<")):
            return f"{file}:{line}"
    return "in the forward pass"


def _walk(link, attribute):
    while link is not None:
        yield link
        link = getattr(link, attribute)


# The tensor that shows a module's sizes; weight norm, as a parametrization or a hook, gives it other names.
WEIGHTS = ("weight", "parametrizations.weight.original1", "weight_v", "weight_ih_l0", "running_mean")


def size_attributes(model, before, after) -> list[tuple[str, nn.Module, dict[str, int]]]:
    """What modules say about their own sizes, as it will be, by their names.

    before, after: the shapes of the tensors that change."""
    found = []
    for prefix, module in model.named_modules():
        names = (f"{prefix}.{local}" if prefix else local for local in WEIGHTS)
        name = next((name for name in names if name in before), None)
        if name is None:
            continue
        old, new = before[name], after[name]
        if isinstance(module, nn.modules.conv._ConvNd):
            groups = module.groups * new[0] // old[0] if module.groups > 1 else 1
            first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
            values = {first: new[0], second: new[1] * groups, "groups": groups}
        elif isinstance(module, nn.Linear):
            values = {"in_features": new[1], "out_features": new[0]}
        elif isinstance(module, nn.RNNBase):
            values = {"input_size": new[1]}
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            values = {"num_features": new[0]}
        elif isinstance(module, nn.GroupNorm):
            values = {"num_channels": new[0], "num_groups": module.num_groups * new[0] // old[0]}
        elif isinstance(module, nn.PReLU):
            values = {"num_parameters": new[0]}
        else:
            continue
        found.append((prefix, module, values))
    return found


class Rehearsal(LabelMode):
    """Runs the model as it will be without some units. Every slot has a label of its own, and a component of the trace: only
    slots of one component may meet. (The components themselves would not do for labels: where one unit is left they are all
    the same.) Where a single channel is left, or labelled is False, shapes and FLOPs alone are found."""

    planned = True

    def __init__(self, model, graph: ChannelGraph, removed: dict[str, torch.Tensor], labelled: bool = True):
        super().__init__({id(m): name for name, m in model.named_modules()})
        self.graph, self.keep = graph, graph.keep(removed)
        left = {key: c[self.keep[key].numpy()] if key in self.keep else c for key, c in graph.components.items()}
        self.grouped = {name for name, layer in graph.layers.items() if layer.is_grouped}
        self.components = torch.from_numpy(np.concatenate([*left.values(), [FIXED]]))  # by label; FIXED is the last
        self.sizes, self.labelled = {key: len(c) for key, c in left.items()}, labelled and all(len(c) > 1 for c in left.values())
        self.shapes = {n: tuple(self.sizes.get((n, d), s) for d, s in enumerate(shape)) for n, shape in graph.shapes.items()}
        self.flops = 0
        self.blamed: set[int] = set()  # the components that met at the fault

    def run(self, model, traced: Pass) -> None:
        """Raises TraceError with the file and line of the forward that does not follow its input's number of channels."""
        self.keep_real = traced.real
        ends = itertools.accumulate(self.sizes.values())
        labels = {key: torch.arange(end - n, end) for (key, n), end in zip(self.sizes.items(), ends, strict=True)}
        stand_ins = {name: self.smaller(name, tensor) for name, tensor in named_tensors(model).items()}
        for name, tensor in stand_ins.items():
            mine = [(d, labels[name, d]) for d in range(tensor.ndim) if self.labelled and (name, d) in labels]
            self.set(tensor, itertools.chain.from_iterable(slot_at(label, tensor.ndim, d) for d, label in mine))
        attributes = size_attributes(model, {name: self.graph.shapes[name] for name, _ in self.keep}, self.shapes)
        before = [(module, {name: getattr(module, name) for name in values}) for _, module, values in attributes]
        try:
            for _, module, values in attributes:
                module.__dict__.update(values)
            outputs = run_pass(model, stand_ins, self, traced.training, traced.args, traced.kwargs).outputs
        except TraceError as error:
            raise TraceError(f"the model does not run with fewer channels (is a channel count hard-coded?): {error}") from error
        finally:
            for module, values in before:
                module.__dict__.update(values)
        dynamic = traced.dynamic or self.dynamic
        if [len(s) for s in outputs] != [len(s) for s in traced.outputs] or (not dynamic and outputs != traced.outputs):
            raise TraceError(
                f"with fewer channels the model's outputs would change shape from {traced.outputs} to {outputs}: "
                "does its forward hard-code a channel count?"
            )

    def smaller(self, name, tensor):
        """What is left of one of the model's tensors: its values where they matter, otherwise its shape."""
        if not self.keep_real:
            return torch.empty(self.shapes[name], dtype=self.graph.dtypes[name], device="meta")
        tensor = tensor.detach().clone()
        for d in range(tensor.ndim):
            if (name, d) in self.keep:
                tensor = tensor.index_select(d, self.keep[name, d].to(tensor.device))
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except Exception:
            for tensor in () if self.blamed else tensors_of(args, kwargs or {}):
                for label in self.get(tensor):
                    self.blame(label)
            raise

    def unite(self, a, b):
        a, b = self.components[a.reshape(-1)], self.components[b.reshape(-1)]
        wrong = (a != b) & (a != FIXED) & (b != FIXED)
        if bool(wrong.any()):
            self.blamed.update(a[wrong].tolist(), b[wrong].tolist())
            raise TraceError(f"{line_at_fault()}: channels that do not belong together meet")

    def freeze(self, label, reason):
        if self.blame(label):
            raise TraceError(f"{line_at_fault()}: {reason}")

    def blame(self, label) -> bool:
        """Note which of the components in a label were free to go; whether there are any."""
        found = {int(c) for c in self.components[label.reshape(-1)].unique()} - {FIXED} - self.graph.frozen.keys()
        self.blamed |= found
        return bool(found)

    def counted(self, flops, dimensions):
        self.flops += flops


def _rigid(model, graph: ChannelGraph, known: bool) -> dict[int, str]:
    """The components that the model does not run without, and why: a forward that hard-codes their number.

    known: there are some already; otherwise shapes alone are looked at first, which takes half the time."""

    def without(groups, labelled):
        """None, or what goes wrong when each of the groups has lost a unit, and where."""
        removed = {g.name: torch.tensor([0]) for g in groups}
        for traced in graph.passes:
            mode = Rehearsal(model, graph, removed, labelled)
            try:
                mode.run(model, traced)
            except TraceError as error:
                return str(error), mode.blamed
        return None

    # Groups of which a single channel would be left are for the rehearsal of a plan: it could not be labelled.
    groups = [g for g in graph.groups if all((g.units - 1) * s.shape[1] > 1 for s in g.slots.values())]
    if not groups or (not known and without(groups, labelled=False) is None):
        return {}
    fault = without(groups, labelled=True)
    if fault is None:
        return {}
    if fault[1]:
        return dict.fromkeys(fault[1], fault[0])
    alone = [(g, wrong[0]) for g in groups if (wrong := without([g], labelled=False)) is not None]
    return {c: why for g, why in alone or [(g, fault[0]) for g in groups] for c in graph.members(g)}


def _build(model, tensors, tracer: Tracer, passes, offsets, total, evaluation, rigid) -> ChannelGraph:
    a, b = (torch.cat(side).numpy() for side in zip(*tracer.edges, strict=True))
    half = (a == FIXED) != (b == FIXED)  # a slot without a unit met one with
    tracer.freeze(torch.from_numpy(np.maximum(a, b)[half]), "meets a padded channel")
    a, b = a[(a != FIXED) & (b != FIXED)], b[(a != FIXED) & (b != FIXED)]
    _, component = connected_components(coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(total, total)), directed=False)
    component = np.append(component, FIXED).astype(np.int64)  # so that label FIXED, the last one, gives FIXED

    def of(label):
        return component[label.reshape(-1).numpy()]

    components = {key: component[start : start + tensors[key[0]].shape[key[1]]] for key, start in offsets.items()}
    frozen = dict(rigid)
    for label, reason in tracer.frozen:
        for c in np.unique(of(label)):
            frozen.setdefault(int(c), reason)
    layers = {}
    for name, calls in tracer.applications.items():
        filters, count, unlabelled, _, is_convolution, axis, *_ = calls[0]
        inputs = next((of(contracted) for *_, contracted, _, _, _, _ in calls if contracted is not None), None)
        positions = max(positions for *_, positions, _ in calls)
        often = len({call for *_, call in calls}) // len(passes) or 1  # a recurrent layer multiplies many times a call
        filters = np.full(count, FIXED) if filters is None else of(filters)
        grouped = name in tracer.grouped
        layers[name] = Layer(name, filters, inputs, is_convolution, grouped, unlabelled, axis, positions, often)

    def mask(labels):
        found = np.zeros(total + 1, dtype=bool)  # the last one takes FIXED
        for label in labels:
            found[of(label)] = True
        return found[:-1]

    made, heads = mask(tracer.filters), mask(tracer.heads)
    consumed = mask(call[3] for calls in tracer.applications.values() for call in calls if call[3] is not None)
    for c in np.flatnonzero(heads & ~made):
        frozen.setdefault(int(c), "fully connected; trace(..., fully_connected=True) makes it removable")
    for c in np.flatnonzero(made & ~consumed):
        frozen.setdefault(int(c), "no convolution or linear layer consumes it")
    made[[c for c in frozen if c != FIXED]] = False
    units = np.flatnonzero(made & consumed)
    groups, alone = _group(units, components, layers, total)
    for c in alone:
        frozen.setdefault(int(c), "all its channels are one unit")
    frozen.pop(FIXED, None)
    costs = []
    for flops, dimensions in evaluation:
        dimensions = tuple(of(d) for d in dimensions)
        costs.append(Cost(flops // math.prod(len(d) for d in dimensions), dimensions))
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    dtypes = {name: t.dtype for name, t in tensors.items()}
    parameters = tuple(name for name, _ in model.named_parameters())
    modules = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
    name = type(model).__name__
    return ChannelGraph(name, groups, layers, shapes, dtypes, parameters, components, frozen, tuple(costs), passes, modules)


def _group(units, components, layers, total) -> tuple[tuple[Group, ...], np.ndarray]:
    """Units with the same number of slots in the same dimensions are interchangeable. Also returns units that are alone."""
    dimensions = {**components, **{(name, "in"): layer.inputs for name, layer in layers.items() if layer.inputs is not None}}
    index = np.full(total + 1, -1)
    index[units] = np.arange(len(units))
    # A unit's signature is a hash of its (dimension, number of slots): a sum, so that no unit is looked at by itself.
    weights = np.random.default_rng(0).integers(1, 2**63, size=len(dimensions), dtype=np.uint64)
    signature = np.zeros(len(units), dtype=np.uint64)
    for weight, dimension in zip(weights, dimensions.values(), strict=True):
        found, count = np.unique(index[dimension], return_counts=True)
        inside = found >= 0
        signature[found[inside]] += weight * count[inside].astype(np.uint64) ** 3
    _, first, group_of = np.unique(signature, return_index=True, return_inverse=True)
    sizes = np.bincount(group_of, minlength=len(first))
    rank = np.zeros(len(units), dtype=np.int64)
    for g in range(len(first)):
        rank[group_of == g] = np.arange(sizes[g])
    slots: list[dict] = [{} for _ in first]
    for key, dimension in dimensions.items():
        position = np.flatnonzero(index[dimension] >= 0)
        unit = index[dimension[position]]
        position = position[np.lexsort((rank[unit], group_of[unit]))]
        counts = np.bincount(group_of[unit], minlength=len(first))
        present = np.flatnonzero(counts)
        for g, mine in zip(present, np.split(position, np.cumsum(counts[present])[:-1]), strict=False):
            slots[g][key] = torch.from_numpy(mine.reshape(sizes[g], -1))
    producers: list[list[str]] = [[] for _ in first]
    for name, layer in layers.items():
        unit = index[layer.filters]
        for g in np.flatnonzero(np.bincount(group_of[unit[unit >= 0]], minlength=len(first))):
            producers[g].append(name)
    groups, taken = [], set()
    for g in np.argsort(first):
        if sizes[g] == 1:
            continue
        inputs = {key[0]: s for key, s in slots[g].items() if key[1] == "in"}
        name = base = producers[g][0] if producers[g] else next(iter(slots[g]))[0]
        for number in itertools.count(2):
            if name not in taken:
                break
            name = f"{base}#{number}"
        taken.add(name)
        positions = max(layers[consumer].positions * s.shape[1] for consumer, s in inputs.items())
        own = {key: s for key, s in slots[g].items() if key[1] != "in"}
        groups.append(Group(name, tuple(producers[g]), own, inputs, positions))
    return tuple(groups), units[sizes[group_of] == 1]
