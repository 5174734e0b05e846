"""The model as it will be: run with fewer channels, on the meta device or what takes its place, before anything is cut.

A `Rehearsal` runs it as a plan would leave it and checks that shapes and labels come out as the graph has them. A
`ModelRehearser` is how a graph reaches its model; it asks it, too, which channels go where at a smaller width of its bundles.
"""

import dataclasses
import itertools
import sys
import weakref

import numpy as np
import torch
from torch import nn

from taylored._errors import PlanError, TraceError
from taylored._graph.components import Traced, graph_of
from taylored._graph.labels import along_axis, tensors_of
from taylored._graph.mode import LabelMode, label_all, run_pass, stand_in
from taylored._graph.numbers import differ
from taylored._graph.tracer import Tracer
from taylored._graph.values import FIXED, Bundle, ChannelGraph, Group, Pass, check_fit
from taylored._modules import named_shapes, named_tensors, resized, unwrapped


class Rehearsal(LabelMode):
    """Runs the model as it will be without some units. Every slot has a label of its own, and a component of the trace: only
    slots of one component may meet, and one by one only those that met in the trace. (The components themselves would not do
    for labels: where one unit is left they are all the same.) Where a group is left a single unit, a dimension may have lost
    its labels, so that nothing is believed of what has none; where labelled is False, shapes and FLOPs alone are found."""

    planned = True

    def __init__(self, model, graph: ChannelGraph, removed: dict[str, torch.Tensor], labelled: bool = True, costs=()):
        super().__init__(model)
        self.costs = costs  # FLOPs of every operator that has any in eval mode, in order: what they must be
        self.graph, self.keep = graph, graph.keep(removed)
        left = {key: c[self.keep[key].numpy()] if key in self.keep else c for key, c in graph.components.items()}
        self.grouped = {name for name, layer in graph.layers.items() if layer.is_grouped}
        self.components = torch.from_numpy(np.concatenate([*left.values(), [FIXED]]))  # by label; FIXED is the last
        whole = graph.slots()
        self.slots = torch.cat(
            [torch.from_numpy(s)[self.keep.get(key, ...)] for key, s in whole.items()]
        )  # by label, in the trace
        self.met = _coded(*torch.from_numpy(graph.meetings))  # ascending, as they are
        self.several = all(graph.group(name).units - len(units) > 1 for name, units in removed.items() if len(units))
        self.sizes, self.labelled = {key: len(c) for key, c in left.items()}, labelled
        self.shapes = {n: tuple(self.sizes.get((n, d), s) for d, s in enumerate(shape)) for n, shape in graph.shapes.items()}
        self.flops, self.count = 0, itertools.count()
        self.blamed: set[int] = set()  # the components that met at the fault
        self.failed: list[tuple] = []  # the arguments of the modules whose forward failed, innermost first

    def run(self, model, traced: Pass) -> None:
        """Raises TraceError with the file and line of the forward that does not follow its input's number of channels."""
        self.values, self.expected = traced.values, traced.numbers
        if traced.training or traced.dynamic:
            self.costs = ()
        ends = itertools.accumulate(self.sizes.values())
        labels = {key: torch.arange(end - n, end) for (key, n), end in zip(self.sizes.items(), ends, strict=True)}
        stand_ins = {name: self._smaller(model, name, tensor) for name, tensor in named_tensors(model).items()}
        for name, tensor in stand_ins.items():
            mine = [(d, labels[name, d]) for d in range(tensor.ndim) if self.labelled and (name, d) in labels]
            self.set(tensor, itertools.chain.from_iterable(along_axis(label, tensor.ndim, d) for d, label in mine))
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

    def _smaller(self, model, name, tensor):
        """What is left of one of the model's tensors: its values where they matter, otherwise its shape."""
        blank = stand_in(self, model, name, tensor, self.shapes[name])
        if blank is not None:
            return blank.to(self.graph.dtypes[name])
        tensor = tensor.detach().clone()
        for d in range(tensor.ndim):
            if (name, d) in self.keep:
                tensor = tensor.index_select(d, self.keep[name, d].to(tensor.device))
        return tensor

    def leave_module(self, module, args, output):
        if sys.exc_info()[0] is not None:
            self.failed.append(args)
        return super().leave_module(module, args, output)

    def execute(self, func, args, kwargs):
        try:
            return super().execute(func, args, kwargs)
        except Exception:
            self.blamed = self.blamed or self._free(tensors_of(args, kwargs))
            raise

    def unite(self, a, b):
        self._must_belong(a, b)
        self.in_order(a, b)

    def unite_rows(self, rows):
        if rows.shape[1] > 1:
            self._must_belong(rows[:, :1].expand_as(rows), rows)

    def in_order(self, a, b):
        a, b = (label.reshape(-1)[((a != FIXED) & (b != FIXED)).reshape(-1)] for label in (a, b))
        if len(self.met):
            pairs = _coded(self.slots[a], self.slots[b])
            near = self.met[torch.searchsorted(self.met, pairs).clamp(max=len(self.met) - 1)]
            # Where every unit is there once, units tell the order: slots may meet that met through others in the trace.
            _, unit, times = self.components[a].unique(return_inverse=True, return_counts=True)
            self._must_not((near != pairs) & (a != b) & (times[unit] > 1), a, b)

    def _must_belong(self, a, b):
        a, b = a.reshape(-1), b.reshape(-1)
        mine, other = self.components[a], self.components[b]
        self._must_not((mine != other) & (mine != FIXED) & (other != FIXED), a, b)

    def _must_not(self, wrong, a, b):
        if bool(wrong.any()):
            self.blamed.update(self.components[a[wrong]].tolist(), self.components[b[wrong]].tolist())
            raise TraceError(f"{self.line()}: channels that do not belong together meet")

    def freeze(self, label, reason):
        found = self._free_of(label)
        self.blamed |= found
        if found and self.several:
            raise TraceError(f"{self.line()}: {reason}")

    @property
    def suspects(self) -> set[int]:
        """The components that came into the innermost module whose forward failed, of those that any came into."""
        return next(filter(None, (self._free(tensors_of(args, {})) for args in self.failed)), set())

    def _free_of(self, label) -> set[int]:
        """Which of the components in a label were free to go."""
        return {int(c) for c in self.components[label.reshape(-1)].unique()} - {FIXED} - self.graph.frozen.keys()

    def _free(self, tensors) -> set[int]:
        return set().union(*(self._free_of(label) for tensor in tensors for label in self.get(tensor)))

    def counted(self, flops, dimensions):
        self.flops += flops
        number = next(self.count)
        if number < len(self.costs) and flops != self.costs[number]:
            raise TraceError(
                f"{self.line()}: takes {flops} FLOPs with fewer channels, where {self.costs[number]} follow from them"
            )

    def computed_with(self, place, numbers, args, kwargs):
        super().computed_with(place, numbers, args, kwargs)
        calls, number = self.expected.get(place, ()), len(self.numbers.noted[place]) - 1
        if number < len(calls) and differ(numbers, calls[number]):
            self.blamed |= self._free(tensors_of(args, kwargs))
            raise TraceError(f"{self.line()}: {place[1]} computes with another number where there are fewer channels")


