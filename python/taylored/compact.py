"""Apply a plan: remove the planned units from a model, in place, and from all that goes with it.

Weights, gradients, buffers, the optimizer's state and moving averages lose the same slices; the Parameter objects stay
the same objects, so optimizers, schedulers and averages go on. `masked` does the same to a model's outputs without
removing anything, by zeroing the units at their consumers: removal is zeroing, and the tests hold the two together.
"""

import contextlib
import itertools
import math
import signal
import threading

import numpy as np
import torch
from torch import nn

from taylored import ops
from taylored.plan import PlanError, PrunePlan
from taylored.trace import (
    FIXED,
    ChannelGraph,
    LabelMode,
    TraceError,
    check_fit,
    line_at_fault,
    named_tensors,
    run_pass,
    slot_at,
    zeroed,
)


def masked(model: nn.Module, graph: ChannelGraph, plan: PrunePlan):
    """Within the context the model computes as if the plan's units were removed: zeros at their consumers' inputs."""
    return zeroed(model, graph, plan.removed)


def compact(model: nn.Module, plan: PrunePlan, optimizer=None, also=(), *, release: bool = False) -> None:
    """Remove a plan's units from the model, in place.

    optimizer: one torch.optim optimizer or a list; per-element state is compacted along with its parameter. also:
    moving-average copies: modules with the same names (or that hold such a one as `.module`, like AveragedModel and
    timm's ModelEma) or mappings from name to tensor. release: give the freed memory back, at the price of one copy;
    otherwise each tensor keeps its old storage, of which it uses the front.

    Everything is checked before anything is touched. Raises PlanError if the plan does not fit; TraceError if the model
    does not run with fewer channels, naming its line (a forward that hard-codes a channel count).
    """
    model = getattr(model, "_orig_mod", model)
    tensors = named_tensors(model)
    jobs = _jobs(plan, tensors, "model")
    attributes = _attributes(model, plan)
    for number, copy in enumerate([also] if isinstance(also, (nn.Module, dict)) else also):
        copy = _twin(copy, plan, number)
        jobs += _jobs(plan, copy if isinstance(copy, dict) else named_tensors(copy), f"also[{number}]")
        attributes += _attributes(copy, plan) if isinstance(copy, nn.Module) else []
    names = {id(t): name for name, t in tensors.items()}
    flat = []
    optimizers = [] if optimizer is None else optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    for opt in optimizers:
        more, segments = _optimizer_jobs(plan, opt, names)
        jobs += more
        flat += segments
    if plan.graph is not None:
        rehearse(model, plan)
    with _uninterrupted(), torch.no_grad():
        for tensors, dims in _alike(jobs):
            for tensor, data in zip(tensors, ops.compact_many_([t.data for t in tensors], dims), strict=True):
                _replace(tensor, data)
        for tensor, segments in flat:
            _compact_flat(tensor, segments)
        for opt in optimizers:
            if isinstance(opt, torch.optim.LBFGS):
                opt._numel_cache = None  # it remembers how many elements its parameters have
        for module, values in attributes:
            for name, value in values.items():
                setattr(module, name, value)
        if release:
            for tensor, _ in jobs:
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)


def _alike(jobs):
    """(tensors, dims): jobs that differ in nothing but values, such as a weight, its gradient and its momenta, are one."""
    together: dict[tuple, list] = {}
    for tensor, dims in jobs:
        cut = tuple((d, id(indices)) for d, indices in dims.items())
        key = (tensor.device, tensor.shape, tensor.stride(), tensor.element_size(), cut)
        together.setdefault(key, []).append((tensor, dims))
    return [([tensor for tensor, _ in same], same[0][1]) for same in together.values()]


