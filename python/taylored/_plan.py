"""What goes, as a value.

A `PrunePlan` says which units are removed and what every affected dimension keeps. It can be printed, compared, composed, saved
and applied; it is tried on the model where it is made (`rehearse`).
"""

import dataclasses
import json
import math
from collections.abc import Mapping

import torch
from torch import nn

from taylored._errors import PlanError, TraceError
from taylored._files import digest
from taylored._graph.rehearsal import Rehearsal, reaching
from taylored._graph.values import ChannelGraph, check_fit, check_graph, complement
from taylored._modules import check_module, holders, named_shapes, named_tensors
from taylored._tables import text_table


@dataclasses.dataclass(frozen=True, eq=False)
class PrunePlan:
    """What to remove, and what every affected dimension keeps.

    removed: group name -> sorted int64 unit indices. keep: (tensor name, dimension) -> int64 indices that stay, in the order in
    which they stay: ascending but where a split or shuffle deals the channels of a narrower model out in another order.
    units: group name -> units before. shapes: the shape before of every tensor in keep. flops, params: (before, after);
    FLOPs are those of the traced example inputs. graph: where the plan comes from, None after loading from a file; rehearsed:
    whether the traced model was seen to run with it.

    In a checkpoint of one's own: torch.load(..., weights_only=True) takes it within
    `torch.serialization.safe_globals([taylored.PrunePlan])`.
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
    def of(cls, graph: ChannelGraph, removed: dict[str, torch.Tensor], *, model: nn.Module | None = None) -> "PrunePlan":
        """The plan that removes the given units (group name -> indices) of a graph, rehearsed on the traced model where that is
        still there.

        model: for a graph that comes from a file or a pickle, which has forgotten its own. Raises PlanError for units that do
        not exist, a group of which none is left, or bundles (`Bundle`) where no model is there to ask; TraceError as
        `rehearse`."""
        check_graph(graph)
        graph = reaching(graph, model)
        if not isinstance(removed, Mapping):
            raise TypeError(f"removed must be a dict from group name to unit indices, got {type(removed).__name__}")
        if unknown := removed.keys() - {g.name for g in graph.groups}:
            raise PlanError(f"removed names {sorted(unknown)}, which are no groups of the graph")
        removed = {name: graph.group(name).indices(units, f"removed[{name!r}]") for name, units in removed.items()}
        removed = {g.name: removed[g.name] for g in graph.groups if len(removed.get(g.name, ()))}
        for name, units in removed.items():
            group = graph.group(name)
            if len(units) == group.units and name not in graph.bundled:
                raise PlanError(f"removed[{name!r}] leaves none of the group's {group.units} units")
        try:
            keep, after = graph.keep(removed), graph.after(removed)
        except PlanError:
            raise
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
        if not removed or (source := graph.source()) is None:
            return plan
        rehearse(source, plan)
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
        counts: dict[str, tuple[int, int]] = {}
        bundle_of, kept = self.graph.bundle_of if self.graph is not None else {}, self.kept
        for name, size in self.units.items():
            before, after = counts.get(bundle_of.get(name, name), (0, 0))
            counts[bundle_of.get(name, name)] = before + size, after + kept[name]
        totals = {
            "all groups": (sum(self.units.values()), sum(kept.values())),
            "parameters": self.params,
            "FLOPs": self.flops,
        }
        every = (*counts.items(), *totals.items())
        rows = [(name, before, after, f"{1 - after / max(before, 1):.1%}") for name, (before, after) in every]
        return text_table(("group", "units", "kept", "gone"), rows)

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

    __hash__ = None  # type: ignore[assignment]

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
    model, graph = check_module(model, "rehearse(model, plan)"), plan.graph
    if graph is None:
        raise PlanError("the plan comes from a file or a pickle, without its graph: PrunePlan.of(graph, plan.removed) has one")
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
    model = check_module(model, "diff(model, plan)")
    if not isinstance(plan, PrunePlan):
        raise TypeError(f"plan must be a PrunePlan, got {type(plan).__name__}: diff(model, plan)")
    there = named_shapes(model)
    before = {**there, **plan.shapes}
    after = {**there, **{name: plan.shape_after(name) for name in plan.shapes}}
    if there not in (before, after):
        name = next(n for n in plan.shapes if there.get(n) != after[n])
        sizes = f"{there.get(name)}, not {before[name]} or {after[name]}"
        raise PlanError(f"the plan does not fit model, neither before nor after: {name!r} has shape {sizes}")
    rows, name_at, parameters = [], holders(model), [name for name, _ in model.named_parameters()]
    totals = [sum(math.prod(shapes[name]) for name in parameters) for shapes in (before, after)]
    for prefix, module in model.named_modules():
        here = (f"{prefix}.{local}".lstrip(".") for local, _ in module.named_parameters(recurse=False, remove_duplicate=False))
        names = [name_at[place] for place in here if place in name_at]
        counts = [sum(math.prod(shapes[name]) for name in names) for shapes in (before, after)]
        if any(name in plan.shapes for name in names):
            largest = max(names, key=lambda name: math.prod(before[name]))
            weights = ("x".join(map(str, shapes[largest])) for shapes in (before, after))
            rows.append((prefix or "the model", type(module).__name__, *weights, *(f"{count:,}" for count in counts)))
    rows.append(("all", type(model).__name__, "", "", *(f"{total:,}" for total in totals)))
    return text_table(("module", "type", "weight before", "after", "parameters before", "after"), rows)
