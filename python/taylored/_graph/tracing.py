"""Find out which channels of a model live and die together.

`trace` gives every dimension of every parameter and buffer fresh labels and runs the model once with them; what is connected in
the end is one unit. Comes in: a module and example inputs. Goes out: a `ChannelGraph`.
"""

import dataclasses
import dis
import itertools
import types
import warnings

import torch
from torch import nn

from taylored._errors import TraceError
from taylored._graph.bundles import needless_ties, with_bundles
from taylored._graph.components import Traced, graph_of
from taylored._graph.mode import VALUES, label_all, looks_at_data, run_pass, stand_ins_of
from taylored._graph.rehearsal import ModelRehearser, Rehearsal
from taylored._graph.rows import row_orders
from taylored._graph.tracer import Tracer
from taylored._graph.values import ChannelGraph
from taylored._modules import Inputs, as_arguments, check_module, named_tensors, two_examples
from taylored._torch_compat import OpOverload


class LooksAtData(Exception):
    """With fewer channels the model looks at its data, of which there is none."""


def trace(model: nn.Module, example_inputs: Inputs, *, fully_connected: bool = False) -> ChannelGraph:
    """Find the units of a model: what can be removed, together with what, and what it costs.

    The model runs once on the meta device, in eval mode (and in training mode too if that reaches parameters which
    eval mode does not, such as auxiliary heads); nothing about it changes. A model that looks at its data runs for
    real instead: at first with convolutions and matrix products that give their bias, as if no feature were there;
    where that fails, or leaves parameters unused, with all that they compute. example_inputs: one tensor, a tuple of
    positional or a dict of keyword arguments. fully_connected: also make the outputs of linear layers on [N, features]
    removable; by default, as in the paper, only filters are (and the outputs of linear layers that are applied at every
    position).

    Raises TraceError if the model does not run on the example inputs, naming the line where it fails; TypeError for what is no
    module, or scripted.
    """
    model = check_module(model, "trace(model, example_inputs)")
    _refuse(model)
    args, kwargs = as_arguments(example_inputs)
    levels: tuple[str, ...] = VALUES
    with torch.inference_mode(False):  # in inference mode operators arrive whole, convolutions and linear layers unseen
        while True:
            traced, problems = _run(model, args, kwargs, fully_connected, levels)
            try:
                graph = _graph_of(traced)
                break
            except LooksAtData:  # with fewer channels; as it is, it remembers what it saw
                levels = levels[levels.index(traced.tracer.values) + 1 :]
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    return graph


# Modules that drop or add noise in training mode, and do nothing to channels.
LIBRARIES_OF_LAYERS = ("torch.", "torchvision.ops", "timm.layers")


def _trains_otherwise(model: nn.Module) -> bool:
    """Whether a module's forward asks in which mode it is: what it does in training mode alone may tie channels, too."""
    classes = {type(module) for module in model.modules()}
    forwards = (getattr(cls.forward, "__code__", None) for cls in classes if not cls.__module__.startswith(LIBRARIES_OF_LAYERS))
    return any(code is not None and "training" in code.co_names and _branches_on_training(code) for code in forwards)


def _branches_on_training(code: types.CodeType) -> bool:
    """Whether code decides by an attribute `training`, and does not hand it on alone, as to dropout."""
    steps = list(dis.get_instructions(code))
    return any(
        step.argval == "training" and ("JUMP" in after.opname or after.opname in ("TO_BOOL", "UNARY_NOT", "COPY"))
        for step, after in itertools.pairwise(steps)
    )


def _with_rows(graph: ChannelGraph, traced: Traced) -> ChannelGraph:
    """The graph that knows whose rows its consumers see, where those of a group see others."""
    evaluation, calls = graph.passes[0], traced.tracer.applications
    mixed = [group for group in graph.groups if len({calls[name][0].rows for name in group.inputs}) > 1]
    if not mixed:
        return graph
    consumers = [name for group in graph.groups for name in group.inputs]
    orders = dict.fromkeys((name for group in mixed for name in group.inputs), (0, "unknown"))
    if evaluation.values == "none":
        stand_ins = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in traced.tensors.items()}
        orders = row_orders(traced.model, stand_ins, evaluation, consumers)
    layers = {
        name: dataclasses.replace(layer, rows=orders[name][0], order=orders[name][1]) if name in orders else layer
        for name, layer in graph.layers.items()
    }
    return dataclasses.replace(graph, layers=layers)


def _graph_of(traced: Traced) -> ChannelGraph:
    """The graph, when the model was seen to run without one unit of each group."""
    model, search = traced.model, True
    needless = needless_ties(traced, graph_of(traced)) if traced.ties.size else None
    while True:
        graph = graph_of(traced) if needless is None else traced.untied(needless, bundled=False)
        graph = dataclasses.replace(graph, rehearser=ModelRehearser(model))
        bundled = with_bundles(traced, graph) if search and needless is None else None
        graph, search = bundled or graph, bundled is not None
        if not (found := _hard_coded(model, graph, traced.tracer.places_matter)):
            return _with_rows(graph, traced)
        for reason in set(found.values()):  # a component is one of its labels
            traced.tracer.freeze(torch.tensor([c for c, why in found.items() if why == reason]), reason)


