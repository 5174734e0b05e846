"""Groups that can only shrink together, for splits and shuffles deal their channels out by position (`values.Bundle`).

Tied position by position, such channels would make units that are not alike, or chains of them. Without the ties every unit goes
by itself, and the model says, run narrower, how many of each group it then has room for.
"""

import dataclasses
import math

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from taylored._errors import TraceError
from taylored._graph.components import ALONE, Traced, connect
from taylored._graph.rehearsal import ModelRehearser, Rehearsal
from taylored._graph.values import Bundle, ChannelGraph


def with_bundles(traced: Traced, graph: ChannelGraph) -> ChannelGraph | None:
    """The graph with its bundles, or None where there are none: where ties make units that are not alike, nothing but ties holds
    them, and the model runs narrower."""
    ties = traced.ties
    if not ties.size or traced.tracer.values != "none":
        return None
    component, free = traced.component, connect(traced.total, traced.edges)
    held = np.zeros(traced.total + 1, dtype=bool)  # the components that ties alone have made what they are
    held[component[ties[0][free[ties[0]] != free[ties[1]]]]] = True
    clusters = [c for c in _clusters(graph.components, held) if _irregular(graph, c, traced.tracer.pieces)]
    inside = [np.isin(component, components) for components in clusters]
    while inside:
        found = traced.untied(np.any(inside, axis=0))
        bundles = [_bundle(found, mine) for mine in inside]
        whole = tuple(bundle for bundle in bundles if bundle is not None)
        if len(whole) == len(bundles):
            found = dataclasses.replace(found, bundles=whole, rehearser=ModelRehearser(traced.model, keep=True))
            return None if next(found.narrower(tries=4), None) is None else found
        inside = [mine for mine, bundle in zip(inside, bundles, strict=True) if bundle]
    return None


def needless_ties(traced: Traced, graph: ChannelGraph) -> np.ndarray | None:
    """Labels [total + 1] whose ties make a single unit of all channels though the model does without: a linear layer's outputs
    that are viewed as [channels, height, width] come and go by the channel. None where there are none. The model is run without
    one unit of each group, and without half of them."""
    alone = [c for c, why in graph.frozen.items() if why == ALONE]
    if not traced.ties.size or not alone or traced.tracer.values != "none":
        return None
    labels = np.isin(traced.component, alone)
    free = traced.untied(labels, bundled=False)
    new = [g for g in free.groups if g.units > 2 and labels[free.members(g)].any()]
    if not new:
        return None
    generator = torch.Generator().manual_seed(0)
    half = {g.name: torch.randperm(g.units, generator=generator)[: g.units // 2] for g in new}
    for removed in ({g.name: torch.tensor([0]) for g in new}, {name: units.sort().values for name, units in half.items()}):
        for whole in free.passes:
            try:
                Rehearsal(traced.model, free, removed).run(traced.model, whole)
            except TraceError:
                return None
    return labels


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
    found = [group_of.get(int(c)) for c in components]
    first = found[0]
    if first is None or any(group is not first for group in found):
        return True
    return any(s.shape[1] > pieces for s in first.slots.values())


def _bundle(graph: ChannelGraph, inside) -> Bundle | None:
    """The bundle of the components `inside` [total + 1], or None if something but positions holds one of them."""
    groups = [g for g in graph.groups if inside[graph.members(g)[0]]]
    sizes = {key: size for key, components in graph.components.items() if (size := int(inside[components].sum()))}
    whole = all(sum(g.slots[key].numel() for g in groups if key in g.slots) == size for key, size in sizes.items())
    single = all(s.shape[1] == 1 for g in groups for s in (*g.slots.values(), *g.inputs.values()))
    width = math.gcd(*sizes.values())
    return Bundle(tuple(g.name for g in groups), sizes, width) if whole and single and width > 2 else None
