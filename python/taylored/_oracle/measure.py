"""The oracle: the true score of a unit, measured by zeroing it at its consumers (arXiv:1611.06440, section 2.2).

The paper runs the whole model once per unit. Here `Replay` runs again only what a unit changes, for many (example, unit)
pairs at once; examples on which the unit is zero anyway are left out.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from tqdm import tqdm

from taylored._files import digest
from taylored._graph.values import ChannelGraph, check_fit
from taylored._masking import zeroed
from taylored._modules import count_examples, in_mode, run_on, unwrapped
from taylored._oracle.difference import DifferenceReplay
from taylored._oracle.exact import Replay
from taylored._oracle.journal import Journal
from taylored._oracle.program import NotReplayable
from taylored._torch_compat import computes_in_bfloat16, tree_leaves, tree_map_only

PRECISIONS = {"float32": Replay, "bfloat16": DifferenceReplay}


def oracle(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable,
    loss_fn: Callable,
    *,
    mode: str = "abs",
    units: Mapping[str, Iterable[int] | torch.Tensor] | None = None,
    precision: str = "float32",
    memory: str | int = "1GiB",
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """The change of the mean loss over all examples when a unit is gone, for every unit: group name -> float64 [units].

    batches yields (inputs, targets), the same each time it is read: a list or a loader, no iterator. loss_fn(model(inputs),
    targets) is a mean over the batch. mode: "loss", the change with its sign; "abs", its absolute value, taken after averaging
    over all examples.
    units: group name -> indices of the units to measure (default: all); the others' entries are NaN. precision:
    "bfloat16" computes in that type and is faster; its rank agreement with float32 on a sample is printed. On a processor
    without such arithmetic it would be slower: float32 is used there, and a warning says so. memory: what the values kept
    and computed may take beside the model and the data, in bytes or as "512MiB", "2GiB". checkpoint: a file to which what
    is done is saved every few seconds, and from which the same call goes on. In a process group of torch.distributed
    every rank measures its share of the units, and all return the same.

    A model that cannot be exported with a dynamic batch runs whole, once per unit, masked at the consumers: slower, and
    said in a warning. Raises ValueError for unusable arguments (a graph of another model, or of this one before a cut),
    FloatingPointError if the loss is not finite.
    """
    if mode not in ("abs", "loss"):
        raise ValueError(f"mode must be 'abs' or 'loss', got {mode!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    name = type(batches).__name__
    if not isinstance(batches, Iterable) or not callable(loss_fn):
        raise TypeError(f"batches is a {name}, loss_fn a {type(loss_fn).__name__}: oracle(model, graph, batches, loss_fn)")
    if iter(batches) is batches:
        raise TypeError(f"batches is read several times, from the start: give a list or a loader, not a {name}")
    budget = parse_memory(memory)
    check_fit(graph, model)
    model = unwrapped(model)
    if precision == "bfloat16" and not computes_in_bfloat16(next(model.parameters()).device):
        warnings.warn("precision: this processor has no bfloat16 arithmetic; float32 is faster here and is used", stacklevel=2)
        precision = "float32"
    chosen = _chosen(graph, units)
    with in_mode(model, training=False), torch.inference_mode():
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("batches is empty: there is nothing to measure on")
        if not isinstance(first, (tuple, list)) or len(first) != 2:
            raise ValueError(f"batches must yield (inputs, targets), got {type(first).__name__}: a list of pairs is [(x, y)]")
        rank, world = _rank_and_world()
        mine = {name: indices[rank::world] for name, indices in chosen.items()}
        journal = Journal(checkpoint, rank, world, _fingerprint(model, chosen, precision, budget), mine, graph)
        show = progress and rank == 0
        try:
            replay = PRECISIONS[precision](model, graph, first[0])
        except NotReplayable as reason:
            warnings.warn(f"the oracle runs the whole model for each unit: {reason}", stacklevel=2)
            _measure_whole(model, graph, batches, loss_fn, mine, precision, journal, show)
        else:
            _measure(replay, batches, loss_fn, mine, budget, journal, show)
        journal.save()
    result = _collected(graph, chosen, journal, mode, world, next(model.parameters()).device)
    if precision != "float32" and rank == 0 and progress:
        print(_agreement(model, graph, first, loss_fn, chosen, budget))
    return result


def _collected(graph, chosen, journal, mode, world, device) -> dict[str, torch.Tensor]:
    """The sums of all ranks over the examples, NaN where nothing was measured."""
    result = {}
    for group in graph.groups:
        if group.name in chosen:
            total = journal.sums[group.name]
            if world > 1:
                shared = total.to(device if torch.distributed.get_backend() == "nccl" else "cpu")
                torch.distributed.all_reduce(shared)
                total = shared.cpu()
            units = chosen[group.name]
            change = torch.full((group.units,), math.nan, dtype=torch.float64)
            change[units] = total[units] / journal.examples
            if not change[units].isfinite().all():
                raise FloatingPointError(f"the loss is not finite without some unit of {group.name!r}")
            result[group.name] = change.abs() if mode == "abs" else change
    return result


def parse_memory(memory: str | int) -> int:
    """Bytes of "512MiB", "2GiB", "1.5GB" or an integer."""
    if isinstance(memory, int) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kKMGT]?)(i?)B?\s*", str(memory))
    if not found or not float(found[1]):
        raise ValueError(f"memory must be bytes, or text like '512MiB' or '2GiB', got {memory!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def _chosen(graph, units) -> dict[str, torch.Tensor]:
    if units is None:
        return {g.name: torch.arange(g.units) for g in graph.groups}
    if not isinstance(units, Mapping):
        raise TypeError(f"units must be a dict from group name to unit indices, got {type(units).__name__}")
    chosen = {}
    for name, indices in units.items():
        try:
            group = graph.group(name)
        except KeyError as error:
            raise ValueError(f"units names {name!r}, which is no group of the graph") from error
        chosen[name] = group.indices(indices, f"units[{name!r}]")
    return chosen


def _rank_and_world() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


# -- measuring ---------------------------------------------------------------------------------------------------------

CHUNK = 1 << 29  # bytes of a chunk of pairs beyond which more at once bring nothing


def _measure(replay: Replay, batches, loss_fn, mine, budget, journal, show) -> None:
    """Add to the journal's sums by how much each unit changes the loss of each example."""
    # What evaluation does not run changes nothing: the sums of a group without entries stay zero.
    tails = [replay.tails[name] for name, units in mine.items() if len(units) and replay.tails[name].entries]
    tails.sort(key=lambda tail: tail.ready)
    live = replay.live(tails)
    most = max(1, int(budget / 2 / max(max(live), 1)))  # examples at once: half of the budget is for the pairs
    with _progress(batches, sum(len(mine[t.group.name]) * t.flops for t in tails), show) as bar:
        for inputs, targets, number, size in _pieces(batches, most):
            journal.starts(number, size)
            base = _losses(loss_fn, replay.forward(inputs), targets)

            def visit(tail, values, targets=targets, size=size, base=base):
                units = mine[tail.group.name]
                which, examples = replay.active(tail, values, units).T.nonzero(as_tuple=True)
                room = min(max(budget - size * live[tail.ready] - tail.fixed, 0), CHUNK)
                step = max(1, int(room / tail.bytes))
                bar.update((len(units) * size - len(which)) * tail.flops)
                for start in range(0, len(which), step):
                    u, rows = which[start : start + step], examples[start : start + step]
                    if not journal.skips():
                        found, counts = u.unique_consecutive(return_counts=True)
                        ends = counts.cumsum(0)
                        segments = list(zip(units[found].tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))
                        output = replay.replay(tail, values, rows, segments)
                        change = _losses(loss_fn, output, _rows(targets, rows)) - base[rows]
                        journal.add(tail.group.name, units[u], change)
                    bar.update(len(u) * tail.flops)

            replay.forward(inputs, visit, tails)


