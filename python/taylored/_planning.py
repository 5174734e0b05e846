"""Decide which units go.

`make_plan` normalises scores per group, charges them for their FLOPs, and removes the lowest until a budget is met. Formulas:
arXiv:1611.06440, section 2.2 (normalisation, equation 8; FLOPs regularisation, equation 9).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from taylored._errors import PlanError
from taylored._graph.rehearsal import reaching
from taylored._graph.values import FIXED, ChannelGraph, check_graph
from taylored._plan import PrunePlan

NORMS = {
    "none": lambda s: torch.ones((), dtype=s.dtype),
    "l2": lambda s: s.norm(),
    "l1": lambda s: s.abs().sum(),
    "max": lambda s: s.abs().max(),
    "mean": lambda s: s.abs().mean(),
}


Ignored = str | nn.Module | Sequence[str | nn.Module]


def make_plan(
    graph: ChannelGraph,
    scores: dict[str, torch.Tensor],
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    remove_units: int | None = None,
    normalize: str = "l2",
    flops_weight: float = 1e-3,
    per_flop: bool = False,
    round_to: int = 1,
    min_units: int | dict[str, int] = 1,
    max_ratio: float | dict[str, float] = 1.0,
    ignore: Ignored = (),
    model: nn.Module | None = None,
) -> PrunePlan:
    """Remove the units with the lowest scores until exactly one budget is met.

    scores: group name -> [units]; a group without scores is left alone. target_flops, target_params: what may remain,
    as a fraction of the graph's (a float up to 1) or in absolute numbers. remove_units: how many units go. normalize:
    divide each group's scores by their "l2" (the paper's), "l1", "max" or "mean", or "none". flops_weight: lambda of
    `score - lambda * flops(unit)`, in units such that the dearest group's units cost 1. per_flop: instead of both, sort by score
    per FLOP saved: for scores that are comparable between groups as they are (`ResidualScorer`). round_to: keep a multiple of
    so many channels per group. min_units: units each group keeps at least; max_ratio: share of each group that may go;
    both also as a dict by group name. ignore: modules, or names of modules or groups, whose filters all stay. model: for a graph
    that comes from a file or a pickle, which has forgotten its own.

    The groups of a bundle (`Bundle`) lose their lowest units together, a step of its width at a time, for the mean of their
    scores; round_to, min_units and max_ratio are about its width. Raises PlanError when the budget cannot be met, naming what is
    the least that can be reached.
    """
    check_graph(graph)
    graph = reaching(graph, model)
    scores = _checked(graph, scores)
    given = {"target_flops": target_flops, "target_params": target_params, "remove_units": remove_units}
    name, budget = _budget(graph, given)
    _check_options(graph, normalize, round_to, min_units, max_ratio)
    price = Price(graph, graph.param_costs if name == "target_params" else graph.flop_costs)
    flops = _flops_per_unit(price if name != "target_params" else Price(graph, graph.flop_costs))
    if per_flop:  # what saves next to nothing comes last
        scores = {g.name: scores[g.name] / max(flops[i], 1e-12) for i, g in enumerate(graph.groups) if g.name in scores}
        normalize, flops_weight = "none", 0.0
    ignored = _ignored(graph, ignore)
    chosen = {name: s for name, s in scores.items() if name not in ignored}
    order, strokes = _strokes(graph, chosen, NORMS[normalize], flops_weight * flops, round_to, (min_units, max_ratio))
    gone = _Gone(strokes, len(graph.groups))
    n = _most_strokes(gone, budget) if name == "remove_units" else _fewest_strokes(graph, gone, price, name, budget)
    counts = gone.after(n)
    return PrunePlan.of(graph, {graph.groups[i].name: order[i][: counts[i]] for i in order})


def _budget(graph, budgets) -> tuple[str, float]:
    """The one that is given, by name."""
    given = {name: budget for name, budget in budgets.items() if budget is not None}
    if not graph.groups:
        raise PlanError("the model has nothing that can be removed: graph.explain() says why, layer by layer")
    if len(given) != 1:
        raise PlanError(f"give exactly one of target_flops, target_params and remove_units, got {given or 'none'}")
    return next(iter(given.items()))


def _check_options(graph, normalize, round_to, min_units, max_ratio) -> None:
    for argument, limits in (("min_units", min_units), ("max_ratio", max_ratio)):
        if isinstance(limits, dict) and (unknown := limits.keys() - {g.name for g in graph.groups}):
            raise PlanError(f"{argument} names {sorted(unknown)}, which are no groups of the graph")
    if normalize not in NORMS:
        raise PlanError(f"normalize must be one of {list(NORMS)}, got {normalize!r}")
    if not isinstance(round_to, int) or round_to < 1:
        raise PlanError(f"round_to must be a positive integer, got {round_to!r}")


class Stroke(NamedTuple):
    """What is removed at once. score: by which strokes are sorted; going: index of a group -> how many of its units, always the
    lowest that are left."""

    score: float
    going: dict[int, int]


def _strokes(graph, scores, norm_of, charge, round_to, limits) -> tuple[dict[int, torch.Tensor], list[Stroke]]:
    """The order in which each group (by its index) loses its units, and all strokes, the lowest first. charge: what each group's
    units are charged for their FLOPs."""
    order, strokes = {}, []
    for together, options in _shrinking(graph, round_to, limits):
        if any(graph.groups[i].name not in scores for i in together):
            continue
        norm = norm_of(torch.cat([scores[graph.groups[i].name] for i in together]))
        values = {}
        for i in together:
            s = scores[graph.groups[i].name] / (norm if norm > 0 else 1.0) - charge[i]
            order[i] = torch.argsort(s, stable=True)
            values[i] = s[order[i]]
        gone, least = dict.fromkeys(together, 0), -math.inf
        for after in options:
            going = torch.cat([values[i][gone[i] : after[i]] for i in together])
            least = max(least, float(going.mean()))  # a bundle's strokes cannot change places
            strokes.append(Stroke(least, {i: after[i] - gone[i] for i in together}))
            gone = after
    return order, sorted(strokes, key=lambda stroke: stroke.score)


class _Gone:
    """How many units of each group are gone after the first strokes."""

    def __init__(self, strokes: list[Stroke], groups: int):
        self.groups, self.strokes = groups, len(strokes)
        flat = [(n, i, count) for n, stroke in enumerate(strokes) for i, count in stroke.going.items()]
        self.number, self.index, self.count = np.array(flat, dtype=np.int64).reshape(-1, 3).T

    def after(self, n: int) -> np.ndarray:
        """[groups]."""
        stop = np.searchsorted(self.number, n)
        return np.bincount(self.index[:stop], self.count[:stop], self.groups).astype(np.int64)

    def totals(self) -> np.ndarray:
        """Of all groups together, after every number of strokes: [strokes + 1]."""
        return np.append(0, np.bincount(self.number, self.count, self.strokes).cumsum()).astype(np.int64)


def _most_strokes(gone, budget) -> int:
    """How many strokes remove at most so many units."""
    totals = gone.totals()
    if not isinstance(budget, int) or budget < 0 or budget > totals[-1]:
        raise PlanError(f"remove_units={budget!r} must be an integer from 0 to {totals[-1]}, all that may go")
    return int(np.searchsorted(totals, budget, side="right")) - 1


def _fewest_strokes(graph, gone, price, name, budget) -> int:
    """How many strokes it takes until no more remains than the budget."""
    total = graph.params if name == "target_params" else graph.flops
    limit = absolute(name, budget, total)
    least = price(price.units - gone.after(gone.strokes))
    if not gone.strokes and limit < total:
        raise PlanError(
            f"{name}: at most {limit} of {total} may remain, which cannot be met: no group may lose a unit. Groups without "
            "scores are left alone; round_to, min_units, max_ratio and ignore keep the others as they are"
        )
    if least > limit:
        percentage = " (for a percentage, write a fraction: 0.5)" if 1 < budget <= 100 else ""
        raise PlanError(
            f"{name}: at most {limit} of {total} ({limit / max(total, 1):.3f}) may remain{percentage}, which cannot be met: "
            f"with every unit gone that may go {least} ({least / max(total, 1):.3f}) remain. Let more go (min_units, "
            f"max_ratio, round_to, ignore) or raise the budget"
        )
    low, n = 0, gone.strokes  # the price falls with every stroke: find the first prefix within the limit
    while low < n:
        middle = (low + n) // 2
        low, n = (low, middle) if price(price.units - gone.after(middle)) <= limit else (middle + 1, n)
    return n


def random_plan(graph: ChannelGraph, ratio: float, seed: int = 0, *, model: nn.Module | None = None) -> PrunePlan:
    """Remove the share `ratio` of every group's units (rounded down, never all) at random: for tests and baselines. Of a
    bundle's width the narrowest that leaves as much. model: as for `make_plan`."""
    check_graph(graph)
    graph = reaching(graph, model)
    if not 0 <= ratio <= 1:
        raise PlanError(f"ratio must lie between 0 and 1, got {ratio}")
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for together, options in _shrinking(graph, 1, (1, ratio)):
        none: dict[int, int] = dict.fromkeys(together, 0)
        gone = [none, *options][-1]
        for i, count in gone.items():
            group = graph.groups[i]
            removed[group.name] = torch.randperm(group.units, generator=generator)[:count]
    return PrunePlan.of(graph, removed)