def _coded(a, b):
    """One number for two slots, in either order."""
    return torch.minimum(a, b) * 2**31 + torch.maximum(a, b)


class ModelRehearser:
    """How a graph reaches its model (`values.Rehearser`): weakly, so that a graph keeps no model alive. One with bundles does:
    the model is asked later how wide they may be."""

    MOST = 64  # narrower graphs that are remembered

    def __init__(self, model: nn.Module, keep: bool = False):
        self._names = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
        self._model = weakref.ref(model)
        self._kept = model if keep else None
        self._narrower: dict[tuple[int, ...], ChannelGraph | TraceError] = {}

    def of_another_graph(self) -> "ModelRehearser":
        other = object.__new__(ModelRehearser)
        other._names, other._model, other._kept, other._narrower = self._names, self._model, self._kept, {}
        return other

    def name_of(self, module: nn.Module) -> str | None:
        return self._names.get(module)

    def source(self, graph: ChannelGraph) -> nn.Module | None:
        model = self._traced()
        return None if model is None or named_shapes(model) != graph.shapes else model

    def _traced(self) -> nn.Module | None:
        """The model, however it has been cut since; None where it is gone or has other modules."""
        model = self._model()
        if model is None or any(self._names.get(module) != name for name, module in model.named_modules()):
            return None
        return model

    def at_widths(self, graph: ChannelGraph, widths: tuple[int, ...]) -> ChannelGraph:
        if widths not in self._narrower:
            if (model := self._traced()) is None:
                raise PlanError("the model that was traced is gone, or has other modules: trace it anew, or give model=")
            if len(self._narrower) == self.MOST:
                self._narrower.pop(next(iter(self._narrower)))
            try:
                narrower = dataclasses.replace(_narrowed(model, graph, widths), rehearser=self.of_another_graph())
                self._narrower[widths] = narrower
            except TraceError as error:
                self._narrower[widths] = error
        if isinstance(found := self._narrower[widths], TraceError):
            raise found
        return found


