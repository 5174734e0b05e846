"""Decide which units go.

`make_plan` normalises scores per group, charges them for their FLOPs, and removes the lowest until a budget is met;
the result is a `PrunePlan`: a value that can be printed, compared, composed, saved and applied. Formulas:
arXiv:1611.06440, section 2.2 (normalisation, equation 8; FLOPs regularisation, equation 9).
"""

import dataclasses
import json
import math

import numpy as np
import torch
from torch import nn

from taylored.files import digest
from taylored.labels import TraceError
from taylored.rules import FIXED
from taylored.trace import ChannelGraph, Rehearsal, check_fit, check_graph, complement, holders, named_tensors, unwrapped

NORMS = {
    "none": lambda s: torch.ones((), dtype=s.dtype),
    "l2": lambda s: s.norm(),
    "l1": lambda s: s.abs().sum(),
    "max": lambda s: s.abs().max(),
    "mean": lambda s: s.abs().mean(),
}


class PlanError(ValueError):
    """A plan cannot be made as asked, or does not fit the model it is to be applied to."""


@dataclasses.dataclass(frozen=True, eq=False)
class PrunePlan:
    """What to remove, and what every affected dimension keeps.

    removed: group name -> sorted int64 unit indices. keep: (tensor name, dimension) -> int64 indices that stay, in the order in
    which they stay: ascending but where a split or shuffle deals the channels of a narrower model out in another order.
    units: group name -> units before. shapes: the shape before of every tensor in keep. flops, params: (before, after);
    FLOPs are those of the traced example inputs. graph: where the plan comes from, None after loading from a file; rehearsed:
    whether the traced model was seen to run with it.
    """

    removed: dict[str, torch.Tensor]
    keep: dict[tuple[str, int], torch.Tensor]
    units: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    flops: tuple[int, int]
    params: tuple[int, int]
    graph: ChannelGraph | None = dataclasses.field(default=None, repr=False)
    rehearsed: bool = dataclasses.field(default=False, repr=False)

    @classmethod
    def of(cls, graph: ChannelGraph, removed: dict[str, torch.Tensor]) -> "PrunePlan":
        """The plan that removes the given units (group name -> indices) of a graph, rehearsed on the traced model where that is
        still there. Raises PlanError for units that do not exist or a group of which none is left, TraceError as `rehearse`."""
        if unknown := removed.keys() - {g.name for g in graph.groups}:
            raise PlanError(f"removed names {sorted(unknown)}, which are no groups of the graph")
        removed = {name: torch.as_tensor(units, dtype=torch.int64, device="cpu").unique() for name, units in removed.items()}
        removed = {g.name: removed[g.name] for g in graph.groups if len(removed.get(g.name, ()))}
        for name, units in removed.items():
            group = graph.group(name)
            if units[0] < 0 or units[-1] >= group.units:
                raise PlanError(f"removed[{name!r}] has an index outside of the group's {group.units} units")
            if len(units) == group.units and name not in graph.bundled:
                raise PlanError(f"removed[{name!r}] leaves none of the group's {group.units} units")
        try:
            keep, after = graph.keep(removed), graph.after(removed)
        except ValueError as error:
            raise PlanError(f"removed does not take the same share of all that must shrink together: {error}") from error
        plan = cls(
            removed=removed,
            keep=keep,
            units={g.name: g.units for g in graph.groups},
            shapes={t: graph.shapes[t] for t, _ in keep},
            flops=(graph.flops, after.flops),
            params=(graph.params, after.params),
            graph=graph,
        )
        model = graph.source() if removed else None
        if model is None:
            return plan
        rehearse(model, plan)
        return dataclasses.replace(plan, rehearsed=True)

    def then(self, later: "PrunePlan") -> "PrunePlan":
        """One plan against the original model that does what this one and then the later one do."""
        removed = {}
        for name, size in self.units.items():
            left = complement(self.removed.get(name, ()), size)
            if later.units.get(name, 0) != len(left):
                raise PlanError(
                    f"the later plan starts from {later.units.get(name)} units of {name!r}, this one leaves {len(left)}"
                )
            gone = complement(left[complement(later.removed.get(name, ()), len(left))], size)
            if len(gone):
                removed[name] = gone
        shapes = {**later.shapes, **self.shapes}
        for (tensor, d), indices in self.keep.items():
            if tensor in later.shapes and later.shapes[tensor][d] != len(indices):
                raise PlanError(f"the later plan starts from another shape of {tensor!r} than this one leaves")
        keep = dict(self.keep)
        for key, indices in later.keep.items():
            keep[key] = keep[key][indices] if key in keep else indices
        return dataclasses.replace(
            self,
            removed=removed,
            keep=keep,
            shapes=shapes,
            flops=(self.flops[0], later.flops[1]),
            params=(self.params[0], later.params[1]),
            rehearsed=False,
        )

    @property
    def cuts(self) -> dict[str, dict[int, torch.Tensor]]:
        """`keep` by tensor: name -> dimension -> indices that stay."""
        cuts: dict[str, dict[int, torch.Tensor]] = {}
        for (tensor, d), indices in self.keep.items():
            cuts.setdefault(tensor, {})[d] = indices
        return cuts

    def shape_after(self, tensor: str) -> tuple[int, ...]:
        """The shape that a tensor in `shapes` has when the plan has been applied."""
        return tuple(len(self.keep[tensor, d]) if (tensor, d) in self.keep else s for d, s in enumerate(self.shapes[tensor]))

    @property
    def kept(self) -> dict[str, int]:
        """Group name -> number of units left."""
        return {name: size - len(self.removed.get(name, ())) for name, size in self.units.items()}

    def summary(self) -> str:
        """A table: every group's units before and after (those of a bundle together, where the graph is known), the share of
        them that goes, and what that does to the model."""
        rows, bundle_of = {}, self.graph.bundle_of if self.graph is not None else {}
        for name, size in self.units.items():
            before, after = rows.get(bundle_of.get(name, name), (0, 0))
            rows[bundle_of.get(name, name)] = before + size, after + self.kept[name]
        rows = [(name, before, after, f"{1 - after / before:.1%}") for name, (before, after) in rows.items()]
        for name, (before, after) in (
            ("all groups", (sum(self.units.values()), sum(self.kept.values()))),
            ("parameters", self.params),
            ("FLOPs", self.flops),
        ):
            rows.append((name, before, after, f"{1 - after / max(before, 1):.1%}"))
        return _table(("group", "units", "kept", "gone"), rows)

    @property
    def digest(self) -> str:
        """A short name of what the plan does: equal plans have equal ones, on every machine."""
        text = json.dumps([self.units, self.shapes], sort_keys=True)
        return digest(text, {**{f"{d} {name}": k for (name, d), k in self.keep.items()}, **self.removed})

    def __eq__(self, other):
        def same(a, b):
            return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

        return (
            isinstance(other, PrunePlan)
            and same(self.removed, other.removed)
            and same(self.keep, other.keep)
            and (self.units, self.shapes) == (other.units, other.shapes)
        )

    __hash__ = None

    def __getstate__(self):
        return {**self.__dict__, "graph": None, "rehearsed": False}

    def __repr__(self):
        gone, total = sum(map(len, self.removed.values())), sum(self.units.values())
        (flops, flops_after), (params, params_after) = self.flops, self.params
        return (
            f"PrunePlan(removes {gone} of {total} units in {len(self.removed)} groups: "
            f"{flops:.4g} -> {flops_after:.4g} FLOPs, {params:,} -> {params_after:,} parameters)"
        )