def _checked(graph, scores) -> dict[str, torch.Tensor]:
    if not isinstance(scores, dict):
        raise TypeError(f"scores must be a dict from group to tensor (scorer.scores()), got {type(scores).__name__}")
    names = {g.name: g.units for g in graph.groups}
    checked = {}
    for name, s in scores.items():
        if name not in names:
            raise PlanError(f"scores has {name!r}, which is no group of the graph: {list(names)}")
        s = torch.as_tensor(s).detach().to("cpu", torch.float64)
        if s.shape != (names[name],):
            raise PlanError(f"scores[{name!r}] must have shape ({names[name]},), got {tuple(s.shape)}")
        if not s.isfinite().all():
            raise PlanError(f"scores[{name!r}] is not finite")
        checked[name] = s
    return checked


def absolute(name: str, budget: float, total: int) -> int:
    """What may remain of `total`, where a budget is a fraction of it or absolute. Raises PlanError, calling it `name`."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise PlanError(f"{name} must be a number, got {budget!r}")
    if isinstance(budget, float) and 0 < budget <= 1:
        return math.floor(budget * total)
    if budget >= 1:
        return int(budget)
    raise PlanError(f"{name} must be a fraction in (0, 1] or an absolute number, got {budget!r}")


def _limit(argument, value, group):
    value = value.get(group.name, 1) if isinstance(value, dict) else value
    if argument == "min_units" and (not isinstance(value, int) or value < 1):
        raise PlanError(f"min_units must be a positive integer, got {value!r} for {group.name!r}")
    if argument == "max_ratio" and not 0 <= value <= 1:
        raise PlanError(f"max_ratio must lie between 0 and 1, got {value!r} for {group.name!r}")
    return value


def _shrinking(graph, round_to, limits):
    """What shrinks by itself, a group or a bundle: the indices of its groups, and the counts of units gone from each (index ->
    count), from few to many."""
    bundled = graph.bundled
    for i, group in enumerate(graph.groups):
        if group.name not in bundled:
            keep = max(_limits(limits, group, group.units), 1)
            channels = max((int((graph.layers[name].filters >= 0).sum()) for name in group.layers), default=group.units)
            width = max(1, channels // group.units)  # channels that a unit has in its widest layer
            step = round_to // math.gcd(round_to, width)
            yield [i], [{i: gone} for gone in range(group.units % step or step, group.units - keep + 1, step)]
    narrower = [(widths, graph.lost_units(narrow)) for widths, narrow in graph.narrower(round_to)]
    for number, bundle in enumerate(graph.bundles):
        together = [i for i, group in enumerate(graph.groups) if group.name in bundle.groups]
        keep = max(_limits(limits, graph.groups[i], bundle.width) for i in together)
        options = {}
        for widths, gone in narrower:
            if keep <= widths[number] < bundle.width:
                options[widths[number]] = {i: gone[graph.groups[i].name] for i in together}
        yield together, list(options.values())


def _limits(limits, group, units) -> int:
    """How many of the units must stay, by (min_units, max_ratio)."""
    min_units, max_ratio = (_limit(*pair, group) for pair in zip(("min_units", "max_ratio"), limits, strict=True))
    return max(min_units, math.ceil(units * (1 - max_ratio) - 1e-9))


def _flops_per_unit(price: "Price") -> np.ndarray:
    """FLOPs that one unit of each group costs as things stand, the dearest group's being 1."""
    total = price(price.units)
    saved = np.array([total - price(price.units - one) for one in np.eye(len(price.units), dtype=np.int64)], dtype=np.float64)
    return saved / max(saved.max(initial=0.0), 1.0)