def _replace(tensor, data):
    """Give a tensor other data of another shape. Where a graph of an earlier step is still alive (a loss that somebody
    kept), so is the parameter's gradient accumulator, with the old shape; autograd drops it on a change of dtype only."""
    if tensor.is_leaf and tensor.requires_grad:
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _jobs(plan, tensors, what) -> list[tuple[torch.Tensor, dict[int, torch.Tensor]]]:
    """(tensor, {dimension: kept indices}) for everything the plan touches, checked."""
    jobs, cuts = [], plan.cuts
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise PlanError(f"the plan does not fit {what}: it has no tensor {name!r}")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise PlanError(f"the plan does not fit {what}: {name!r} has shape {tuple(tensor.shape)}, the plan expects {shape}")
        dims = cuts[name]
        for d, indices in dims.items():
            ascending = len(indices) > 0 and bool((indices[1:] > indices[:-1]).all())
            if not ascending or indices[0] < 0 or indices[-1] >= shape[d]:
                raise PlanError(f"the plan's keep[{name!r}, {d}] must be ascending indices below {shape[d]}")
        jobs.append((_compactable(tensor, name, what), dims))
        if tensor.grad is not None:
            jobs.append((_compactable(tensor.grad, f"{name}.grad", what), dims))
    return jobs


def _compactable(tensor, name, what):
    if not ops.is_dense(tensor):
        raise PlanError(f"{what}: {name!r} has gaps or overlaps in memory (strides {tensor.stride()}); make it contiguous first")
    return tensor


def _twin(copy, plan, number):
    """The mapping, or the module that has the model's names: the copy itself or the one inside of it."""
    if not isinstance(copy, (nn.Module, dict)):
        raise TypeError(f"also[{number}] must be a module or a mapping from name to tensor, got {type(copy).__name__}")
    inside = getattr(copy, "module", None) if isinstance(copy, nn.Module) else None
    if isinstance(inside, nn.Module) and not all(name in named_tensors(copy) for name in plan.shapes):
        return inside
    return copy


def _optimizer_jobs(plan, optimizer, names):
    """State that has a parameter's shape, or that shape with some dimensions reduced to 1 (Adafactor's)."""
    jobs, flat = [], []
    cuts, parameters = plan.cuts, [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in names for p in parameters):
        raise PlanError("optimizer has none of the model's parameters: was it made for another model?")
    dims_of = {p: cuts.get(names.get(id(p)), {}) for p in parameters}
    if isinstance(optimizer, torch.optim.LBFGS):
        segments = [(tuple(p.shape), dims) for p, dims in dims_of.items()]
        total = sum(p.numel() for p in parameters)
        for value in itertools.chain.from_iterable(state.values() for state in optimizer.state.values()):
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() == total:
                    flat.append((tensor, segments))
        return jobs, flat
    for p, dims in dims_of.items():
        for key, value in optimizer.state.get(p, {}).items():
            if dims and isinstance(value, torch.Tensor) and value.ndim == p.ndim:
                fits = all(v in (s, 1) for v, s in zip(value.shape, p.shape, strict=True))
                mine = {d: indices for d, indices in dims.items() if value.shape[d] == p.shape[d]}
                if fits and mine:
                    jobs.append((_compactable(value, f"{key} of {names[id(p)]}", "optimizer"), mine))
    return jobs, flat


def _compact_flat(tensor, segments, chunk=1 << 17):
    """LBFGS keeps all parameters end to end in one vector: compact each stretch, then close the gaps."""
    source = target = 0
    for shape, dims in segments:
        stretch = tensor.data[source : source + math.prod(shape)]
        kept = ops.compact_(stretch.view(shape), dims).numel() if dims else stretch.numel()
        for start in range(0, kept, chunk):
            stop = min(start + chunk, kept)
            tensor.data[target + start : target + stop] = tensor.data[source + start : source + stop].clone()
        source += stretch.numel()
        target += kept
    tensor.data = tensor.data[:target]