def rehearse(model: nn.Module, plan: PrunePlan) -> None:
    """Run the planned model on the meta device: shapes, labels and FLOPs must come out as planned. Changes nothing.

    Raises TraceError with the file and line of the forward that does not follow its input's number of channels."""
    model = unwrapped(model)
    graph = plan.graph
    try:
        check_fit(graph, model)
    except ValueError as error:
        raise PlanError(f"the plan does not fit model: {error}") from error
    for traced in graph.passes:
        mode = Rehearsal(model, graph, plan.removed)
        try:
            with torch.inference_mode(False):  # in it operators would arrive whole, as in `trace`
                mode.run(model, traced)
        except TraceError as error:
            converted = [n for n, t in named_tensors(model).items() if t.dtype != graph.dtypes[n]]
            if not converted:
                raise
            raise TraceError(f"{converted[0]!r} changed its type since: trace it anew") from error
        if not traced.training and not traced.dynamic and mode.flops != plan.flops[1]:
            raise TraceError(f"with fewer channels the model takes {mode.flops} FLOPs, {plan.flops[1]} were planned")


def diff(model: nn.Module, plan: PrunePlan) -> str:
    """A table: the shape of every module's weight before and after the plan, and the parameters of both, shared ones at each
    module that has them.

    model: as it was before the plan or as the plan leaves it. Raises PlanError if it is neither."""
    model = unwrapped(model)
    there = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    before = {**there, **plan.shapes}
    after = {**there, **{name: plan.shape_after(name) for name in plan.shapes}}
    if there not in (before, after):
        name = next(n for n in plan.shapes if there.get(n) != after[n])
        sizes = f"{there.get(name)}, not {before[name]} or {after[name]}"
        raise PlanError(f"the plan does not fit model, neither before nor after: {name!r} has shape {sizes}")
    rows, name_at, parameters = [], holders(model), [name for name, _ in model.named_parameters()]
    totals = [sum(math.prod(shapes[name]) for name in parameters) for shapes in (before, after)]
    for prefix, module in model.named_modules():
        here = (f"{prefix}.{local}".lstrip(".") for local in module._parameters)
        names = [name_at[place] for place in here if place in name_at]
        counts = [sum(math.prod(shapes[name]) for name in names) for shapes in (before, after)]
        if any(name in plan.shapes for name in names):
            largest = max(names, key=lambda name: math.prod(before[name]))
            weights = ("x".join(map(str, shapes[largest])) for shapes in (before, after))
            rows.append((prefix or "the model", type(module).__name__, *weights, *(f"{count:,}" for count in counts)))
    rows.append(("all", type(model).__name__, "", "", *(f"{total:,}" for total in totals)))
    return _table(("module", "type", "weight before", "after", "parameters before", "after"), rows)