def named_entries(graph, ignore) -> list[tuple[str | nn.Module, str | None]]:
    """What `ignore` lists, each with its name; None for a module that is not the graph's."""
    entries = (ignore,) if isinstance(ignore, (str, nn.Module)) else ignore
    if graph.rehearser is None and any(isinstance(entry, nn.Module) for entry in entries):
        raise PlanError("ignore has a module, whose name a graph from a file or a pickle does not know: name it, or give model=")
    return [(entry, graph.rehearser.name_of(entry) if isinstance(entry, nn.Module) else entry) for entry in entries]


def _ignored(graph, ignore) -> set[str]:
    ignored = set()
    for entry, name in named_entries(graph, ignore):
        hit = {
            g.name
            for g in graph.groups
            if name is not None and (g.name == name or any(x == name or x.startswith(f"{name}.") for x in g.layers))
        }
        known = name is not None and any(x == name or x.startswith(f"{name}.") for x in graph.layers)
        if not hit and not known:
            raise PlanError(
                f"ignore has {entry!r}, which is neither a module of the traced model nor the name of one or of a group"
            )
        ignored |= hit
    return ignored


class Price:
    """FLOPs or parameters as a function of how many units each group keeps: a sum of products, evaluated exactly."""

    def __init__(self, graph: ChannelGraph, costs):
        group_of = np.full(1 + max((int(d.max(initial=0)) for d in graph.components.values()), default=0), len(graph.groups))
        for i, group in enumerate(graph.groups):
            (tensor, d), slots = next(iter(group.slots.items()))
            group_of[graph.components[tensor, d][slots.flatten().numpy()]] = i
        rows: dict[bytes, int] = {}
        counts: list[np.ndarray] = []

        def row(dimension):
            key = dimension.tobytes()
            if key not in rows:
                rows[key] = len(counts)
                owner = np.where(dimension == FIXED, len(graph.groups), group_of[dimension])
                counts.append(np.bincount(owner, minlength=len(graph.groups) + 1))
            return rows[key]

        one = row(np.array([FIXED]))
        width = max((len(c.dimensions) for c in costs), default=1)
        self.factors = np.array(
            [[row(d) for d in c.dimensions] + [one] * (width - len(c.dimensions)) for c in costs], dtype=np.int64
        )
        self.coefficients = np.array([c.coefficient for c in costs], dtype=np.int64)
        sizes = np.array(counts, dtype=np.int64)
        self.units = np.array([g.units for g in graph.groups], dtype=np.int64)
        self.fixed, self.per_unit = sizes[:, -1], sizes[:, :-1] // np.maximum(self.units, 1)

    def __call__(self, kept: np.ndarray) -> int:
        """kept: units left in each group, in the order of graph.groups."""
        sizes = self.fixed + self.per_unit @ kept
        return int((self.coefficients * sizes[self.factors].prod(axis=1)).sum()) if len(self.coefficients) else 0
