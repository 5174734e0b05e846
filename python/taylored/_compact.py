"""Apply a plan: remove the planned units from a model, in place, and from all that goes with it.

Weights, gradients, buffers, the optimizer's state and moving averages lose the same slices; the Parameter objects stay
the same objects, so optimizers, schedulers and averages go on. To the model's outputs that is what zeroing the units at their
consumers is (`masked`), and the tests hold the two together.
"""

import contextlib
import dataclasses
import itertools
import signal
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from taylored import ops
from taylored._errors import PlanError, VerificationError
from taylored._graph.values import ChannelGraph, complement
from taylored._mend import Mending, mendings
from taylored._modules import Inputs, check_module, data_parallel, named_tensors, size_attributes, unwrapped
from taylored._moments import InputMoments, measure
from taylored._optimizers import Optimizers, as_optimizers, rule_of, state_tensors
from taylored._plan import PrunePlan, rehearse
from taylored._proof import Verification, prove
from taylored._torch_compat import compiled_from, forget_compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Removed:
    """What `compact(..., keep_removed=True)` cut off, for `restore`. A value: it can be copied, pickled and kept.

    plan: the plan that was applied. lost: for every tensor that was cut ("model: conv.weight", "optimizer[0]: exp_avg of
    conv.weight", ...) the slices taken out of each dimension, one dimension after the other. strides: what they were.
    sizes: what modules said of their own sizes. mended: of every tensor that was mended, what was left of it before and after.
    In a checkpoint of one's own: see `PrunePlan`.
    """

    plan: PrunePlan
    lost: dict[str, dict[int, torch.Tensor]]
    strides: dict[str, tuple[int, ...]]
    sizes: dict[str, dict[str, int]]
    mended: dict[str, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def __repr__(self):
        size = sum(t.nbytes for slices in self.lost.values() for t in slices.values())
        return f"Removed({self.plan!r}, {len(self.lost)} tensors, {size / 2**20:.1f} MiB)"


Averages = nn.Module | Mapping[str, torch.Tensor] | Sequence[nn.Module | Mapping[str, torch.Tensor]]


def compact(
    model: nn.Module,
    plan: PrunePlan,
    optimizer: Optimizers = None,
    also: Averages = (),
    *,
    release: bool = False,
    keep_removed: bool = False,
    verify: Inputs | None = None,
    graph: ChannelGraph | None = None,
    mend: Iterable[Inputs] | InputMoments | None = None,
    mend_frozen: bool = False,
) -> Removed | None:
    """Remove a plan's units from the model, in place.

    optimizer: one torch.optim optimizer or a list; per-element state is compacted along with its parameter. also:
    moving-average copies: modules with the same names (or that hold such a one, like AveragedModel, timm's ModelEma and
    the wrappers of torch) or mappings from name to tensor. release: give the freed memory back afterwards, at the price of a
    copy; otherwise each tensor keeps its old storage, of which it uses the front. keep_removed: return what was cut off, from
    which `restore` puts everything back.

    model: in its DistributedDataParallel wrapper every process calls this with the same plan (compared by digest), and wraps
    the model again afterwards, `model = DistributedDataParallel(model.module)`, for its buckets have the old sizes.

    verify: real inputs, of which up to four examples run through the masked model and a copy that is cut, in eval mode, before
    anything is cut: all outputs must be the same. graph: as traced, where the plan comes from a file. Raises VerificationError,
    naming the first layer at which they part; warns where outputs cannot be compared. In several processes all raise if one does.

    mend: batches of real inputs, without targets, or what was measured on such (`InputMoments`, `ResidualScorer`): layers that
    lose inputs are given weights with which the others say as much as they can of what the lost ones said, by least squares over
    the batches (`_mend.py`). Layers whose weights take no gradient are left alone, unless mend_frozen. It comes after the proof;
    how well each layer could be mended, on examples that the fit did not see, is in `InputMoments.residuals`. PlanError without a
    graph.

    An exception leaves everything as it was: what can be undone comes first, the move of memory last, in one call that checks
    all before it moves any, and signals wait until it is done. Raises PlanError if the plan does not fit. A plan was rehearsed
    when it was made; on another model than the one traced, or one with other modules since, it is rehearsed first: TraceError
    if the model does not run with fewer channels, naming its line (a forward that hard-codes a channel count).
    """
    if not isinstance(plan, PrunePlan):
        raise TypeError(f"plan must be a PrunePlan, got {type(plan).__name__}: compact(model, plan, optimizer)")
    parallel = data_parallel(model)
    if parallel is not None:
        _check_agreement(plan, parallel)
    work = _Work(plan, model, optimizer, also, cut=False)
    if plan.graph is not None and not (plan.rehearsed and plan.graph.source() is unwrapped(model)):
        rehearse(model, plan)
    if verify is not None:
        _prove(model, plan, verify, graph, parallel)
    mended = [] if mend is None else work.mended(_mendings(model, graph or plan.graph, plan, mend, mend_frozen))
    removed = work.removed(mended) if keep_removed else None
    moves, replaced = _cut(work.jobs)
    with _uninterrupted(), torch.no_grad():
        work.change(replaced, {name: values for name, _, values in work.modules}, moves)
        for _, tensor, _, after in mended:
            tensor.copy_(after)
        _outdate(parallel)
        if release:
            for tensor, _ in replaced:
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
    return removed


def _mendings(model, graph, plan, mend, frozen) -> list[Mending]:
    if graph is None:
        raise PlanError("the plan comes from a file or a pickle: to mend, give the graph that was traced, graph=")
    measured = mend if isinstance(mend, InputMoments) else measure(model, graph, mend)
    if measured.model is not unwrapped(model):
        raise ValueError("mend was measured on another model")
    return list(mendings(graph, plan, measured, frozen).values())


def verify(model: nn.Module, plan: PrunePlan, inputs: Inputs, graph: ChannelGraph | None = None) -> Verification:
    """Prove on real inputs that cutting the model by a plan is zeroing the plan's units, and cut nothing.

    inputs: as the model takes them, of which up to four examples are used. graph: as traced, where the plan comes from a file or
    a pickle. Returns how far outputs are apart, and in which precision; where they cannot be compared (a model that is random in
    eval mode), why. Raises VerificationError if they differ by more than rounding, PlanError without a graph."""
    model = check_module(model, "verify(model, plan, inputs)")
    if not isinstance(plan, PrunePlan):
        raise TypeError(f"plan must be a PrunePlan, got {type(plan).__name__}: verify(model, plan, inputs)")
    if (graph := graph or plan.graph) is None:
        raise PlanError("the plan comes from a file or a pickle: to verify it, give the graph that was traced, graph=")
    return prove(model, graph, plan, inputs, compact)


def _prove(model, plan, inputs, graph, parallel) -> None:
    """`verify`, with one verdict for all processes."""
    failure = None
    try:
        found = verify(unwrapped(model), plan, inputs, graph)
        if found.unproven:
            warnings.warn(f"the cut could not be verified: {found.unproven}", stacklevel=3)
    except Exception as error:
        failure = error
    if parallel is not None:
        verdicts: list[str | None] = [None] * dist.get_world_size(parallel.process_group)
        dist.all_gather_object(
            verdicts, None if failure is None else f"{type(failure).__name__}: {failure}", parallel.process_group
        )
        if failure is None and any(verdicts):
            number, what = next((n, v) for n, v in enumerate(verdicts) if v)
            raise VerificationError(f"the cut failed its verification in process {number}: {what}", float("nan"), None)
    if failure is not None:
        raise failure


def restore(model: nn.Module, removed: Removed, optimizer: Optimizers = None, also: Averages = ()) -> None:
    """Undo `removed = compact(model, plan, optimizer, also, keep_removed=True)`, given the same arguments.

    What was cut off comes back as it was, what was kept stays as it is: all is exactly as before the cut if nothing was
    trained in between. Gradients and optimizer state that are gone by now stay so; in those that are new the slices that
    come back are zero. (LBFGS starts its history anew if it has stepped.) Several cuts are undone last one first.

    Raises PlanError, with nothing touched, if the model is not as that cut left it, or an optimizer or average is missing.
    """
    if not isinstance(removed, Removed):
        raise TypeError(f"removed must be what compact(..., keep_removed=True) returned, got {type(removed).__name__}")
    work = _Work(removed.plan, model, optimizer, also, cut=True)
    if missing := {name.partition(":")[0] for name in removed.lost} - work.given:
        raise PlanError(f"{', '.join(sorted(missing))} was compacted with the model, but is not given to restore")
    stale = [job for job in work.jobs if job.owner is None and job.name not in removed.lost]
    unmended = work.unmended(removed)
    whole = [(job.tensor, _put_back(job, removed, unmended)) for job in work.jobs if job not in stale]
    cut = {id(job.tensor) for job in work.jobs}
    whole += [(tensor, values) for tensor, values in unmended.values() if id(tensor) not in cut]
    with _uninterrupted(), torch.no_grad():
        work.change(whole, removed.sizes)
        for opt in work.optimizers:
            if stale:
                rule_of(opt).restart(opt)
        _outdate(data_parallel(model))


def _check_agreement(plan, parallel):
    """Every process must cut the same: one that did not would train another model, and the next reduction would hang or fail."""
    digests = [None] * dist.get_world_size(parallel.process_group)
    dist.all_gather_object(digests, plan.digest, group=parallel.process_group)
    if len(set(digests)) > 1:
        raise PlanError(f"the processes do not have the same plan: their digests are {digests}; nothing was changed")


def _outdate(parallel):
    """What was made for the old sizes: compiled code, of which torch keeps no more than a few versions and would give up, and
    DistributedDataParallel's buckets."""

    def refuse(_module, _args):
        raise RuntimeError("the model was cut since it was wrapped: wrap it again, model = DistributedDataParallel(model.module)")

    forget_compiled()
    if parallel is not None:
        parallel.register_forward_pre_hook(refuse)


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A tensor to be cut as the plan cuts `owner`; None: a vector of all parameters. dims: dimension -> kept indices."""

    name: str
    owner: str | None
    tensor: torch.Tensor
    dims: dict[int, torch.Tensor]


class _Work:
    """All that goes with a plan: the model's tensors and gradients, its averages, the state of its optimizers.

    cut: the plan was applied and is to be undone. To find it all is to check it all; nothing is changed."""

    def __init__(self, plan, model, optimizer, also, cut):
        model = unwrapped(model)
        tensors = named_tensors(model)
        self.jobs: list[_Job] = []
        self.tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        self.modules: list[tuple[str, nn.Module, dict[str, int]]] = []
        _check_indices(plan)
        if not isinstance(also, (nn.Module, dict, list, tuple)):
            raise TypeError(f"also must be a module, a mapping or a list of them, got {type(also).__name__}")
        copies = enumerate([also] if isinstance(also, (nn.Module, dict)) else also)
        after = {name: plan.shape_after(name) for name in plan.shapes}
        everything = {"model": model, **{f"also[{n}]": _average(copy, plan, f"also[{n}]") for n, copy in copies}}
        for what, one in everything.items():
            mine = tensors if one is model else one if isinstance(one, dict) else named_tensors(one)
            self.tensors[what] = mine
            self.jobs += _jobs(plan, mine, what, cut)
            if isinstance(one, nn.Module):
                self.modules += [(f"{what}: {name}", *found) for name, *found in size_attributes(one, plan.shapes, after)]
        names = {id(t): name for name, t in tensors.items()}
        self.optimizers = as_optimizers(optimizer)
        for number, opt in enumerate(self.optimizers):
            for name, *what in state_tensors(plan, opt, names):
                self.jobs.append(_job(f"optimizer[{number}]: {name}", *what))
        self.given = {*everything, *(f"optimizer[{n}]" for n in range(len(self.optimizers)))}
        self.plan = plan
        _check_memory([(job.name, job.tensor) for job in self.jobs], tensors)

    def sizes(self) -> dict[str, dict[str, int]]:
        return {name: {key: getattr(module, key) for key in values} for name, module, values in self.modules}

    def removed(self, mended) -> Removed:
        lost, strides = {job.name: _lost(job) for job in self.jobs}, {job.name: job.tensor.stride() for job in self.jobs}
        values = {name: (before.clone(), after) for name, _, before, after in mended}
        return Removed(self.plan, lost, strides, self.sizes(), values)

    def mended(self, mendings) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Name, tensor, its values as the cut would leave them, and as mending will."""
        found = []
        for what, tensors in self.tensors.items():
            for mending in mendings:
                for name, whole in mending.of(tensors).items():
                    pair = [tensors[name].detach(), whole]
                    for d, indices in self.plan.cuts.get(name, {}).items():
                        pair = [x.index_select(d, indices.to(x.device)) for x in pair]
                    found.append((f"{what}: {name}", tensors[name], *pair))
        return found

    def unmended(self, removed) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Name -> tensor, and its values without the mending: bit for bit as they were where nothing was trained since."""
        found = {}
        for name, (before, after) in removed.mended.items():
            what, _, local = name.partition(": ")
            tensor = self.tensors[what][local]
            now, before, after = tensor.detach(), before.to(tensor), after.to(tensor)
            found[name] = tensor, torch.where(now == after, before, now + (before - after))
        return found

    def change(self, data, sizes, moves=()):
        """Give tensors their data and modules their sizes, then move, which comes last for it alone cannot be undone."""
        before, sizes_before = [(tensor, tensor.data) for tensor, _ in data], self.sizes()
        try:
            for tensor, new in data:
                _replace(tensor, new)
            self._say(sizes)
            for tensors in moves:
                ops.compact_many_([tensor for tensor, _ in tensors], [keep for _, keep in tensors])
        except BaseException:
            for tensor, old in before:
                tensor.data = old
            self._say(sizes_before)
            raise

    def _say(self, sizes):
        for opt in self.optimizers:
            rule_of(opt).resized(opt)
        for name, module, _ in self.modules:
            for key, value in sizes[name].items():
                setattr(module, key, value)


def _lost(job) -> dict[int, torch.Tensor]:
    x, lost = job.tensor.detach(), {}
    for d, kept in job.dims.items():
        lost[d] = x.index_select(d, complement(kept, x.shape[d]).to(x.device))
        x = x.index_select(d, kept.to(x.device))
    return lost


def _put_back(job, removed, unmended) -> torch.Tensor:
    """The whole tensor, in new memory: the inverse of `_lost` and the cut."""
    _, x = unmended.get(job.name, (None, job.tensor.detach()))
    lost = removed.lost.get(job.name)
    for d in reversed(job.dims if lost is None else lost):
        kept = job.dims[d]
        size = removed.plan.shapes[job.owner][d] if lost is None else len(kept) + lost[d].shape[d]
        whole = x.new_zeros([size if i == d else s for i, s in enumerate(x.shape)]).index_copy_(d, kept.to(x.device), x)
        x = whole if lost is None else whole.index_copy_(d, complement(kept, size).to(x.device), lost[d].to(x))
    stride = removed.strides.get(job.name, ops.packed_strides(list(x.shape), job.tensor))
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def _cut(jobs):
    """How to cut: for each device what to move, (data, kept indices), and what every tensor is to be then, (tensor, data): the
    front of its own memory or, where its indices do not ascend, a copy."""
    vectors = {id(indices): indices for job in jobs for indices in job.dims.values()}
    ascending = {key: _ascends(indices.cpu().numpy()) for key, indices in vectors.items()}
    moves, replaced = {}, []
    for job in jobs:
        data = job.tensor.data
        if all(ascending[id(indices)] for indices in job.dims.values()):
            # those that differ in nothing but values, such as a weight, its gradient and its momenta, side by side
            like = (data.shape, data.stride(), data.element_size(), *((d, id(indices)) for d, indices in job.dims.items()))
            moves.setdefault(data.device, {}).setdefault(like, []).append((data, job.dims))
            replaced.append((job.tensor, ops.front(data, job.dims)))
        else:
            for d, indices in job.dims.items():
                data = data.index_select(d, indices.to(data.device))
            strides = ops.packed_strides(list(data.shape), job.tensor)
            replaced.append((job.tensor, data.new_empty_strided(data.shape, strides).copy_(data)))
    devices = sorted(moves, key=lambda device: device.type == "cpu")  # the last, for there no memory or launch can fail
    return [list(itertools.chain.from_iterable(moves[device].values())) for device in devices], replaced


def _replace(tensor, data):
    """Give a tensor other data of another shape. Where a graph of an earlier step is still alive (a loss that somebody
    kept), so is the parameter's gradient accumulator, with the old shape; autograd drops it on a change of dtype only."""
    if tensor.is_leaf and tensor.requires_grad:
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _jobs(plan, tensors, what, cut) -> list[_Job]:
    """What the plan changes of a model's tensors and their gradients, checked."""
    jobs, cuts = [], plan.cuts
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise PlanError(f"the plan does not fit {what}: it has no tensor {name!r}")
        tensor, expected = tensors[name], plan.shape_after(name) if cut else shape
        if tuple(tensor.shape) != expected:
            wants = "leaves" if cut else "expects"
            applied = not cut and tuple(tensor.shape) == plan.shape_after(name)
            advice = "it may have been applied already" if applied else "trace the model anew, as it is now"
            raise PlanError(
                f"the plan does not fit {what}: {name!r} has shape {tuple(tensor.shape)}, the plan {wants} {expected}; {advice}"
            )
        jobs.append(_job(f"{what}: {name}", name, tensor, cuts[name]))
        if tensor.grad is not None:
            jobs.append(_job(f"{what}: {name}.grad", name, tensor.grad, cuts[name]))
    return jobs


def _check_indices(plan):
    known = set()  # many dimensions share one vector
    for (name, d), indices in plan.keep.items():
        if (facts := (id(indices), plan.shapes[name][d])) not in known:
            i = np.sort(indices.cpu().numpy())  # of hundreds of short vectors, three times as fast as with torch
            if not len(i) or i[0] < 0 or i[-1] >= facts[1] or not _ascends(i):
                raise PlanError(f"the plan's keep[{name!r}, {d}] must be different indices below {facts[1]}")
            known.add(facts)


def _ascends(indices) -> bool:
    return bool((indices[1:] > indices[:-1]).all())


def _job(name, owner, tensor, dims) -> _Job:
    if tensor.layout != torch.strided or not ops.is_dense(tensor):
        strides = f"strides {tensor.stride()}" if tensor.layout == torch.strided else str(tensor.layout)
        raise PlanError(f"{name!r} has gaps or overlaps in memory ({strides}); make it contiguous first")
    return _Job(name, owner, tensor, dims)


def _check_memory(cut, tensors) -> None:
    """What is moved within its own memory must be alone there."""
    moved = {id(t) for _, t in cut}
    stretches = [
        (start := t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size(), start + t.nbytes, id(t) in moved, name)
        for name, t in [*cut, *((name, t) for name, t in tensors.items() if id(t) not in moved)]
        if t.layout == torch.strided and t.numel() and not t.is_meta
    ]
    ends = {True: (0, ""), False: (0, "")}  # moved -> the furthest end so far, and whose it is
    for start, end, moves, name in sorted(stretches):
        for (other_end, other), moved_too in ((ends[True], True), (ends[False], False)):
            if start < other_end and (moves or moved_too):
                raise PlanError(f"{other!r} and {name!r} share memory: let them be one and the same Parameter, or clone one")
        ends[moves] = max(ends[moves], (end, name))


def _average(copy, plan, what):
    """The mapping, or the module that has the model's names: the copy itself or the one inside of it."""
    if not isinstance(copy, (nn.Module, dict)):
        raise TypeError(f"{what} must be a module or a mapping from name to tensor, got {type(copy).__name__}")
    while isinstance(copy, nn.Module) and not plan.shapes.keys() <= named_tensors(copy).keys():
        inside = getattr(copy, "module", compiled_from(copy))
        if not isinstance(inside, nn.Module):
            break
        copy = inside
    return copy


@contextlib.contextmanager
def _uninterrupted():
    """Put off Ctrl-C, alarms and whatever other signals Python handles until nothing is half done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals do not arrive here
        return
    caught = []
    handlers = {number: handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda *arrived: caught.append(arrived))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in caught:
            handlers[number](number, frame)