def _table(header, rows) -> str:
    """Columns as wide as what is in them; what begins with a digit stands to the right."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = [all(row[i][:1].isdigit() or not row[i] for row in rows[1:]) for i in range(len(header))]
    lines = ("  ".join(f"{c:>{w}}" if r else f"{c:{w}}" for c, w, r in zip(row, widths, right)).rstrip() for row in rows)
    return "\n".join(lines)


class Price:
    """FLOPs or parameters as a function of how many units each group keeps: a sum of products, evaluated exactly."""

    def __init__(self, graph: ChannelGraph, costs):
        group_of = np.full(1 + max((int(d.max(initial=0)) for d in graph.components.values()), default=0), len(graph.groups))
        for i, group in enumerate(graph.groups):
            (tensor, d), slots = next(iter(group.slots.items()))
            group_of[graph.components[tensor, d][slots.flatten().numpy()]] = i
        rows: dict[bytes, int] = {}
        sizes = []

        def row(dimension):
            key = dimension.tobytes()
            if key not in rows:
                rows[key] = len(sizes)
                owner = np.where(dimension == FIXED, len(graph.groups), group_of[dimension])
                sizes.append(np.bincount(owner, minlength=len(graph.groups) + 1))
            return rows[key]

        one = row(np.array([FIXED]))
        width = max((len(c.dimensions) for c in costs), default=1)
        self.factors = np.array(
            [[row(d) for d in c.dimensions] + [one] * (width - len(c.dimensions)) for c in costs], dtype=np.int64
        )
        self.coefficients = np.array([c.coefficient for c in costs], dtype=np.int64)
        sizes = np.array(sizes, dtype=np.int64)
        units = np.array([g.units for g in graph.groups], dtype=np.int64)
        self.fixed, self.per_unit = sizes[:, -1], sizes[:, :-1] // np.maximum(units, 1)

    def __call__(self, kept: np.ndarray) -> int:
        """kept: units left in each group, in the order of graph.groups."""
        sizes = self.fixed + self.per_unit @ kept
        return int((self.coefficients * sizes[self.factors].prod(axis=1)).sum()) if len(self.coefficients) else 0


def make_plan(
    graph: ChannelGraph,
    scores: dict[str, torch.Tensor],
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    remove_units: int | None = None,
    normalize: str = "l2",
    flops_weight: float = 1e-3,
    round_to: int = 1,
    min_units: int | dict[str, int] = 1,
    max_ratio: float | dict[str, float] = 1.0,
    ignore=(),
) -> PrunePlan:
    """Remove the units with the lowest scores until exactly one budget is met.

    scores: group name -> [units]; a group without scores is left alone. target_flops, target_params: what may remain,
    as a fraction of the graph's (a float up to 1) or in absolute numbers. remove_units: how many units go. normalize:
    divide each group's scores by their "l2" (the paper's), "l1", "max" or "mean", or "none". flops_weight: lambda of
    `score - lambda * flops(unit)`, in units such that the dearest group's units cost 1. round_to: keep a multiple of
    so many channels per group. min_units: units each group keeps at least; max_ratio: share of each group that may go;
    both also as a dict by group name. ignore: modules, or names of modules or groups, whose filters all stay.

    The groups of a bundle (`Bundle`) lose their lowest units together, a step of its width at a time, for the mean of their
    scores; round_to, min_units and max_ratio are about its width. Raises PlanError when the budget cannot be met, naming what is
    the least that can be reached.
    """
    check_graph(graph)
    scores = _checked(graph, scores)
    for argument, limits in (("min_units", min_units), ("max_ratio", max_ratio)):
        if isinstance(limits, dict) and (unknown := limits.keys() - {g.name for g in graph.groups}):
            raise PlanError(f"{argument} names {sorted(unknown)}, which are no groups of the graph")
    budgets = {"target_flops": target_flops, "target_params": target_params, "remove_units": remove_units}
    given = {k: v for k, v in budgets.items() if v is not None}
    if not graph.groups:
        raise PlanError("the model has nothing that can be removed: graph.explain() says why, layer by layer")
    if len(given) != 1:
        raise PlanError(f"give exactly one of target_flops, target_params and remove_units, got {given or 'none'}")
    if normalize not in NORMS:
        raise PlanError(f"normalize must be one of {list(NORMS)}, got {normalize!r}")
    if not isinstance(round_to, int) or round_to < 1:
        raise PlanError(f"round_to must be a positive integer, got {round_to!r}")
    name, budget = next(iter(given.items()))
    price = Price(graph, graph.param_costs if name == "target_params" else graph.flop_costs)
    full = np.array([g.units for g in graph.groups], dtype=np.int64)
    ignored = _ignored(graph, ignore)
    dear = _flops_per_unit(graph, price if name != "target_params" else Price(graph, graph.flop_costs), full)

    strokes = []  # (score, index of the group -> units removed at one stroke), always the lowest that are left
    order, limits = {}, (min_units, max_ratio)
    for together, options in _shrinking(graph, round_to, limits):
        if any(graph.groups[i].name not in scores or graph.groups[i].name in ignored for i in together):
            continue
        joint = torch.cat([scores[graph.groups[i].name] for i in together])
        norm = NORMS[normalize](joint)
        values = {}
        for i in together:
            s = scores[graph.groups[i].name] / (norm if norm > 0 else 1.0) - flops_weight * dear[i]
            order[i] = torch.argsort(s, stable=True)
            values[i] = s[order[i]]
        gone, least = dict.fromkeys(together, 0), -math.inf
        for after in options:
            going = torch.cat([values[i][gone[i] : after[i]] for i in together])
            least = max(least, float(going.mean()))  # a bundle's strokes cannot change places
            strokes.append((least, {i: after[i] - gone[i] for i in together}))
            gone = after
    strokes.sort(key=lambda s: s[0])
    counts = np.zeros((len(strokes) + 1, len(graph.groups)), dtype=np.int64)
    for n, (_, going) in enumerate(strokes):
        counts[n + 1, list(going)] = list(going.values())
    counts = counts.cumsum(axis=0)  # units gone from each group after the first n strokes

    if name == "remove_units":
        n = int(np.searchsorted(counts.sum(axis=1), budget, side="right")) - 1
        if not isinstance(budget, int) or budget < 0 or budget > counts[-1].sum():
            raise PlanError(f"remove_units={budget!r} must be an integer from 0 to {int(counts[-1].sum())}, all that may go")
    else:
        total = graph.params if name == "target_params" else graph.flops
        limit = _absolute(name, budget, total)
        least = price(full - counts[-1])
        if least > limit:
            percentage = " (for a percentage, write a fraction: 0.5)" if 1 < budget <= 100 else ""
            raise PlanError(
                f"{name}: at most {limit} of {total} ({limit / max(total, 1):.3f}) may remain{percentage}, which cannot be met: "
                f"with every unit gone that may go {least} ({least / max(total, 1):.3f}) remain. Let more go (min_units, "
                f"max_ratio, round_to, ignore) or raise the budget"
            )
        low, n = 0, len(strokes)  # the price falls with every stroke: find the first prefix within the limit
        while low < n:
            middle = (low + n) // 2
            low, n = (low, middle) if price(full - counts[middle]) <= limit else (middle + 1, n)
    return PrunePlan.of(graph, {graph.groups[i].name: order[i][: counts[n, i]] for i in order})


def random_plan(graph: ChannelGraph, ratio: float, seed: int = 0) -> PrunePlan:
    """Remove the share `ratio` of every group's units (rounded down, never all) at random: for tests and baselines. Of a
    bundle's width the narrowest that leaves as much."""
    check_graph(graph)
    if not 0 <= ratio <= 1:
        raise PlanError(f"ratio must lie between 0 and 1, got {ratio}")
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for together, options in _shrinking(graph, 1, (1, ratio)):
        *_, gone = (dict.fromkeys(together, 0), *options)
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


