"""From what a tracer has noted to the graph: labels that are connected are one component, and what must go together a unit."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from taylored._graph.labels import Label
from taylored._graph.tracer import Application, Tracer
from taylored._graph.values import FIXED, ChannelGraph, Cost, Group, Layer, Pass

ALONE = "all its channels are one unit"


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model that a tracer has seen run. tensors: the model's, or what stood in for them; offsets: (tensor, dimension) -> its
    first label; costs: of the pass in eval mode."""

    model: nn.Module
    tensors: dict[str, torch.Tensor]
    tracer: Tracer
    passes: tuple[Pass, ...]
    offsets: dict[tuple[str, int], int]
    costs: list[tuple[int, list[Label]]]

    @property
    def total(self) -> int:
        """How many labels there are."""
        return self.tracer.total

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """The pairs of labels that were united, [2, n]."""
        return _pairs(self.tracer, self.tracer.edges)

    @functools.cached_property
    def ties(self) -> np.ndarray:
        """The pairs of labels that have the same position in the pieces of a split, [2, n]."""
        return _pairs(self.tracer, self.tracer.ties)

    @functools.cached_property
    def meetings(self) -> np.ndarray:
        """The pairs of the tensors' labels that met slot by slot, [2, n]: each once, and of equal ones none; ascending."""
        noted = self.tracer.meetings or [(torch.zeros(0, dtype=torch.int64),) * 2]
        a, b = (torch.cat(side).numpy() for side in zip(*noted, strict=True))
        a, b = np.minimum(a, b), np.maximum(a, b)
        count = sum(self.tensors[name].shape[d] for name, d in self.offsets)
        there = (a != FIXED) & (a < b) & (b < count)
        return np.stack(np.divmod(np.unique(a[there] * count + b[there]), max(count, 1)))

    @functools.cached_property
    def component(self) -> np.ndarray:
        """The component of every label, [total + 1], where positions tie as well as meetings."""
        return connect(self.total, self.edges, self.ties)

    def untied(self, labels: np.ndarray, bundled: bool = True) -> ChannelGraph:
        """The graph without the ties of some labels, [total + 1]. bundled: they are in bundles."""
        component = connect(self.total, self.edges, self.ties[:, ~labels[self.ties[0]]])
        return assemble(self, component, labels if bundled else None)


def _pairs(tracer: Tracer, noted) -> np.ndarray:
    """Noted pairs of labels, [2, n], without those of slots that no unit owns; what such a slot has met is frozen."""
    if not noted:
        return np.zeros((2, 0), dtype=np.int64)
    pairs = torch.stack([torch.cat(side) for side in zip(*noted, strict=True)]).numpy()
    a, b = unowned = pairs == FIXED
    if not unowned.any():
        return pairs
    tracer.freeze(torch.from_numpy(pairs.max(axis=0)[a != b]), "meets a padded channel")
    return pairs[:, ~(a | b)]


def connect(total: int, *pairs: np.ndarray) -> np.ndarray:
    """For every label the least one that it is connected with, [total + 1], so that label FIXED, the last one, gives FIXED."""
    a, b = np.concatenate(pairs, axis=1, dtype=np.int32, casting="same_kind")  # what scipy would make of them
    count, found = connected_components(coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(total, total)), directed=False)
    least = np.empty(count, dtype=np.int64)
    least[found[::-1]] = np.arange(total)[::-1]  # of several the last one written stays
    return np.append(least[found], FIXED)


def graph_of(traced: Traced, dimensions_in_bundles: Collection[tuple[str, int]] = ()) -> ChannelGraph:
    """The graph of what was noted. dimensions_in_bundles: those whose channels are not tied by their positions in the pieces of
    a split."""
    if not dimensions_in_bundles:
        return assemble(traced, traced.component)
    found = [traced.component[traced.offsets[key] :][: traced.tensors[key[0]].shape[key[1]]] for key in dimensions_in_bundles]
    return traced.untied(np.isin(traced.component, np.concatenate(found)))


