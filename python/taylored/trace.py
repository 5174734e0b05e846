"""Find out which channels of a model live and die together.

`trace` gives every dimension of every parameter and buffer fresh labels and runs the model once with them (labels.py); what
is connected in the end is one unit. Comes in: a module and example inputs. Goes out: a `ChannelGraph`. A `Rehearsal` runs the
model as a plan would leave it.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import warnings
import weakref

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from taylored.labels import VALUES, LabelMode, TraceError, line_at_fault
from taylored.rules import FIXED, slot_at, tensors_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ALONE = "all its channels are one unit"
CONSUMERS = (*CONVOLUTIONS, nn.Linear, nn.RNNBase)  # what contracts over its first argument's channels


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
class Bundle:
    """Groups whose channels a split or shuffle deals out by their positions, as in the trunk of a ShuffleNet: every unit can
    go by itself, but the dimensions they are in must all keep the same share of them, or positions would mean something else.

    sizes: for every dimension, how many of its indices belong to the groups' units; width: the greatest number that divides
    them all. How many units each group keeps at a smaller width is for the model to say, see `ChannelGraph.layout`.
    """

    groups: tuple[str, ...]
    sizes: dict[tuple[str, int], int]
    width: int


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
    every (tensor, dimension) the component of each index; frozen: component -> why it cannot be removed. bundles: groups that
    can only shrink together. flops are those of the example inputs in eval mode, two per multiply-add, as
    torch.utils.flop_counter counts them.
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
    fully_connected: bool
    bundles: tuple[Bundle, ...] = ()
    layouts: dict[tuple[int, ...], "ChannelGraph | TraceError"] = dataclasses.field(default_factory=dict)  # found so far
    alive: nn.Module | None = None  # the model, held where it is still to be asked for layouts

    def __getstate__(self):
        return {**self.__dict__, "modules": {}, "alive": None}

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
        """A table: every layer's filters, how many of them can go, in which group or bundle, and why the others cannot.

        layer: the name of one convolution or linear layer, to see that one alone."""
        if layer is not None and layer not in self.layers:
            raise KeyError(f"layer={layer!r} is no convolution or linear layer of the traced model: {list(self.layers)}")
        rows, bundle_of = [], self.bundle_of
        for entry in self.layers.values():
            if layer in (None, entry.name):
                mine = [g.name for g in self.groups if entry.name in g.layers]
                groups = ", ".join(dict.fromkeys(bundle_of.get(name, name) for name in mine))
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
        model = self._traced()
        there = {} if model is None else {name: tuple(t.shape) for name, t in named_tensors(model).items()}
        return model if there == self.shapes else None

    @property
    def bundle_of(self) -> dict[str, str]:
        """Name of a group that can only shrink together with others -> what their bundle is called in tables."""
        return {name: f"bundle {n + 1}" for n, bundle in enumerate(self.bundles) for name in bundle.groups}

    @property
    def bundled(self) -> frozenset[str]:
        """The names of the groups that can only shrink together with others."""
        return frozenset(self.bundle_of)

    def gone(self, narrow: "ChannelGraph") -> dict[str, int]:
        """How many units of each bundled group (its name -> units) a layout has no room for."""
        left, bundled = {g.name: g.units for g in narrow.groups}, self.bundled
        return {g.name: g.units - left.get(g.name, 0) for g in self.groups if g.name in bundled}

    def _traced(self) -> nn.Module | None:
        """The same, however it has been cut since."""
        model = next((module for module, name in self.modules.items() if not name), None)
        if model is None or any(self.modules.get(module) != name for name, module in model.named_modules()):
            return None
        return model

    def members(self, group: Group) -> list[int]:
        """The components that are a group's units."""
        key, slots = next(iter(group.slots.items()))
        return self.components[key][slots[:, 0].numpy()].tolist()

    def keep(self, removed: dict[str, torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
        """For every (tensor name, dimension) that loses something with the given units (group name -> unit indices), the
        indices that stay, in the order in which they stay."""
        lost: dict[tuple[str, int], list[np.ndarray]] = {}
        for name, units in removed.items():
            for key, slots in self.group(name).slots.items():
                lost.setdefault(key, []).append(slots.numpy()[units.numpy()].ravel())
        keep, shared = {}, {}  # dimensions that lose the same have one tensor, with which they are cut at once
        for (t, d), parts in lost.items():
            gone, size = np.concatenate(parts), self.shapes[t][d]
            if (content := (size, gone.tobytes())) not in shared:
                shared[content] = complement(gone, size)
            keep[t, d] = shared[content]
        dealt = {key for bundle in self.bundles if removed.keys() & set(bundle.groups) for key in bundle.sizes}
        if dealt:  # the narrower model has its units in an order of its own
            after = {g.name: g for g in self.after(removed).groups}
            for key in dealt:
                order, others = np.full(len(keep[key]), -1), np.ones(self.shapes[key[0]][key[1]], dtype=bool)
                for g in self.groups:
                    if key in g.slots:
                        others[g.slots[key].flatten().numpy()] = False
                        if g.name in after:
                            stay = complement(removed.get(g.name, ()), g.units)
                            order[after[g.name].slots[key].flatten().numpy()] = g.slots[key][stay].flatten().numpy()
                order[order == -1] = np.flatnonzero(others)
                keep[key] = torch.from_numpy(order)
        return keep

    def layout(self, widths: tuple[int, ...]) -> "ChannelGraph":
        """The graph of the model with its bundles at the given widths: it runs so on the meta device, to say which channel goes
        where. Raises TraceError if it does not run, or deals channels out to others than the whole model does; ValueError if
        the model that was traced is gone."""
        if widths == tuple(bundle.width for bundle in self.bundles):
            return self
        if widths not in self.layouts:
            if (model := self._traced()) is None:
                raise ValueError("the model that was traced is gone, or has other modules: trace it anew")
            try:
                self.layouts[widths] = _layout(model, self, widths)
            except TraceError as error:
                self.layouts[widths] = error
        if isinstance(found := self.layouts[widths], TraceError):
            raise found
        return found

    def narrower(self, round_to: int = 1, tries: int = 16):
        """Yields widths of the bundles at which the model runs, multiples of `round_to`, widest first, of the first so many
        of 16; and the layout of each. All bundles shrink at once."""
        steps = [round_to * math.ceil(bundle.width / (16 * round_to)) for bundle in self.bundles]
        options = [range((b.width - 1) // step * step, 1, -step) for b, step in zip(self.bundles, steps, strict=True)]
        for number in range(min(tries, max(map(len, options), default=0))):
            widths = (o[min(number, len(o) - 1)] if o else b.width for o, b in zip(options, self.bundles, strict=True))
            try:
                yield (widths := tuple(widths)), self.layout(widths)
            except TraceError:
                continue

    def _widths(self, removed) -> tuple[int, ...]:
        """Those of the bundles without the given units. Raises ValueError if there are none."""
        widths = []
        for bundle in self.bundles:
            key, size = next(iter(bundle.sizes.items()))
            inside = [g for g in self.groups if g.name in bundle.groups and key in g.slots]
            gone = sum(len(removed.get(g.name, ())) * g.slots[key].shape[1] for g in inside)
            width, rest = divmod((size - gone) * bundle.width, size)
            if rest:
                raise ValueError(f"the groups {list(bundle.groups)} must lose the same share of every dimension")
            widths.append(width)
        for name, count in self.gone(self.layout(tuple(widths))).items():
            if len(removed.get(name, ())) != count:
                units = self.group(name).units
                raise ValueError(f"of the {units} units of {name!r} {units - count} stay where its bundle is {widths} wide")
        return tuple(widths)

    def after(self, removed: dict[str, torch.Tensor]) -> "ChannelGraph":
        """The graph of the model once the given units (group name -> unit indices) are gone. Raises ValueError if those of a
        bundle do not go together."""
        if (narrow := self.layout(self._widths(removed))) is not self:
            bundled = self.bundled
            return narrow.after({name: units for name, units in removed.items() if name not in bundled})
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
            layouts={},
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
    """One forward pass that was traced: its mode, which values it computed (`labels.VALUES`), its inputs (meta tensors where
    it computed none) and the shapes of its outputs; dynamic: whether these depend on its data."""

    training: bool
    values: str
    dynamic: bool
    args: tuple
    kwargs: dict
    outputs: list


# --------------------------------------------------------------------------------------------------------------------
# The trace
# --------------------------------------------------------------------------------------------------------------------


class Tracer(LabelMode):
    """Notes which labels were united, which are frozen and why, and what the layers did."""

    def __init__(self, module_names, fully_connected):
        super().__init__(module_names)
        self.fully_connected = fully_connected
        self.edges: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.ties: list[tuple[torch.Tensor, torch.Tensor]] = []  # of equal positions in pieces that must stay equally many
        self.pieces = 1  # the most that anything was cut into
        self.deals = True  # whether there may be bundles: they are looked for once
        self.frozen: list[tuple[torch.Tensor, str]] = []
        self.filters: list[torch.Tensor] = []
        self.heads: list[torch.Tensor] = []  # filters of fully connected layers
        self.applications: dict[str, list] = {}
        self.costs: list[tuple[int, list[torch.Tensor]]] = []

    def unite(self, a, b):
        self.edges.append((a.reshape(-1), b.reshape(-1)))

    def balance(self, rows):
        self.ties += [(rows[:, 0], rows[:, i]) for i in range(1, rows.shape[1])]
        self.pieces = max(self.pieces, rows.shape[1])

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
    real instead: at first with convolutions and matrix products that give their bias, as if no feature were there;
    where that fails, or leaves parameters unused, with all that they compute. example_inputs: one tensor, a tuple of
    positional or a dict of keyword arguments. fully_connected: also make the outputs of linear layers on [N, features]
    removable; by default, as in the paper, only filters are (and the outputs of linear layers that are applied at every
    position).

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
        run, problems = _run(model, tensors, args, kwargs, fully_connected)
        for problem in problems:
            warnings.warn(problem, stacklevel=2)
        known = False
        while True:
            graph = _build(model, tensors, *run)
            if not (found := _rigid(model, graph, known)):
                return graph
            tracer, known = run[0], True
            for reason in set(found.values()):  # a component is one of its labels
                tracer.freeze(torch.tensor([c for c, why in found.items() if why == reason]), reason)


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


def holders(model: nn.Module) -> dict[str, str]:
    """Every place that holds a parameter or buffer, module by module -> its name, which is that of the first of them."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    return {
        f"{prefix}.{local}".lstrip("."): names[id(tensor)]
        for prefix, module in model.named_modules()
        for local, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def check_graph(graph: ChannelGraph) -> None:
    """Raises TypeError for what is no graph, such as an argument in another's place."""
    if not isinstance(graph, ChannelGraph):
        raise TypeError(f"graph must be the ChannelGraph that trace(model, ...) returned, got {type(graph).__name__}")


def check_fit(graph: ChannelGraph, model: nn.Module) -> None:
    """Raises ValueError unless the model's tensors are those that the graph is of, TypeError if they are something else."""
    if not isinstance(unwrapped(model), nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_graph(graph)
    there = {name: tuple(t.shape) for name, t in named_tensors(unwrapped(model)).items()}
    for name in (*graph.shapes, *there):
        if there.get(name) != graph.shapes.get(name):
            here, known = (f"shape {s[name]}" if name in s else "no such tensor" for s in (there, graph.shapes))
            raise ValueError(f"graph does not fit model: of {name!r} the model has {here}, the graph {known}; trace it anew")


def _run(model, tensors, args, kwargs, fully_connected):
    """What `_build` makes a graph of, and what a user should know, from the run that computes no more than it must."""
    found, failure = None, None
    for values in VALUES[:1] if any(t.is_meta for t in tensors.values()) else VALUES:
        try:
            run, unseen, problems = _run_with(values, model, tensors, args, kwargs, fully_connected)
        except TraceError as error:
            error.__cause__, failure = error.__cause__ or failure, error
            continue
        found = run, unseen, problems
        if values != "some" or not unseen:
            break
    if found is None:
        raise failure
    run, unseen, problems = found
    if unseen:
        problems.append(f"the forward pass never used {unseen}; they are left as they are")
    return run, problems


def _run_with(values, model, tensors, args, kwargs, fully_connected):
    tracer = Tracer({id(m): name for name, m in model.named_modules()}, fully_connected)
    tracer.values = values
    stand_ins = {}
    for name, tensor in tensors.items():
        blank = _blank(tracer, model, name, tensor, tensor.shape)
        stand_ins[name] = tensor.detach().clone() if blank is None else blank
    offsets, total = _label(tracer, stand_ins)
    passes = [run_pass(model, stand_ins, tracer, False, args, kwargs)]
    costs, tracer.costs = tracer.costs, []
    unseen, problems = [name for name, _ in model.named_parameters() if id(stand_ins[name]) not in tracer.seen], []
    if unseen:
        try:
            passes.append(run_pass(model, stand_ins, tracer, True, *twice(args, kwargs)))
        except TraceError as error:
            problems.append(f"training mode could not be traced ({error})")
        unseen = [name for name in unseen if id(stand_ins[name]) not in tracer.seen]
    return (tracer, tuple(passes), offsets, total, costs), unseen, problems


def _blank(mode, model, name, tensor, shape) -> torch.Tensor | None:
    """A tensor without the values of one of the model's, which has that shape instead; None where a run looks at them."""
    if mode.values == "none":
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
    unseen = mode.values == "some" and tensor.ndim > 1 and isinstance(model.get_submodule(name.rpartition(".")[0]), CONSUMERS)
    return tensor.new_zeros([1] * len(shape)).expand(shape) if unseen else None


def _label(tracer, stand_ins) -> tuple[dict[tuple[str, int], int], int]:
    """Give every dimension labels of its own. Returns the first label of each, and how many there are."""
    offsets, total = {}, 0
    for name, tensor in stand_ins.items():
        labels = []
        for d, size in enumerate(tensor.shape):
            if size > 1:
                offsets[name, d] = total
                labels += slot_at(torch.arange(total, total + size), tensor.ndim, d)
                total += size
        tracer.set(tensor, labels)
    return offsets, total


def _layout(model, graph: ChannelGraph, widths: tuple[int, ...]) -> ChannelGraph:
    """See `ChannelGraph.layout`. The groups keep their names."""
    shapes = {name: list(shape) for name, shape in graph.shapes.items()}
    for bundle, width in zip(graph.bundles, widths, strict=True):
        for (name, d), size in bundle.sizes.items():
            shapes[name][d] -= size - size // bundle.width * width
    tracer = Tracer({id(m): name for name, m in model.named_modules()}, graph.fully_connected)
    tracer.grouped = {name for name, layer in graph.layers.items() if layer.is_grouped}
    stand_ins = {name: torch.empty(shape, dtype=graph.dtypes[name], device="meta") for name, shape in shapes.items()}
    offsets, total = _label(tracer, stand_ins)
    passes, costs = [], []
    with torch.inference_mode(False), resized(model, shapes):
        for traced in graph.passes:
            passes.append(run_pass(model, stand_ins, tracer, traced.training, traced.args, traced.kwargs))
            costs = costs or tracer.costs
            tracer.costs = []
    if [p.outputs for p in passes] != [p.outputs for p in graph.passes]:
        raise TraceError("with fewer channels the model's outputs would change shape")
    loose = {key for bundle in graph.bundles for key in bundle.sizes}
    small = _build(model, stand_ins, tracer, tuple(passes), offsets, total, costs, loose)
    known = {_signature(g): g for g in graph.groups}
    groups, frozen = [], dict(small.frozen)
    for g in small.groups:
        if original := known.get(_signature(g)):
            groups.append(dataclasses.replace(g, name=original.name))
        else:
            frozen |= dict.fromkeys(small.members(g), "it stays in the whole model")
    there = {g.name for g in groups}
    bundles = tuple(
        Bundle(tuple(n for n in b.groups if n in there), {key: size // b.width * w for key, size in b.sizes.items()}, w)
        for b, w in zip(graph.bundles, widths, strict=True)
    )
    for bundle in bundles:
        for key, size in bundle.sizes.items():
            if sum(g.slots[key].numel() for g in groups if g.name in bundle.groups and key in g.slots) != size:
                raise TraceError(f"with fewer channels {key[0]!r} gets others than it has")
    order = {g.name: n for n, g in enumerate(graph.groups)}
    if any(g.units > graph.group(g.name).units for g in groups):
        raise TraceError("with fewer channels some would be needed twice")
    groups.sort(key=lambda g: order[g.name])
    return dataclasses.replace(small, groups=tuple(groups), frozen=frozen, bundles=bundles, alive=model)


def _signature(group: Group) -> frozenset:
    """What makes units interchangeable: in which dimensions they have how many slots."""
    return frozenset((key, s.shape[1]) for slots in (group.slots, group.inputs) for key, s in slots.items())


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
        yield model if set(flags.values()) == {training} else model.train(training)
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
    rng = contextlib.nullcontext() if mode.values == "none" else torch.random.fork_rng(devices=[])
    try:
        if mode.values == "none":
            args, kwargs = (tree_map_only(torch.Tensor, mode.to_meta, a) for a in (args, kwargs))
        LabelMode.running = True
        with untouched(model), in_mode(model, training), torch.no_grad(), rng, torch.compiler.set_stance("force_eager"), mode:
            # not tied by torch, which loses the tensors of a module with several names
            everywhere = {place: stand_ins[name] for place, name in holders(model).items()}
            output = torch.func.functional_call(model, everywhere, args, kwargs, tie_weights=False)
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
    if mode.values == "none":
        args, kwargs = (tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), a) for a in (args, kwargs))
    return Pass(training, mode.values, mode.dynamic, args, kwargs, [tuple(t.shape) for t in outputs])


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


# The tensor that shows a module's sizes; weight norm, as a parametrization or a hook, gives it other names.
WEIGHTS = ("weight", "parametrizations.weight.original1", "weight_v", "weight_ih_l0", "running_mean")


def size_attributes(model, before, after) -> list[tuple[str, nn.Module, dict[str, int]]]:
    """What modules say about their own sizes, as it will be, by their names.

    before, after: the shapes of the tensors that change."""
    found, name_at = [], holders(model)
    for prefix, module in model.named_modules():
        names = (name_at.get(f"{prefix}.{local}".lstrip(".")) for local in WEIGHTS)
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


@contextlib.contextmanager
def resized(model, shapes):
    """Within the context modules say of their sizes what they will once the model's tensors have the given shapes."""
    there = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    attributes = size_attributes(model, {n: shape for n, shape in there.items() if shape != tuple(shapes[n])}, shapes)
    before = [(module, {name: getattr(module, name) for name in values}) for _, module, values in attributes]
    try:
        for _, module, values in attributes:
            module.__dict__.update(values)
        yield
    finally:
        for module, values in before:
            module.__dict__.update(values)


class Rehearsal(LabelMode):
    """Runs the model as it will be without some units. Every slot has a label of its own, and a component of the trace: only
    slots of one component may meet. (The components themselves would not do for labels: where one unit is left they are all
    the same.) Where a group is left a single unit, or labelled is False, shapes and FLOPs alone are found."""

    planned = True

    def __init__(self, model, graph: ChannelGraph, removed: dict[str, torch.Tensor], labelled: bool = True):
        super().__init__({id(m): name for name, m in model.named_modules()})
        self.graph, self.keep = graph, graph.keep(removed)
        left = {key: c[self.keep[key].numpy()] if key in self.keep else c for key, c in graph.components.items()}
        self.grouped = {name for name, layer in graph.layers.items() if layer.is_grouped}
        self.components = torch.from_numpy(np.concatenate([*left.values(), [FIXED]]))  # by label; FIXED is the last
        several = all(graph.group(name).units - len(units) > 1 for name, units in removed.items() if len(units))
        self.sizes, self.labelled = {key: len(c) for key, c in left.items()}, labelled and several
        self.shapes = {n: tuple(self.sizes.get((n, d), s) for d, s in enumerate(shape)) for n, shape in graph.shapes.items()}
        self.flops = 0
        self.blamed: set[int] = set()  # the components that met at the fault

    def run(self, model, traced: Pass) -> None:
        """Raises TraceError with the file and line of the forward that does not follow its input's number of channels."""
        self.values = traced.values
        ends = itertools.accumulate(self.sizes.values())
        labels = {key: torch.arange(end - n, end) for (key, n), end in zip(self.sizes.items(), ends, strict=True)}
        stand_ins = {name: self.smaller(model, name, tensor) for name, tensor in named_tensors(model).items()}
        for name, tensor in stand_ins.items():
            mine = [(d, labels[name, d]) for d in range(tensor.ndim) if self.labelled and (name, d) in labels]
            self.set(tensor, itertools.chain.from_iterable(slot_at(label, tensor.ndim, d) for d, label in mine))
        try:
            with resized(model, self.shapes):
                outputs = run_pass(model, stand_ins, self, traced.training, traced.args, traced.kwargs).outputs
        except TraceError as error:
            raise TraceError(f"the model does not run with fewer channels (is a channel count hard-coded?): {error}") from error
        dynamic = traced.dynamic or self.dynamic
        if [len(s) for s in outputs] != [len(s) for s in traced.outputs] or (not dynamic and outputs != traced.outputs):
            raise TraceError(
                f"with fewer channels the model's outputs would change shape from {traced.outputs} to {outputs}: "
                "does its forward hard-code a channel count?"
            )

    def smaller(self, model, name, tensor):
        """What is left of one of the model's tensors: its values where they matter, otherwise its shape."""
        blank = _blank(self, model, name, tensor, self.shapes[name])
        if blank is not None:
            return blank.to(self.graph.dtypes[name])
        tensor = tensor.detach().clone()
        for d in range(tensor.ndim):
            if (name, d) in self.keep:
                tensor = tensor.index_select(d, self.keep[name, d].to(tensor.device))
        return tensor

    def execute(self, func, args, kwargs):
        try:
            return super().execute(func, args, kwargs)
        except Exception:
            for tensor in () if self.blamed else tensors_of(args, kwargs):
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

    def without(parts, labelled):
        """None, or what goes wrong when the parts (group name -> units) are gone, and where."""
        removed = {name: torch.arange(count) for part in parts for name, count in part.items()}
        for traced in graph.passes:
            mode = Rehearsal(model, graph, removed, labelled)
            try:
                mode.run(model, traced)
            except TraceError as error:
                return str(error), mode.blamed
        return None

    # One unit of each group, and what the bundles lose first. Where a single one is left there is nothing to label it by.
    bundled, parts, last = graph.bundled, [], []
    for g in graph.groups:
        if g.name not in bundled:
            (parts if g.units > 2 else last).append({g.name: 1})
    if graph.bundles:
        _, narrow = next(graph.narrower())
        parts.append({name: count for name, count in graph.gone(narrow).items() if count})
    if not parts + last or (not known and without(parts + last, labelled=False) is None):
        return {}
    fault = without(parts, labelled=True) if parts else None
    if fault is None and last:
        parts, fault = last, without(parts + last, labelled=False)
    if fault is None:
        return {}
    if fault[1]:
        return dict.fromkeys(fault[1], fault[0])
    alone = [(part, wrong[0]) for part in parts if (wrong := without([part], labelled=False)) is not None]
    return {
        c: why
        for part, why in alone or [(part, fault[0]) for part in parts]
        for name in part
        for c in graph.members(graph.group(name))
    }


def _build(model, tensors, tracer: Tracer, passes, offsets, total, evaluation, loose=None) -> ChannelGraph:
    """The graph of what a trace has noted. loose: the dimensions of bundles, whose channels are not tied by their positions in
    the pieces of a split; None where that is to be found out: those where the ties would make units that are not alike."""
    edges, ties = (_pairs(tracer, noted) for noted in (tracer.edges, tracer.ties))
    facts = (model, tensors, tracer, passes, offsets, evaluation)
    component = _connect(total, edges, ties)

    def untied(bundled):
        """The graph without the ties of the labels in bundles."""
        return _assemble(*facts, _connect(total, edges, ties[:, ~bundled[ties[0]]]), bundled)

    if loose is not None:
        mine = [component[offsets[name, d] :][: tensors[name].shape[d]] for name, d in loose]
        return untied(np.isin(component, np.concatenate(mine)))
    graph = _assemble(*facts, component)
    if not (ties.size and tracer.deals and tracer.values == "none"):
        return graph
    free = _connect(total, edges)
    held = np.zeros(total + 1, dtype=bool)  # the components that ties alone have made what they are
    held[component[ties[0][free[ties[0]] != free[ties[1]]]]] = True
    clusters = _clusters(graph.components, held)
    inside = [np.isin(component, components) for components in clusters if _irregular(graph, components, tracer.pieces)]
    while inside:
        found = untied(np.any(inside, axis=0))
        bundles = [_bundle(found, mine) for mine in inside]
        if all(bundles):
            found = dataclasses.replace(found, bundles=tuple(bundles), alive=model)
            if next(found.narrower(tries=4), None) is not None:
                return found
            break
        inside = [mine for mine, bundle in zip(inside, bundles, strict=True) if bundle]
    tracer.deals = False
    return graph


def _pairs(tracer, noted) -> np.ndarray:
    """Noted pairs of labels, [2, n], without those of slots that no unit owns; what such a slot has met is frozen."""
    if not noted:
        return np.zeros((2, 0), dtype=np.int64)
    pairs = torch.stack([torch.cat(side) for side in zip(*noted, strict=True)]).numpy()
    a, b = unowned = pairs == FIXED
    if not unowned.any():
        return pairs
    tracer.freeze(torch.from_numpy(pairs.max(axis=0)[a != b]), "meets a padded channel")
    return pairs[:, ~(a | b)]


def _connect(total, *pairs) -> np.ndarray:
    """For every label the least one that it is connected with, [total + 1], so that label FIXED, the last one, gives FIXED."""
    a, b = np.concatenate(pairs, axis=1, dtype=np.int32, casting="same_kind")  # what scipy would make of them
    count, found = connected_components(coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(total, total)), directed=False)
    least = np.empty(count, dtype=np.int64)
    least[found[::-1]] = np.arange(total)[::-1]  # of several the last one written stays
    return np.append(least[found], FIXED)


def _clusters(dimensions, held) -> list[np.ndarray]:
    """The held components, those that have dimensions in common together."""
    if not held.any():
        return []
    found = [np.unique(c[held[c]]) for c in dimensions.values()]
    rows = np.repeat(np.arange(len(found)) + len(held), [len(c) for c in found])
    total = len(held) + len(found)
    pairs = coo_array((np.ones(len(rows), dtype=bool), (rows, np.concatenate(found))), shape=(total, total))
    _, number = connected_components(pairs, directed=False)
    components = np.flatnonzero(held)
    return [components[number[components] == one] for one in np.unique(number[components])]


def _irregular(graph: ChannelGraph, components, pieces) -> bool:
    """Whether nothing but ties holds the units of a cluster, and these make units that are not alike, or chains of them: units
    that have more channels in a dimension than the pieces that it was cut into."""
    if any(graph.frozen.get(int(c), ALONE) != ALONE for c in components):
        return False
    group_of = {c: g for g in graph.groups for c in graph.members(g)}
    first, *others = {group_of.get(int(c)) for c in components}
    return bool(others) or first is None or any(s.shape[1] > pieces for s in first.slots.values())


def _bundle(graph: ChannelGraph, inside) -> Bundle | None:
    """The bundle of the components `inside` [total + 1], or None if something but positions holds one of them."""
    groups = [g for g in graph.groups if inside[graph.members(g)[0]]]
    sizes = {key: size for key, components in graph.components.items() if (size := int(inside[components].sum()))}
    whole = all(sum(g.slots[key].numel() for g in groups if key in g.slots) == size for key, size in sizes.items())
    single = all(s.shape[1] == 1 for g in groups for s in (*g.slots.values(), *g.inputs.values()))
    width = math.gcd(*sizes.values())
    return Bundle(tuple(g.name for g in groups), sizes, width) if whole and single and width > 2 else None


def _assemble(model, tensors, tracer, passes, offsets, evaluation, component, bundled=None) -> ChannelGraph:
    """The graph with the given component of every label, [total + 1]. bundled: which labels are in bundles, whose units may be
    one of a kind."""
    total = len(component) - 1
    bundled = np.zeros(total + 1, dtype=bool) if bundled is None else bundled

    def of(label):
        return component[label.reshape(-1).numpy()]

    components = {key: component[start : start + tensors[key[0]].shape[key[1]]] for key, start in offsets.items()}
    frozen: dict[int, str] = {}
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
    groups, alone = _group(units, components, layers, total, bundled)
    for c in alone:
        frozen.setdefault(int(c), ALONE)
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
    fully_connected = tracer.fully_connected
    return ChannelGraph(
        name, groups, layers, shapes, dtypes, parameters, components, frozen, tuple(costs), passes, modules, fully_connected
    )


def _group(units, components, layers, total, bundled) -> tuple[tuple[Group, ...], np.ndarray]:
    """Units with the same number of slots in the same dimensions are interchangeable. Also returns units that are alone, but
    for those of a bundle."""
    dimensions = {**components, **{(name, "in"): layer.inputs for name, layer in layers.items() if layer.inputs is not None}}
    index = np.full(total + 1, -1)
    index[units] = np.arange(len(units))
    alike: dict[bytes, list] = {}  # a convolution's filters and its batch norm's four vectors hold the same
    for key, dimension in dimensions.items():
        alike.setdefault(dimension.tobytes(), []).append(key)
    holds = [(keys, index[dimensions[keys[0]]]) for keys in alike.values()]
    # A unit's signature is a hash of its (dimension, number of slots): a sum, so that no unit is looked at by itself.
    random, signature = np.random.default_rng(0), np.zeros(len(units), dtype=np.uint64)
    for keys, held in holds:
        inside, count = np.unique(held[held >= 0], return_counts=True)
        weight = random.integers(1, 2**63, size=len(keys), dtype=np.uint64).sum(dtype=np.uint64)
        signature[inside] += weight * count.astype(np.uint64) ** 3
    _, first, group_of = np.unique(signature, return_index=True, return_inverse=True)
    sizes = np.bincount(group_of, minlength=len(first))
    rank = np.empty(len(units), dtype=np.int64)
    rank[np.argsort(group_of, kind="stable")] = np.arange(len(units)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found: dict[str, dict[int, torch.Tensor]] = {}  # dimension -> group -> slots
    for keys, held in holds:
        position = np.flatnonzero(held >= 0)
        unit = held[position]
        position = position[np.lexsort((rank[unit], group_of[unit]))]
        counts = np.bincount(group_of[unit], minlength=len(first))
        ends = np.cumsum(counts)
        mine = {
            g: torch.from_numpy(position[ends[g] - counts[g] : ends[g]].reshape(sizes[g], -1)) for g in np.flatnonzero(counts)
        }
        for key in keys:
            found[key] = mine
    slots: list[dict] = [{} for _ in first]
    for key in dimensions:
        for g, mine in found[key].items():
            slots[g][key] = mine
    producers: list[list[str]] = [[] for _ in first]
    for name, layer in layers.items():
        unit = index[layer.filters]
        for g in np.flatnonzero(np.bincount(group_of[unit[unit >= 0]], minlength=len(first))):
            producers[g].append(name)
    groups, taken = [], set()
    alone = (sizes == 1) & ~bundled[units[first]]
    for g in np.argsort(first):
        if alone[g]:
            continue
        inputs = {key[0]: s for key, s in slots[g].items() if key[1] == "in"}
        name = base = producers[g][0] if producers[g] else next(iter(slots[g]))[0]
        if bundled[units[first[g]]]:
            name = base = f"{base}->{next(iter(inputs))}"
        for number in itertools.count(2):
            if name not in taken:
                break
            name = f"{base}#{number}"
        taken.add(name)
        positions = max(layers[consumer].positions * s.shape[1] for consumer, s in inputs.items())
        own = {key: s for key, s in slots[g].items() if key[1] != "in"}
        groups.append(Group(name, tuple(producers[g]), own, inputs, positions))
    return tuple(groups), units[alone[group_of]]