def _absolute(name, budget, total) -> int:
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
    layouts = [(widths, graph.gone(layout)) for widths, layout in graph.narrower(round_to)]
    for number, bundle in enumerate(graph.bundles):
        together = [i for i, group in enumerate(graph.groups) if group.name in bundle.groups]
        keep = max(_limits(limits, graph.groups[i], bundle.width) for i in together)
        options = {}
        for widths, gone in layouts:
            if keep <= widths[number] < bundle.width:
                options[widths[number]] = {i: gone[graph.groups[i].name] for i in together}
        yield together, list(options.values())


def _limits(limits, group, units) -> int:
    """How many of the units must stay, by (min_units, max_ratio)."""
    min_units, max_ratio = (_limit(*pair, group) for pair in zip(("min_units", "max_ratio"), limits, strict=True))
    return max(min_units, math.ceil(units * (1 - max_ratio) - 1e-9))


def _flops_per_unit(graph, price, full) -> np.ndarray:
    """FLOPs that one unit of each group costs as things stand, the dearest group's being 1."""
    total = price(full)
    saved = np.array([total - price(full - one) for one in np.eye(len(full), dtype=np.int64)], dtype=np.float64)
    return saved / max(saved.max(initial=0.0), 1.0)


def named_entries(graph, ignore) -> list[tuple[str | nn.Module, str | None]]:
    """What `ignore` lists, each with its name; None for a module that is not the graph's."""
    entries = (ignore,) if isinstance(ignore, (str, nn.Module)) else ignore
    return [(entry, graph.modules.get(entry) if isinstance(entry, nn.Module) else entry) for entry in entries]


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
