"""The loop: train while scoring, remove the least important units, go on until the budget is met, fine-tune.

`prune` runs in the user's process with the user's model, loader, loss and optimizer. Every round may be written to a
checkpoint, from which the same call resumes. arXiv:1611.06440, section 2.
"""

import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from taylored._checkpoint import difference, load_all, save
from taylored._compact import Averages, compact
from taylored._errors import CheckpointError
from taylored._graph.tracing import trace
from taylored._graph.values import ChannelGraph
from taylored._modules import Inputs, batch_norms, data_parallel, in_mode, run_on
from taylored._optimizers import is_json, parameters_of, rule_of, state_in_file, take_state
from taylored._plan import PrunePlan
from taylored._planning import Ignored, make_plan, named_entries
from taylored._residual import ResidualScorer
from taylored._score import TaylorScorer
from taylored._torch_compat import tree_map_only


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
    example_inputs: Inputs,
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    remove_units: int | None = None,
    rounds: int = 10,
    round_epochs: float = 1.0,
    final_epochs: int = 5,
    evaluate: Callable[[nn.Module], float] | None = None,
    scheduler: Any = None,
    criterion: str = "taylor",
    reduction: str = "abs",
    normalize: str = "l2",
    flops_weight: float = 1e-3,
    round_to: int = 1,
    min_units: int | dict[str, int] = 1,
    max_ratio: float | dict[str, float] = 1.0,
    ignore: Ignored = (),
    also: Averages = (),
    freeze_statistics: bool = False,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    verify: bool = True,
    mend: int = 8,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    log: Callable[[dict], None] | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune a model to a budget while it trains; the model, its optimizer and its averages shrink in place.

    train_loader yields (inputs, targets); the loss is loss_fn(model(inputs), targets), a mean over the batch; a tuple of inputs
    is model(*inputs), a dict model(**inputs). Exactly one of target_flops, target_params (what remains: a fraction of the
    original, or an absolute number) and remove_units. Each of `rounds` rounds trains `round_epochs` epochs with scores in the
    backward pass, then removes its share; `final_epochs` follow. evaluate(model) -> accuracy runs in eval mode without gradients
    before the first round, after every round and after every final epoch. scheduler: stepped after every update (see `updates`).
    normalize, flops_weight, round_to, min_units, max_ratio, ignore: as for `make_plan`; reduction: as for `TaylorScorer`; also:
    as for `compact`. criterion: "taylor", or "residual" (`ResidualScorer`), whose scores are compared per FLOP saved, without
    normalize and flops_weight. mend: at every cut, on the inputs of so many of the round's last batches (with "residual", on all
    of the round's), as `compact(mend=)` does; 0: not at all. freeze_statistics: batch norm uses its running statistics while it
    trains and leaves them as they are, its weight and bias learn on: for fine-tuning on data too few to estimate statistics anew.
    checkpoint: a file, written atomically after every round and final epoch; resume: start from it if it is there, given the
    original model. verify: prove every cut on up to four examples of the round's last batch before it is made, as
    `compact(verify=)` does. wrap: what the model is trained in, `DistributedDataParallel` or `torch.compile`; called with the
    model at the start and after every cut. With DistributedDataParallel every process calls prune, with its own share of the
    data; scores are summed, the plans compared, and the first process writes the checkpoint. log is called with each entry of the
    history.

    Raises, before anything is trained, ValueError for unusable arguments, PlanError for a budget that cannot be met and
    TraceError for a model that cannot run with fewer channels; FloatingPointError when the loss is not finite: that
    step is not taken, and the last checkpoint stands.
    """
    device = _device(model, optimizer)
    steps = _length(train_loader)
    if rounds < 1 or round_epochs <= 0 or final_epochs < 0:
        raise ValueError(
            f"rounds must be >= 1, round_epochs > 0, final_epochs >= 0; got {rounds}, {round_epochs}, {final_epochs}"
        )
    if criterion not in ("taylor", "residual"):
        raise ValueError(f"criterion must be 'taylor' or 'residual', got {criterion!r}")
    if not isinstance(mend, int) or mend < 0:
        raise ValueError(f"mend must be a number of batches, got {mend!r}")
    _check_checkpoint(checkpoint, resume)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, got {type(evaluate).__name__}")
    graph = trace(model, example_inputs)
    options: dict[str, Any] = {"normalize": normalize, "flops_weight": flops_weight, "round_to": round_to}
    options |= {"min_units": min_units, "max_ratio": max_ratio, "ignore": ignore, "per_flop": criterion == "residual"}
    budget = _Budget(graph, rounds, target_flops, target_params, remove_units)
    any_scores = {g.name: torch.ones(g.units) for g in graph.groups}
    make_plan(graph, any_scores, **budget.of_round(rounds, graph), **options)  # whether the goal can be met
    TaylorScorer(model, graph, reduction=reduction)

    settings = {**budget.given, **options, "rounds": rounds, "round_epochs": round_epochs, "reduction": reduction}
    settings |= {"criterion": criterion, "mend": mend}
    settings |= {"ignore": sorted(str(name) for _, name in named_entries(graph, ignore))}
    settings = json.loads(json.dumps(settings | {"freeze_statistics": freeze_statistics}))  # as it comes back from the file
    run = _Run(model, graph, optimizer, scheduler, wrap or _bare, evaluate, checkpoint, settings, log)
    run.start(resume)
    batches = _Batches(train_loader, device, max(1, mend))

    def train(updates, title):
        run.model.train()
        if freeze_statistics:
            for norm in batch_norms(model).values():
                norm.eval()
        return _train(run.runner, batches, updates, loss_fn, optimizer, scheduler, title, progress)

    for number in range(run.steps_done + 1, rounds + 1):
        since = time.perf_counter()
        batches.latest.clear()
        scorer: TaylorScorer | ResidualScorer = (
            TaylorScorer(run.runner, run.current, reduction=reduction)
            if criterion == "taylor"
            else ResidualScorer(run.runner, run.current)
        )
        with scorer:
            loss = train(max(1, round(round_epochs * steps)), f"round {number}/{rounds}")
        scores = scorer.scores()
        proof = batches.latest[-1] if verify else None
        seen = None if not mend else scorer if isinstance(scorer, ResidualScorer) else list(batches.latest)
        run.cut(make_plan(run.current, scores, **budget.of_round(number, run.current), **options), also, proof, seen)
        told = {name: [float(f"{v:.6g}") for v in s.tolist()] for name, s in scores.items()}
        run.finished("round", loss, since, round=number, kept=run.plan.kept, scores=told)
    for epoch in range(run.steps_done - rounds + 1, final_epochs + 1):
        since = time.perf_counter()
        loss = train(steps, f"fine-tune {epoch}/{final_epochs}")
        run.finished("final_epoch", loss, since, epoch=epoch)
    return PruneResult(dataclasses.replace(run.plan, graph=graph), graph, run.history)


def updates(train_loader, rounds: int, round_epochs: float, final_epochs: int) -> int:
    """How many optimizer steps `prune` takes: what a learning-rate schedule must span."""
    steps = _length(train_loader)
    return rounds * max(1, round(round_epochs * steps)) + final_epochs * steps


def _bare(model: nn.Module) -> nn.Module:
    """What the model is trained in where nothing else is asked for: itself."""
    return model


class _Run:
    """How far it is: the model and what it is trained in, the plan so far, the history; and the file that keeps all of it."""

    def __init__(self, model, graph, optimizer, scheduler, wrap, evaluate, checkpoint, settings, log):
        self.model, self.optimizer, self.scheduler, self.wrap = model, optimizer, scheduler, wrap
        self.evaluate, self.checkpoint, self.settings, self.log = evaluate, checkpoint, settings, log
        self.plan = PrunePlan.of(graph, {})
        self.current: ChannelGraph = graph
        self.history: list[dict] = []

    @property
    def steps_done(self) -> int:
        """Rounds and final epochs."""
        return sum(event["event"] in ("round", "final_epoch") for event in self.history)

    def start(self, resume: bool) -> None:
        if resume and Path(self.checkpoint).exists():
            self.plan, self.history = _resume(self.model, self.optimizer, self.scheduler, self.checkpoint, self.settings)
            self.current = self.current.after(self.plan.removed)
        self.runner = self.wrap(self.model)
        if not self.history:
            self.finished("start", None, time.perf_counter())

    def cut(self, plan: PrunePlan, also, proof, mend) -> None:
        compact(self.runner, plan, optimizer=self.optimizer, also=also, verify=proof, mend=mend)
        self.runner = self.wrap(self.model)
        self.plan, self.current = self.plan.then(plan), self.current.after(plan.removed)

    def finished(self, event: str, loss: float | None, since: float, **more) -> None:
        graph = self.current
        entry: dict[str, Any] = {"event": event, "flops": graph.flops, "params": graph.params, "units": graph.units, "loss": loss}
        entry |= more
        if self.evaluate is not None:
            entry["accuracy"] = _evaluate(self.model, self.evaluate)
        entry["seconds"] = round(time.perf_counter() - since, 3)
        self.history.append(entry)
        if self.checkpoint is not None and _is_first(self.runner):
            _save(self.model, self.plan, self.optimizer, self.scheduler, self.checkpoint, self.history, self.settings)
        if self.log is not None:
            self.log(entry)


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


def _train(model, batches, updates, loss_fn, optimizer, scheduler, title, progress) -> float:
    """Some updates; returns the mean loss."""
    total = 0.0
    with tqdm(total=updates, desc=title, disable=not progress, leave=False) as bar:
        for number in range(updates):
            inputs, targets = next(batches)

            def closure(inputs=inputs, targets=targets, number=number):
                loss = loss_fn(run_on(model, inputs), targets)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise FloatingPointError(f"{title}: the loss is {value} at update {number + 1}; the round is abandoned")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                return value

            if rule_of(optimizer).needs_closure:
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


def _device(model, optimizer) -> torch.device:
    """The model's, if model and optimizer are what they should be."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if data_parallel(model) is not None:
        raise ValueError("model is wrapped in DistributedDataParallel: give the model itself, and wrap=DistributedDataParallel")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise ValueError(f"model must lie on one real device, its parameters are on {sorted(map(str, devices)) or 'none'}")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not any(id(p) in trained for p in parameters_of(optimizer)):
        raise ValueError("optimizer has none of the model's parameters that require a gradient: was it made for another model?")
    return devices.pop()