def reaching(graph: ChannelGraph, model: nn.Module | None) -> ChannelGraph:
    """The graph, with that model to ask. None: as it is. Raises ValueError if the graph is not the model's."""
    if model is None or graph.source() is unwrapped(model):
        return graph
    check_fit(graph, model)
    return dataclasses.replace(graph, rehearser=ModelRehearser(unwrapped(model)))


def _narrowed(model: nn.Module, graph: ChannelGraph, widths: tuple[int, ...]) -> ChannelGraph:
    """See `ChannelGraph.at_widths`. The groups keep their names."""
    small = _traced_at(model, graph, widths)
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
    if any(g.units > graph.group(g.name).units for g in groups):
        raise TraceError("with fewer channels some would be needed twice")
    order = {g.name: n for n, g in enumerate(graph.groups)}
    groups.sort(key=lambda g: order[g.name])
    return dataclasses.replace(small, groups=tuple(groups), frozen=frozen, bundles=bundles)


def _traced_at(model: nn.Module, graph: ChannelGraph, widths: tuple[int, ...]) -> ChannelGraph:
    """What a trace of the narrower model says, whatever its channels are called."""
    sizes = {name: list(shape) for name, shape in graph.shapes.items()}
    for bundle, width in zip(graph.bundles, widths, strict=True):
        for (name, d), size in bundle.sizes.items():
            sizes[name][d] -= size - size // bundle.width * width
    shapes = {name: tuple(shape) for name, shape in sizes.items()}
    tracer = Tracer(model, graph.fully_connected)
    tracer.grouped = {name for name, layer in graph.layers.items() if layer.is_grouped}
    stand_ins = {name: torch.empty(shape, dtype=graph.dtypes[name], device="meta") for name, shape in shapes.items()}
    offsets = label_all(tracer, stand_ins)
    passes: list[Pass] = []
    costs: list[tuple[int, list[torch.Tensor]]] = []
    with torch.inference_mode(False), resized(model, shapes):
        for whole in graph.passes:
            passes.append(run_pass(model, stand_ins, tracer, whole.training, whole.args, whole.kwargs))
            costs = costs or tracer.costs
            tracer.costs = []
    if [p.outputs for p in passes] != [p.outputs for p in graph.passes]:
        raise TraceError("with fewer channels the model's outputs would change shape")
    traced = Traced(model, stand_ins, tracer, tuple(passes), offsets, costs)
    return graph_of(traced, dimensions_in_bundles={key for bundle in graph.bundles for key in bundle.sizes})


def _signature(group: Group) -> frozenset:
    """What makes units interchangeable: in which dimensions they have how many slots."""
    return frozenset((key, s.shape[1]) for slots in (group.slots, group.inputs) for key, s in slots.items())
