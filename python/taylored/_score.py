"""Score every unit while the model trains: activation times gradient, fused into the backward pass.

`TaylorScorer` puts a gate on the input of every consumer: an identity whose backward hands (input, gradient) to the
fused kernel. When a backward pass ends, the contributions of a unit's consumers are added up per example, reduced, and
accumulated. arXiv:1611.06440, equations 6 and 7.
"""

import functools

import torch
from torch import nn

from taylored import _gate, ops
from taylored._graph.values import ChannelGraph, check_fit
from taylored._modules import data_parallel, unwrapped
from taylored._torch_compat import current_backward, watch_hooks, when_backward_ends


class TaylorScorer:
    """Context manager: backward passes within it are scored; afterwards the model is as it was.

    reduction: "abs", the paper's mean over examples of |t|; "batch", |sum over the batch| (the walk-through's);
    "square", mean over examples of t^2 (Molchanov et al. 2019). t is the first-order change of one example's loss, over
    the number of positions of the unit's map. loss_reduction: "mean" if the loss is averaged over the batch, else "sum".

    model: given in its DistributedDataParallel wrapper, the processes' scores are added up, and each process must call
    `scores`; with "batch" a batch is one process's own.

    Scores are proportional to the loss that backward is called on: a GradScaler's constant factor cancels in the
    normalisation of `make_plan`. Works with weights that are frozen, and through several backward passes per step.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, reduction: str = "abs", loss_reduction: str = "mean"):
        if reduction not in ops.REDUCTIONS:
            raise ValueError(f"reduction must be one of {list(ops.REDUCTIONS)}, got {reduction!r}")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        check_fit(graph, model)
        if reduction != "batch":
            _check_rows(graph)
        self.model = unwrapped(model)
        self._parallel = data_parallel(model)
        self.graph = graph
        self.reduction = reduction
        self.loss_reduction = loss_reduction
        self._handles: list = []
        self.reset()
        self._consumers = tuple(dict.fromkeys(name for g in graph.groups for name in g.inputs))
        # Where the channels are the units, in order, nothing has to be gathered after a backward pass.
        self._in_order = {
            (g.name, name)
            for g in graph.groups
            for name, slots in g.inputs.items()
            if torch.equal(slots.flatten(), torch.arange(graph.layers[name].width))
        }

    def reset(self) -> None:
        """Forget all scores."""
        self._totals: dict[str, torch.Tensor] = {}
        self._examples: dict[str, int] = {}
        self._arrived: dict[int, dict[str, list[torch.Tensor]]] = {}
        self._positions: dict[str, int] = {}  # elements per example and channel, as seen

    def __enter__(self) -> "TaylorScorer":
        if self._handles:
            raise RuntimeError("this TaylorScorer is already active")
        active = [name for name in self._consumers if _gate.is_recorded(_gate.gate_key(self.model.get_submodule(name)))]
        if active:
            raise RuntimeError("another TaylorScorer is active on this model: leave it first")
        watch_hooks()
        for name in self._consumers:
            module = self.model.get_submodule(name)
            device, key = next(module.parameters()).device, _gate.gate_key(module)
            anchor, token = torch.zeros((), device=device, requires_grad=True), torch.zeros((), device=device)
            _gate.set_recorder(key, functools.partial(self._record, name, self.graph.layers[name].axis))
            self._handles.append((module.register_forward_pre_hook(_Gate(anchor, token, key, self._recomputed)), key))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle, key in self._handles:
            handle.remove()
            _gate.set_recorder(key, None)
        self._handles.clear()
        self._arrived.clear()
        watch_hooks()

    def _begin(self, task):
        """Called within a backward pass, by its number; when it ends, what has arrived is added up. One that fails never ends."""
        self._arrived[task] = {}
        when_backward_ends(functools.partial(self._finish, task))

    def _recomputed(self) -> int:
        """The backward pass within which a gate's forward runs, -1 if within none. Reentrant checkpointing runs a segment again,
        forward and backward, and the latter is a pass of its own: what it contributes belongs to the outermost one."""
        task = current_backward()
        if task == -1:
            self._arrived.clear()  # nothing is under way, what is left has failed
        elif not self._arrived:
            self._begin(task)
        return task if task in self._arrived else next(iter(self._arrived), -1)

    def _record(self, name, axis, x, g, task):
        """task: what `_recomputed` said when the gate ran."""
        if task == -1:
            task = current_backward()
            if task not in self._arrived:
                self._begin(task)
        layer = self.graph.layers[name]
        if layer.is_convolution and x.ndim != layer.ndim:
            raise RuntimeError(
                f"{name!r} got an input of {x.ndim} dimensions, {layer.ndim} were traced: give a batch of examples"
            )
        self._positions[name] = max(
            self._positions.get(name, 0), x.shape[2:].numel() if axis == 1 else x[..., 0].numel() // len(x)
        )
        t = ops.contribution(x.movedim(axis, 1), g.movedim(axis, 1))  # [N, C]
        self._arrived[task].setdefault(name, []).append(t)

    def _finish(self, task):
        """A backward pass has ended: add up each unit's consumers, example by example."""
        arrived = self._arrived.pop(task, {})
        for group in self.graph.groups:
            passes: dict[int, list[torch.Tensor]] = {}
            for name, slots in group.inputs.items():
                tensors = arrived.get(name, [])
                calls = self.graph.layers[name].calls
                calls = calls if len(tensors) % calls == 0 else len(tensors)
                for i, t in enumerate(tensors):
                    t = self.graph.layers[name].by_example(t).sum(1)
                    passes.setdefault(i // calls, []).append(self._units(group, name, t, slots))
            for tensors in passes.values():
                self._accumulate(group, tensors)

    def _units(self, group, name, t, slots):
        """[N, C] contributions of a consumer's channels -> [N, units] of the group's."""
        if t.shape[1] != self.graph.layers[name].width:
            raise RuntimeError(f"{name!r} lost channels while it was scored: leave `with TaylorScorer(...)` before compaction")
        if (group.name, name) in self._in_order:
            return t if slots.shape[1] == 1 else t.reshape(len(t), *slots.shape).sum(2)
        return t[:, slots.to(t.device)].sum(2)

    def _accumulate(self, group, tensors):
        examples = min(len(t) for t in tensors)
        # A consumer may see each example several times (frames folded into the batch): they belong together.
        tensors = [t if len(t) == examples else t.reshape(examples, -1, t.shape[1]).sum(1) for t in tensors]
        total = self._totals.get(group.name)
        if total is None:
            total = self._totals[group.name] = torch.zeros(group.units, dtype=torch.float64, device=tensors[0].device)
        scale = (examples if self.loss_reduction == "mean" else 1) / (group.positions or self._seen(group))
        ops.accumulate_(total, tensors, self.reduction, scale)
        self._examples[group.name] = self._examples.get(group.name, 0) + examples

    def _seen(self, group) -> int:
        """The positions of a group whose consumers ran on none while they were traced (a head without a box)."""
        return max(self._positions.get(name, 0) * slots.shape[1] for name, slots in group.inputs.items()) or 1

    def scores(self) -> dict[str, torch.Tensor]:
        """Group name -> float64 [units], on the CPU, averaged over all examples seen. Low means removable.

        Groups that no gradient reached (a head that only training mode runs) are left out. Raises RuntimeError if no
        backward pass was seen at all, FloatingPointError if a score is NaN or infinite."""
        device = next(self.model.parameters()).device
        sums = [self._totals.get(g.name, torch.zeros(g.units, dtype=torch.float64)).to(device) for g in self.graph.groups]
        examples = [self._examples.get(g.name, 0) for g in self.graph.groups]
        everything = torch.cat([*sums, torch.tensor(examples, dtype=torch.float64, device=device)])
        if self._parallel is not None:
            torch.distributed.all_reduce(everything, group=self._parallel.process_group)
        *sums, examples = everything.cpu().split([*(g.units for g in self.graph.groups), len(self.graph.groups)])
        if self.graph.groups and not examples.any():
            raise RuntimeError("no backward pass was scored: call loss.backward() within `with TaylorScorer(...)`")
        scores = {g.name: s / n for g, s, n in zip(self.graph.groups, sums, examples, strict=True) if n}
        for name, s in scores.items():
            if not s.isfinite().all():
                raise FloatingPointError(f"the scores of {name!r} are not finite: the loss or its gradient was NaN or infinite")
        return scores


def _check_rows(graph: ChannelGraph) -> None:
    """Contributions of an example are added up over a unit's consumers: it must be known which rows are whose."""
    for group in graph.groups:
        unknown = [name for name in group.inputs if graph.layers[name].order == "unknown"]
        if unknown and len(group.inputs) > 1:
            raise ValueError(
                f"{unknown[0]!r} sees other rows than one for each example, and whose they are is not known: what an example "
                f"contributes cannot be added up over the consumers of {group.name!r}; use reduction='batch'"
            )


class _Gate:
    """The hook on a consumer. A copy of the model, pickled or not, gets a hook that does nothing: it is not being scored."""

    def __init__(self, anchor, token, key, recomputed):
        self.anchor, self.token, self.key, self.recomputed = anchor, token, key, recomputed

    def __call__(self, _module, args):
        if not torch.is_grad_enabled():
            return None
        task = -1 if torch.compiler.is_compiling() else self.recomputed()
        return (_gate.gate(args[0], self.anchor, self.token, self.key, task), *args[1:])

    def __reduce__(self):
        return functools.partial, (_ungated,)


def _ungated(_module, _args):
    return None