def _check_checkpoint(checkpoint, resume) -> None:
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=, the file to go on from")
    if checkpoint is not None and not os.access(Path(checkpoint).absolute().parent, os.W_OK):
        raise ValueError(f"checkpoint={str(checkpoint)!r}: its folder does not exist or cannot be written to")


def _length(loader) -> int:
    try:
        length = len(loader)
    except TypeError as error:
        raise ValueError("train_loader must have a length: prune counts epochs") from error
    if length == 0:
        raise ValueError("train_loader is empty: there is nothing to score on")
    return length


class _Batches:
    """A loader's batches on the model's device, over and over."""

    def __init__(self, loader, device: torch.device, kept: int):
        self.loader, self.device, self.rest = loader, device, iter(())
        self.latest: collections.deque = collections.deque(maxlen=kept)  # inputs

    def __next__(self):
        batch = next(self.rest, None)
        if batch is None:
            self.rest = iter(self.loader)
            batch = next(self.rest, None)
        if batch is None:
            raise ValueError("train_loader yields nothing: there is nothing to score on")
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"train_loader must yield (inputs, targets), got {type(batch).__name__}")
        inputs, targets = (_to(part, self.device) for part in batch)
        self.latest.append(inputs)
        return inputs, targets


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def _save(model, plan, optimizer, scheduler, path, history, settings) -> None:
    state, tensors = state_in_file(optimizer)
    schedule = {k: v for k, v in scheduler.state_dict().items() if is_json(v)} if scheduler is not None else None
    extra = {"history": history, "settings": settings, "scheduler": schedule, "optimizer": state}
    save(model, plan, path, extra=extra, tensors=tensors | {"rng": torch.get_rng_state()})


def _resume(model, optimizer, scheduler, path, settings) -> tuple[PrunePlan, list[dict]]:
    def accept(extra):
        if "history" not in extra:
            raise CheckpointError(f"{path} is a finished model, not a checkpoint of prune: there is nothing to resume")
        if other := difference(extra["settings"], settings):
            raise CheckpointError(f"{path} is of a run with other settings {other}")

    plan, extra, tensors = load_all(model, path, accept)
    take_state(optimizer, extra["optimizer"], tensors)
    if scheduler is not None and extra["scheduler"] is not None:
        scheduler.load_state_dict({**scheduler.state_dict(), **extra["scheduler"]})
    torch.set_rng_state(tensors["rng"])
    return plan, extra["history"]
