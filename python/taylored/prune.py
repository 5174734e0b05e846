"""The loop: train while scoring, remove the least important units, go on until the budget is met, fine-tune.

`prune` runs in the user's process with the user's model, loader, loss and optimizer. Every round may be written to a
checkpoint, from which the same call resumes. arXiv:1611.06440, section 2.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from taylored.checkpoint import CheckpointError, difference, load_all, save
from taylored.compact import compact
from taylored.plan import PrunePlan, make_plan, named_entries
from taylored.score import TaylorScorer
from taylored.trace import ChannelGraph, data_parallel, in_mode, run_on, trace


@dataclasses.dataclass(frozen=True, eq=False)
class PruneResult:
    """plan: against the original model. graph: the original's. history: one dict per round and per final epoch."""

    plan: PrunePlan
    graph: ChannelGraph
    history: list[dict]

    def __repr__(self):
        return f"PruneResult({self.plan!r}, accuracy={self.history[-1].get('accuracy') if self.history else None})"


def prune(
    model: nn.Module,
    train_loader: Iterable,
    loss_fn: Callable,
    optimizer: torch.optim.Optimizer,
    example_inputs,
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    remove_units: int | None = None,
    rounds: int = 10,
    round_epochs: float = 1.0,
    final_epochs: int = 5,
    evaluate: Callable[[nn.Module], float] | None = None,
    scheduler=None,
    reduction: str = "abs",
    normalize: str = "l2",
    flops_weight: float = 1e-3,
    round_to: int = 1,
    min_units: int | dict[str, int] = 1,
    max_ratio: float | dict[str, float] = 1.0,
    ignore=(),
    also=(),
    freeze_statistics: bool = False,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    log: Callable[[dict], None] | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune a model to a budget while it trains; the model, its optimizer and its averages shrink in place.

    train_loader yields (inputs, targets); the loss is loss_fn(model(inputs), targets), a mean over the batch; a tuple
    of inputs is model(*inputs), a dict model(**inputs). Exactly one of target_flops, target_params (what remains: a
    fraction of the original, or an absolute number) and remove_units.
    Each of `rounds` rounds trains `round_epochs` epochs with scores in the backward pass, then removes its share;
    `final_epochs` follow. evaluate(model) -> accuracy runs in eval mode without gradients before the first round, after
    every round and after every final epoch. scheduler: stepped after every update (see `updates`). normalize,
    flops_weight, round_to, min_units, max_ratio, ignore: as for `make_plan`; reduction: as for `TaylorScorer`; also: as
    for `compact`. freeze_statistics: batch norm uses its running statistics while it trains and leaves them as they are,
    its weight and bias learn on: for fine-tuning on data too few to estimate statistics anew. checkpoint: a file, written
    atomically after every round and final epoch; resume: start from it if it is there, given the original model. wrap:
    what the model is trained in, `DistributedDataParallel` or `torch.compile`; called with the model at the start and after
    every cut. With DistributedDataParallel every process calls prune, with its own share of the data; scores are summed,
    the plans compared, and the first process writes the checkpoint. log is called with each entry of the history.

    Raises, before anything is trained, ValueError for unusable arguments, PlanError for a budget that cannot be met and
    TraceError for a model that cannot run with fewer channels; FloatingPointError when the loss is not finite: that
    step is not taken, and the last checkpoint stands.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if data_parallel(model) is not None:
        raise ValueError("model is wrapped in DistributedDataParallel: give the model itself, and wrap=DistributedDataParallel")
    device = _device(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer has none of the model's parameters that require a gradient: was it made for another model?")
    steps = _length(train_loader)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=, the file to go on from")
    if rounds < 1 or round_epochs <= 0 or final_epochs < 0:
        raise ValueError(
            f"rounds must be >= 1, round_epochs > 0, final_epochs >= 0; got {rounds}, {round_epochs}, {final_epochs}"
        )
    if checkpoint is not None and not os.access(Path(checkpoint).absolute().parent, os.W_OK):
        raise ValueError(f"checkpoint={str(checkpoint)!r}: its folder does not exist or cannot be written to")
    graph = trace(model, example_inputs)
    options = {"normalize": normalize, "flops_weight": flops_weight, "round_to": round_to}
    options |= {"min_units": min_units, "max_ratio": max_ratio, "ignore": ignore}
    budget = _Budget(graph, rounds, target_flops, target_params, remove_units)
    any_scores = {g.name: torch.ones(g.units) for g in graph.groups}
    make_plan(graph, any_scores, **budget.of_round(rounds, graph), **options)  # whether the goal can be met
    TaylorScorer(model, graph, reduction=reduction)

    settings = {**budget.given, **options, "rounds": rounds, "round_epochs": round_epochs, "reduction": reduction}
    settings |= {"ignore": sorted(name for _, name in named_entries(graph, ignore))}
    settings = json.loads(json.dumps(settings | {"freeze_statistics": freeze_statistics}))  # as it comes back from the file
    plan, history, done = PrunePlan.of(graph, {}), [], 0
    current = graph
    if resume and checkpoint is not None and Path(checkpoint).exists():
        plan, history, done = _resume(checkpoint, model, optimizer, scheduler, settings)
        current = graph.after(plan.removed)
    wrap = wrap or (lambda model: model)
    runner = wrap(model)

    def finished(event, loss, since, **more):
        event = {"event": event, "flops": current.flops, "params": current.params, "units": current.units, "loss": loss, **more}
        if evaluate is not None:
            event["accuracy"] = _evaluate(model, evaluate)
        event["seconds"] = round(time.perf_counter() - since, 3)
        history.append(event)
        if checkpoint is not None and _is_first(runner):
            _save(checkpoint, model, plan, history, optimizer, scheduler, settings)
        if log is not None:
            log(event)

    if not history:
        finished("start", None, time.perf_counter())
    batches = _cycle(train_loader)

    def train(updates, title):
        model.train()
        if freeze_statistics:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return _train(runner, batches, updates, loss_fn, optimizer, scheduler, device, title, progress)

    for step in range(done, rounds + final_epochs):
        since = time.perf_counter()
        if step < rounds:
            with TaylorScorer(runner, current, reduction=reduction) as scorer:
                loss = train(max(1, round(round_epochs * steps)), f"round {step + 1}/{rounds}")
            scores = scorer.scores()
            cut = make_plan(current, scores, **budget.of_round(step + 1, current), **options)
            compact(runner, cut, optimizer=optimizer, also=also)
            runner = wrap(model)
            plan, current = plan.then(cut), current.after(cut.removed)
            told = {name: [float(f"{v:.6g}") for v in s.tolist()] for name, s in scores.items()}
            finished("round", loss, since, round=step + 1, kept=plan.kept, scores=told)
        else:
            loss = train(steps, f"fine-tune {step - rounds + 1}/{final_epochs}")
            finished("final_epoch", loss, since, epoch=step - rounds + 1)
    return PruneResult(dataclasses.replace(plan, graph=graph), graph, history)


def updates(train_loader, rounds: int, round_epochs: float, final_epochs: int) -> int:
    """How many optimizer steps `prune` takes: what a learning-rate schedule must span."""
    steps = _length(train_loader)
    return rounds * max(1, round(round_epochs * steps)) + final_epochs * steps


class _Budget:
    """The budget of each round: equal ratios from the original down to the target."""

    def __init__(self, graph, rounds, target_flops, target_params, remove_units):
        self.rounds, self.graph = rounds, graph
        self.given = {"target_flops": target_flops, "target_params": target_params, "remove_units": remove_units}
        self.given = {k: v for k, v in self.given.items() if v is not None}

    def of_round(self, number, current) -> dict:
        if len(self.given) != 1:
            return self.given  # make_plan says what is wrong
        ((name, target),) = self.given.items()
        if name == "remove_units":
            gone = self.graph.units - current.units
            return {name: target * number // self.rounds - gone if isinstance(target, int) else target}
        total = self.graph.flops if name == "target_flops" else self.graph.params
        if not isinstance(target, (int, float)):
            return self.given
        fraction = target if isinstance(target, float) and target <= 1 else target / total
        if not fraction > 0:
            return self.given
        return {name: max(1, math.floor(total * min(fraction, 1.0) ** (number / self.rounds)))}


def _train(model, batches, updates, loss_fn, optimizer, scheduler, device, title, progress) -> float:
    """Some updates; returns the mean loss."""
    total = 0.0
    with tqdm(total=updates, desc=title, disable=not progress, leave=False) as bar:
        for number in range(updates):
            batch = next(batches)
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError(f"train_loader must yield (inputs, targets), got {type(batch).__name__}")
            inputs, targets = batch
            inputs, targets = _to(inputs, device), _to(targets, device)

            def closure(inputs=inputs, targets=targets, number=number):
                loss = loss_fn(run_on(model, inputs), targets)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise FloatingPointError(f"{title}: the loss is {value} at update {number + 1}; the round is abandoned")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                return value

            if isinstance(optimizer, torch.optim.LBFGS):  # it alone may ask for the loss several times
                value = optimizer.step(closure)
            else:
                value = closure()
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
            total += value
            bar.update()
            bar.set_postfix(loss=f"{total / (number + 1):.4f}", refresh=False)
    return total / updates


@torch.no_grad()
def _evaluate(model, evaluate) -> float:
    with in_mode(model, training=False):
        accuracy = evaluate(model)
        if not isinstance(accuracy, (int, float, torch.Tensor)):
            raise TypeError(f"evaluate must return a number, got {type(accuracy).__name__}")
        return float(accuracy)


def _is_first(runner) -> bool:
    """Whether this process is the one that writes."""
    parallel = data_parallel(runner)
    return parallel is None or torch.distributed.get_rank(parallel.process_group) == 0


def _to(value, device):
    return tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), value)


def _device(model) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise ValueError(f"model must lie on one real device, its parameters are on {sorted(map(str, devices)) or 'none'}")
    return devices.pop()


def _length(loader) -> int:
    try:
        length = len(loader)
    except TypeError as error:
        raise ValueError("train_loader must have a length: prune counts epochs") from error
    if length == 0:
        raise ValueError("train_loader is empty: there is nothing to score on")
    return length


def _cycle(loader):
    while True:
        yielded = False
        for batch in loader:
            yielded = True
            yield batch
        if not yielded:
            raise ValueError("train_loader yields nothing: there is nothing to score on")


def _save(path, model, plan, history, optimizer, scheduler, settings):
    state = optimizer.state_dict()
    tensors = {"rng": torch.get_rng_state()}
    plain: dict[str, dict] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            elif isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):  # LBFGS's history
                tensors |= {f"optimizer/{index}/{key}/{number}": v for number, v in enumerate(value)}
            elif _is_json(value):
                plain.setdefault(str(index), {})[key] = value
    groups = [{k: v for k, v in group.items() if _is_json(v)} for group in state["param_groups"]]
    schedule = {k: v for k, v in scheduler.state_dict().items() if _is_json(v)} if scheduler is not None else None
    extra = {"history": history, "settings": settings, "scheduler": schedule}
    extra["optimizer"] = {"state": plain, "param_groups": groups}
    save(path, model, plan, extra=extra, tensors=tensors)