def _refuse(model: nn.Module) -> None:
    """Raises for what cannot be traced or cut, before anything is touched: TypeError for what is no plain module of plain
    tensors, TraceError for what was made of one."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must not be scripted: trace and prune the original, script what is left of it")
    for name, module in model.named_modules():
        kind = type(module)
        if any(cls.__name__ == "FSDPModule" for cls in kind.__mro__):
            raise TraceError(
                f"{name or 'the model'!r} is sharded by fully_shard: trace and prune before fully_shard, then shard it"
            )
        if "quantized" in kind.__module__.split(".") and not kind.__module__.startswith("torch.ao.nn.qat"):
            raise TraceError(f"the weights of {name!r} ({kind.__name__}) are quantized: prune first, then quantize")
        if isinstance(module, torch.fx.GraphModule) and any(isinstance(node.target, OpOverload) for node in module.graph.nodes):
            raise TraceError(
                f"{name or 'the model'!r} is an exported program: trace and prune the original, export what is left of it"
            )
    for name, tensor in named_tensors(model).items():
        if type(tensor.detach()) is not torch.Tensor:
            kind = type(tensor.detach())
            raise TypeError(
                f"{name!r} is a {kind.__module__}.{kind.__name__}, no plain tensor: trace and prune the model before its "
                "weights are sharded, quantized or otherwise wrapped"
            )


def _run(model, args, kwargs, fully_connected, levels) -> tuple[Traced, list[str]]:
    """What the model did, in a run that computes no more than it must, and what a user should know of it."""
    tensors = named_tensors(model)
    found: tuple[Traced, list[str], list[str]] | None = None
    failure: TraceError | None = None
    for values in levels[:1] if any(t.is_meta for t in tensors.values()) else levels:
        try:
            traced, unseen, problems = _run_with(values, model, tensors, args, kwargs, fully_connected)
        except TraceError as error:
            error.__cause__, failure = error.__cause__ or failure, error
            continue
        found = traced, unseen, problems
        if values != "some" or not unseen:
            break
    if found is None:
        assert failure is not None
        raise failure
    traced, unseen, problems = found
    if unseen:
        problems.append(f"the forward pass never used {unseen}; they are left as they are")
    return traced, problems


def _run_with(values, model, tensors, args, kwargs, fully_connected):
    tracer = Tracer(model, fully_connected, values)
    stand_ins = stand_ins_of(tracer, model, tensors)
    offsets = label_all(tracer, stand_ins)
    passes = [run_pass(model, stand_ins, tracer, False, args, kwargs)]
    costs, tracer.costs = tracer.costs, []
    unseen, problems = [name for name, _ in model.named_parameters() if id(stand_ins[name]) not in tracer.seen], []
    if unseen or _trains_otherwise(model):
        noted = tracer.mark()
        try:
            passes.append(run_pass(model, stand_ins, tracer, True, *two_examples(args, kwargs)))
        except TraceError as error:
            tracer.back_to(noted)
            if unseen:  # otherwise a detector, which wants targets then
                problems.append(f"training mode could not be traced ({error})")
        unseen = [name for name in unseen if id(stand_ins[name]) not in tracer.seen]
    return Traced(model, tensors, tracer, tuple(passes), offsets, costs), unseen, problems


def _hard_coded(model, graph: ChannelGraph, places_matter: bool) -> dict[int, str]:
    """The components that the model does not run without as it should, and why: a forward that hard-codes their number, or
    computes with it. places_matter: labels can tell more than shapes do, of which half as much is to be computed."""

    def without(parts, labelled):
        """None, or what goes wrong when the parts (group name -> units) are gone, who is to blame, and who may be."""
        removed = {name: torch.arange(count) for part in parts for name, count in part.items()}
        costs = graph.flops_without(removed)
        for traced in graph.passes:
            mode = Rehearsal(model, graph, removed, labelled, costs)
            try:
                mode.run(model, traced)
            except TraceError as error:
                if traced.values != VALUES[-1] and looks_at_data(error) and not any(d.is_meta for d in model.parameters()):
                    raise LooksAtData from error
                return str(error), mode.blamed, mode.suspects
        return None

    def culprits(parts, labelled=False) -> list[tuple[dict[str, int], str]]:
        """Those of the parts without which it goes wrong, and why: by halving, for there are few of them."""
        if (wrong := without(parts, labelled)) is None:
            return []
        if len(parts) == 1:
            return [(parts[0], wrong[0])]
        half = len(parts) // 2
        return culprits(parts[:half], labelled) + culprits(parts[half:], labelled) or [(part, wrong[0]) for part in parts]

    # One unit of each group, and what the bundles lose first. Where a single one is left there is nothing to label it by.
    parts: list[dict[str, int]] = []
    last: list[dict[str, int]] = []
    bundled = graph.bundled
    for g in graph.groups:
        if g.name not in bundled:
            (parts if g.units > 2 else last).append({g.name: 1})
    if graph.bundles:
        _, narrow = next(graph.narrower())
        parts.append({name: count for name, count in graph.lost_units(narrow).items() if count})
    if not places_matter and (not parts + last or without(parts + last, labelled=False) is None):
        return {}
    near: list[dict[str, int]] = []  # who is asked first
    fault = without(parts, labelled=True) if parts else None
    if fault is None and last:
        parts, near, fault = parts + last, last, without(parts + last, labelled=True)
    if fault is None:
        return {}
    reason, blamed, suspects = fault
    members = {g.name: graph.members(g) for g in graph.groups}
    if blamed & set(
        itertools.chain.from_iterable(members.values())
    ):  # all units of a group are alike; who stays anyway is no culprit
        return dict.fromkeys(blamed | {c for mine in members.values() if blamed & set(mine) for c in mine}, reason)
    near = near or [part for part in parts if any(suspects & set(members[name]) for name in part)]
    found = (near and culprits(near)) or culprits(parts) or culprits(parts, labelled=True) or [(part, reason) for part in parts]
    return {c: why for part, why in found for name in part for c in members[name]}