def assemble(traced: Traced, component: np.ndarray, bundled: np.ndarray | None = None) -> ChannelGraph:
    """The graph with the given component of every label, [total + 1]. bundled: which labels are in bundles, whose units may be
    one of a kind."""
    tracer, tensors, total = traced.tracer, traced.tensors, traced.total
    owned = max((start + tensors[name].shape[d] for (name, d), start in traced.offsets.items()), default=0)
    component = np.where(component < owned, component, FIXED)  # zeros that meet no tensor of the model's are no unit
    bundled = np.zeros(total + 1, dtype=bool) if bundled is None else bundled

    def of(label):
        return component[label.reshape(-1).numpy()]

    def mask(labels):
        found = np.zeros(total + 1, dtype=bool)  # the last one takes FIXED
        for label in labels:
            found[of(label)] = True
        return found[:-1]

    components = {key: component[start : start + tensors[key[0]].shape[key[1]]] for key, start in traced.offsets.items()}
    layers = {name: _layer(name, calls, of, traced) for name, calls in tracer.applications.items()}
    frozen: dict[int, str] = {}
    for label, reason in tracer.frozen:
        for c in np.unique(of(label)):
            frozen.setdefault(int(c), reason)
    made, heads = mask(tracer.filters), mask(tracer.heads)
    calls = itertools.chain.from_iterable(tracer.applications.values())
    consumed = mask(call.contracted for call in calls if call.contracted is not None)
    for c in np.flatnonzero(heads & ~made):
        frozen.setdefault(int(c), "fully connected; trace(..., fully_connected=True) makes it removable")
    for c in np.flatnonzero(made & ~consumed):
        frozen.setdefault(int(c), "no convolution or linear layer consumes it")
    made[[c for c in frozen if c != FIXED]] = False
    groups, alone = _group(np.flatnonzero(made & consumed), components, layers, total, bundled)
    for c in alone:
        frozen.setdefault(int(c), ALONE)
    frozen.pop(FIXED, None)
    costs = [(flops, tuple(of(d) for d in dimensions)) for flops, dimensions in traced.costs]
    return ChannelGraph(
        model=type(traced.model).__name__,
        groups=groups,
        layers=layers,
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        dtypes={name: t.dtype for name, t in tensors.items()},
        parameters=tuple(name for name, _ in traced.model.named_parameters()),
        components=components,
        meetings=traced.meetings,
        frozen=frozen,
        flop_costs=tuple(Cost(flops // math.prod(map(len, dims)), dims) for flops, dims in costs),
        passes=traced.passes,
        fully_connected=tracer.fully_connected,
    )


def _layer(name: str, calls: list[Application], of, traced: Traced) -> Layer:
    first = calls[0]
    inputs = next((of(call.contracted) for call in calls if call.contracted is not None), None)
    often = len({call.call for call in calls}) // len(traced.passes) or 1  # a recurrent layer multiplies many times a call
    return Layer(
        name=name,
        filters=np.full(first.outputs, FIXED) if first.filters is None else of(first.filters),
        inputs=inputs,
        is_convolution=first.is_convolution,
        is_grouped=name in traced.tracer.grouped,
        unlabelled=first.unlabelled,
        axis=first.axis,
        positions=max(call.positions for call in calls),
        calls=often,
        ndim=first.ndim,
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
    first, group_of = _interchangeable(len(units), [held for _, held in holds])
    slots = _slots(holds, group_of, len(first))
    producers: list[list[str]] = [[] for _ in first]
    for name, layer in layers.items():
        unit = index[layer.filters]
        for g in np.flatnonzero(np.bincount(group_of[unit[unit >= 0]], minlength=len(first))):
            producers[g].append(name)
    groups, taken = [], set()
    alone = (np.bincount(group_of, minlength=len(first)) == 1) & ~bundled[units[first]]
    for g in np.argsort(first):
        if alone[g]:
            continue
        mine = {key: slots[key][g] for key in dimensions if g in slots[key]}
        inputs = {key[0]: s for key, s in mine.items() if key[1] == "in"}
        name = base = producers[g][0] if producers[g] else next(iter(mine))[0]
        if bundled[units[first[g]]]:
            name = base = f"{base}->{next(iter(inputs))}"
        for number in itertools.count(2):
            if name not in taken:
                break
            name = f"{base}#{number}"
        taken.add(name)
        positions = max(layers[consumer].positions * s.shape[1] for consumer, s in inputs.items())
        own = {key: s for key, s in mine.items() if key[1] != "in"}
        groups.append(Group(name, tuple(producers[g]), own, inputs, positions))
    return tuple(groups), units[alone[group_of]]


def _interchangeable(count: int, dimensions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sort units by what they have: the first unit of each group, and the group of each unit. dimensions: the unit of every
    index, -1 where none is. What units have in one dimension after the other tells apart those that were alike until then."""
    group_of, groups = np.zeros(count, dtype=np.int64), 1
    for held in dimensions:
        inside, slots = np.unique(held[held >= 0], return_counts=True)
        if len(inside):
            _, finer = np.unique(group_of[inside] * (len(held) + 1) + slots, return_inverse=True)
            group_of[inside] = groups + finer
            groups += int(finer.max()) + 1
    _, first, group_of = np.unique(group_of, return_index=True, return_inverse=True)
    return first, group_of


def _slots(holds, group_of, groups) -> dict[tuple[str, object], dict[int, torch.Tensor]]:
    """Dimension -> group -> the indices [units, m] that each of its units has there."""
    sizes = np.bincount(group_of, minlength=groups)
    rank = np.empty(len(group_of), dtype=np.int64)  # of a unit in its group
    rank[np.argsort(group_of, kind="stable")] = np.arange(len(group_of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found: dict[tuple[str, object], dict[int, torch.Tensor]] = {}
    for keys, held in holds:
        position = np.flatnonzero(held >= 0)
        unit = held[position]
        position = position[np.lexsort((rank[unit], group_of[unit]))]
        counts = np.bincount(group_of[unit], minlength=groups)
        ends = np.cumsum(counts)
        mine = {
            g: torch.from_numpy(position[ends[g] - counts[g] : ends[g]].reshape(sizes[g], -1)) for g in np.flatnonzero(counts)
        }
        found |= dict.fromkeys(keys, mine)
    return found