def _is_json(value) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _resume(path, model, optimizer, scheduler, settings):
    def accept(extra):
        if "history" not in extra:
            raise CheckpointError(f"{path} is a finished model, not a checkpoint of prune: there is nothing to resume")
        if other := difference(extra["settings"], settings):
            raise CheckpointError(f"{path} is of a run with other settings {other}")

    plan, extra, tensors = load_all(path, model, accept)
    state: dict[int, dict] = {int(i): dict(entry) for i, entry in extra["optimizer"]["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key, *number = name.split("/")
            entry = state.setdefault(int(index), {})
            if number:
                entry.setdefault(key, {})[int(number[0])] = tensor
            else:
                entry[key] = tensor
    for entry in state.values():
        entry |= {key: [value[n] for n in sorted(value)] for key, value in entry.items() if isinstance(value, dict)}
    groups = [
        {**new, **{k: tuple(v) if isinstance(new.get(k), tuple) else v for k, v in old.items()}}
        for new, old in zip(optimizer.state_dict()["param_groups"], extra["optimizer"]["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if scheduler is not None and extra["scheduler"] is not None:
        scheduler.load_state_dict({**scheduler.state_dict(), **extra["scheduler"]})
    torch.set_rng_state(tensors["rng"])
    history = extra["history"]
    return plan, history, sum(event["event"] in ("round", "final_epoch") for event in history)