def _measure_whole(model, graph, batches, loss_fn, mine, precision, journal, show) -> None:
    """The same by running the whole model once per unit, its consumers' inputs zeroed."""
    total = sum(map(len, mine.values()))

    def losses(inputs, targets):
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return _losses(loss_fn, run_on(model, inputs), targets)

    with _progress(batches, total, show) as bar:
        for inputs, targets, number, size in _pieces(batches, math.inf):
            journal.starts(number, size)
            base = losses(inputs, targets)
            for name, units in mine.items():
                for unit in units:
                    if not journal.skips():
                        with zeroed(model, graph, {name: unit[None]}):
                            change = losses(inputs, targets) - base
                        journal.add(name, unit.expand(size), change)
                    bar.update(size)


def _pieces(batches, most):
    """(inputs, targets, number, examples): the batches, those of more than `most` examples in parts."""
    number = 0
    for inputs, targets in batches:
        size = count_examples(inputs)
        parts = math.ceil(size / most) if math.isfinite(most) else 1
        for rows in torch.arange(size).chunk(parts):
            cut = (lambda value: value) if parts == 1 else (lambda value, rows=rows: _rows(value, rows))
            yield cut(inputs), cut(targets), number, len(rows)
            number += 1


def _rows(value, rows):
    return tree_map_only(torch.Tensor, lambda t: t[rows.to(t.device)] if t.ndim else t, value)


def _losses(loss_fn, output, targets) -> torch.Tensor:
    """The loss of each example by itself, float64 [N], on the CPU."""
    output = tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, output)

    def one(o, t):
        return loss_fn(*tree_map_only(torch.Tensor, lambda x: x[None], (o, t)))

    try:
        losses = torch.func.vmap(one)(output, targets)
    except (RuntimeError, ValueError):  # not every loss can be mapped: data-dependent code, targets that are no tensors
        each = (torch.tensor([i]) for i in range(count_examples(output)))
        losses = torch.stack([loss_fn(_rows(output, i), _rows(targets, i)) for i in each])
    if losses.ndim != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(losses.shape[1:])} for one example")
    return losses.double().cpu()


def _progress(batches, work, show):
    total = work * sum(len(tree_leaves(targets)[0]) for _, targets in batches) if show and hasattr(batches, "__len__") else None
    return tqdm(total=total, disable=not show, desc="oracle", unit="FLOP", unit_scale=True, leave=False)


def _fingerprint(model, chosen, precision, budget) -> str:
    units = {f"units of {name}": indices for name, indices in chosen.items()}
    return digest(f"{precision} {budget} {_rank_and_world()[1]}", {**model.state_dict(), **units})


def _agreement(model, graph, batch, loss_fn, chosen, budget, count=64) -> str:
    """Spearman's rho of the changes in bfloat16 with those in float32, on some units and one batch."""
    from scipy.stats import spearmanr

    every = [(name, int(u)) for name, units in chosen.items() for u in units]
    sample: dict[str, list[int]] = {}
    for name, unit in every[:: max(1, len(every) // count)]:
        sample.setdefault(name, []).append(unit)
    fast, exact = (
        oracle(model, graph, [batch], loss_fn, mode="loss", units=sample, precision=p, memory=budget, progress=False)
        for p in ("bfloat16", "float32")
    )
    a, b = (torch.cat([r[name][units] for name, units in sample.items()]).numpy() for r in (fast, exact))
    return f"bfloat16 ranks {len(a)} sampled units on one batch as float32 does with Spearman's rho {spearmanr(a, b)[0]:.4f}"