def _attributes(model, plan) -> list[tuple[nn.Module, dict[str, int]]]:
    """What modules say about their own sizes, as it will be."""
    found = []
    for prefix, module in model.named_modules():
        names = (f"{prefix}.{local}" if prefix else local for local in ("weight", "running_mean"))
        name = next((name for name in names if name in plan.shapes), None)
        if name is None:
            continue
        old, new = plan.shapes[name], plan.shape_after(name)
        if isinstance(module, nn.modules.conv._ConvNd):
            groups = module.groups * new[0] // old[0] if module.groups > 1 else 1
            first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
            values = {first: new[0], second: new[1] * groups, "groups": groups}
        elif isinstance(module, nn.Linear):
            values = {"in_features": new[1], "out_features": new[0]}
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            values = {"num_features": new[0]}
        elif isinstance(module, nn.GroupNorm):
            values = {"num_channels": new[0], "num_groups": module.num_groups * new[0] // old[0]}
        elif isinstance(module, nn.PReLU):
            values = {"num_parameters": new[0]}
        else:
            continue
        found.append((module, values))
    return found


class Rehearsal(LabelMode):
    """Runs the model as it will be. Every slot has a label of its own, and a component of the trace: only slots of one
    component may meet. (The components themselves would not do for labels: where one unit is left they are all the same.)"""

    def __init__(self, module_names, graph, components):
        super().__init__(module_names)
        self.frozen = graph.frozen
        self.grouped = {name for name, layer in graph.layers.items() if layer.is_grouped}
        self.components = components  # by label; label FIXED is the last one's
        self.flops = 0

    def unite(self, a, b):
        a, b = self.components[a.reshape(-1)], self.components[b.reshape(-1)]
        if bool(((a != b) & (a != FIXED) & (b != FIXED)).any()):
            self.fail("channels that do not belong together meet")

    def freeze(self, label, reason):
        if any(int(c) not in self.frozen for c in self.components[label.reshape(-1)].unique() if c != FIXED):
            self.fail(reason)

    def counted(self, flops, dimensions):
        self.flops += flops

    def fail(self, why):
        raise TraceError(f"{line_at_fault()}: {why}")


def rehearse(model: nn.Module, plan: PrunePlan) -> None:
    """Run the planned model on the meta device: shapes, labels and FLOPs must come out as planned. Changes nothing.

    Raises TraceError with the file and line of the forward that does not follow its input's number of channels."""
    model = getattr(model, "_orig_mod", model)
    graph = plan.graph
    try:
        check_fit(graph, model)
    except ValueError as error:
        raise PlanError(f"the plan does not fit model: {error}") from error
    after = graph.after(plan.removed)
    attributes = _attributes(model, plan)
    before = [(module, {name: getattr(module, name) for name in values}) for module, values in attributes]
    try:
        for module, values in attributes:
            module.__dict__.update(values)
        # A dimension of size 1 carries no labels: where a single channel is left, shapes and FLOPs alone are compared.
        labelled = all(len(c) > 1 for c in after.components.values())
        ends = itertools.accumulate(len(c) for c in after.components.values())
        labels_of = {key: torch.arange(end - len(c), end) for (key, c), end in zip(after.components.items(), ends, strict=True)}
        components = torch.from_numpy(np.concatenate([*after.components.values(), [FIXED]]))
        for traced in graph.passes:
            mode = Rehearsal({id(m): name for name, m in model.named_modules()}, graph, components)
            mode.keep_real = traced.real
            stand_ins = {}
            for name, tensor in named_tensors(model).items():
                stand_ins[name] = torch.zeros(
                    after.shapes[name], dtype=graph.dtypes[name], device=tensor.device if traced.real else "meta"
                )
                labels = [
                    slot_at(labels_of[name, d], tensor.ndim, d) for d in range(tensor.ndim) if labelled and (name, d) in labels_of
                ]
                mode.set(stand_ins[name], [x for label in labels for x in label])
            try:
                outputs = run_pass(model, stand_ins, mode, traced.training, traced.args, traced.kwargs).outputs
            except TraceError as error:
                raise TraceError(
                    f"the model does not run with fewer channels (does its forward hard-code a channel count?): {error}"
                ) from error
            if outputs != traced.outputs:
                raise TraceError(
                    f"with fewer channels the model's outputs would change shape from {traced.outputs} to {outputs}: "
                    "does its forward hard-code a channel count?"
                )
            if not traced.training and mode.flops != plan.flops[1]:
                raise TraceError(f"with fewer channels the model takes {mode.flops} FLOPs, {plan.flops[1]} were planned")
    finally:
        for module, values in before:
            module.__dict__.update(values)


@contextlib.contextmanager
def _uninterrupted():
    """Put off Ctrl-C until nothing is half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = []
    previous = signal.signal(signal.SIGINT, lambda *a: caught.append(a))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            raise KeyboardInterrupt
