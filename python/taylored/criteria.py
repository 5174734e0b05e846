"""Every criterion by which units are ranked, each a function of one shape, and how well one agrees with the oracle.

`criterion(model, graph, batches, loss_fn)` gives group name -> float64 [units] on the CPU; low means removable. batches
yields (inputs, targets) on the model's device, the same at every iteration; loss_fn(model(inputs), targets) is a mean over
the batch. The model runs in eval mode, as the oracle runs it, and is left as it was found, gradients included. A group for
which a criterion does not exist is left out. `CRITERIA` lists them all, with what they cost.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from taylored import ops
from taylored._graph.values import ChannelGraph, Group, check_fit
from taylored._modules import batch_norms, count_examples, in_mode, run_on, still, unwrapped
from taylored._oracle.measure import oracle
from taylored._residual import ResidualScorer
from taylored._score import TaylorScorer

Scores = dict[str, torch.Tensor]
BINS = 8  # of equal frequency, into which mutual information sorts a unit's activations
PROBES = 16  # backward passes that the diagonal Hessian takes at most
HESSIANS = 2**22  # elements of the loss's Hessians that are there at a time: four examples' with 1000 classes


# -- from the gradient -------------------------------------------------------------------------------------------------


def taylor(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable, *, reduction: str = "abs") -> Scores:
    """First-order change of the loss, as `TaylorScorer` measures it (arXiv:1611.06440, equations 6 and 7).

    reduction: "abs", the paper's mean of |t|; "batch", |sum over a batch|; "square", mean of t^2 (arXiv:1906.10771)."""
    return _scored(TaylorScorer(model, graph, reduction=reduction), model, batches, loss_fn)


def obd(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Second-order change of the loss, `h / 2` (LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989, equation 5): h is
    the unit's entry of the diagonal of the Hessian in the gates that multiply the units at their consumers, each 1.

    The Hessian is the Gauss-Newton matrix, OBD's own choice too (its equation 9 drops the same term): `J' H J`, the
    Jacobian of one example's outputs in the gates around the loss's Hessian in the outputs. Where the net is piecewise
    linear (ReLU, max pooling) that is the Hessian itself. Each example's `H = S S'` is factored and S's columns are sent
    back one by one: `h = mean over examples of sum_c (J' s_c)^2`, without error for up to PROBES columns (cross-entropy
    over k classes has k - 1); above that PROBES random sign combinations of them, an unbiased estimate (BackPACK's
    DiagGGNExact and DiagGGNMC, arXiv:1912.10985). Raises ValueError for a model whose output is not one tensor.
    """
    examples = passes = 0
    # Squares of contributions are what the scorer adds up; the loss is that of each example, so nothing is averaged.
    with still(model), TaylorScorer(model, graph, reduction="square", loss_reduction="sum") as scorer:
        for inputs, targets in batches:
            output = run_on(model, inputs)
            if not isinstance(output, torch.Tensor):
                raise ValueError(f"obd needs a model whose output is one tensor, got {type(output).__name__}")
            roots = _hessian_roots(loss_fn, output.detach(), targets)  # [columns, N, *outputs]
            for column in roots:
                output.backward(column, retain_graph=True)
            examples += len(output)
            passes += len(output) * len(roots)
    return {name: score * (graph.group(name).positions ** 2 * passes / examples / 2) for name, score in scorer.scores().items()}


def _hessian_roots(loss_fn, output, targets) -> torch.Tensor:
    """Columns s_c such that, for each example, the loss's Hessian in the outputs is the sum of s_c s_c'."""

    def loss(o, t):
        return loss_fn(o.reshape(1, *output.shape[1:]), t[None])

    def columns(o, t):
        with torch.enable_grad():
            hessian = torch.func.vmap(torch.func.hessian(loss))(o, t).double()  # [n, K, K]
        values, vectors = torch.linalg.eigh(hessian)
        found = vectors * values.clamp(min=0).sqrt()[:, None]  # [n, K, columns]
        found = found[:, :, (values >= 10 * torch.finfo(output.dtype).eps * values.max()).any(0)]  # without the round-off
        if found.shape[2] > PROBES:
            signs = torch.randint(0, 2, (len(found), found.shape[2], PROBES), device=found.device) * 2.0 - 1
            found = found @ signs.double() / math.sqrt(PROBES)
        return found.movedim(2, 0)

    count = max(1, HESSIANS // output[0].numel() ** 2)
    parts = [columns(o, t) for o, t in zip(output.flatten(1).split(count), targets.split(count), strict=True)]
    roots = output.new_zeros(max(map(len, parts)), *output.shape)
    for root, part in zip(roots.split(count, 1), parts, strict=True):
        root[: len(part)] = part.reshape(len(part), -1, *output.shape[1:])
    return roots


def residual(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """The loss that a unit leaves behind when its consumers are mended, as `ResidualScorer` measures it, with the Fisher
    information of the given loss (Hassibi and Stork, NIPS 1992, equation 5)."""
    return _scored(ResidualScorer(model, graph), model, batches, loss_fn)


def _scored(scorer: TaylorScorer | ResidualScorer, model, batches, loss_fn) -> Scores:
    """What a scorer says after a pass forward and back over all batches."""
    with still(model), scorer:
        for inputs, targets in batches:
            loss_fn(run_on(model, inputs), targets).backward()
    return scorer.scores()


# -- from the activations ----------------------------------------------------------------------------------------------
# What a unit is worth to its consumers: statistics of its elements at the inputs of all of them, pooled.


def activation_mean(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """|mean| over examples and positions (arXiv:1611.06440, section 2.2; after a ReLU the bars change nothing)."""
    return {name: (total / n).abs() for name, (total, _, _, n) in _totals(model, graph, batches).items()}


def activation_std(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Standard deviation over examples and positions together (arXiv:1611.06440, section 2.2)."""
    totals = _totals(model, graph, batches)
    return {name: (squares / n - (total / n) ** 2).clamp(min=0).sqrt() for name, (total, squares, _, n) in totals.items()}


def apoz(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """The share of elements that are not zero: one less the average percentage of zeros (arXiv:1607.03250, equation 1)."""
    return {name: 1 - zeros / n for name, (_, _, zeros, n) in _totals(model, graph, batches).items()}


def mutual_information(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Information in nats that an example's mean activation, sorted into BINS bins of equal frequency, has about its label
    (arXiv:1611.06440, section 2.2: `H(x) + H(y) - H(x, y)`). Raises ValueError unless the targets are int64 [N]."""
    means: dict[str, list[torch.Tensor]] = {}
    labels: dict[str, list[torch.Tensor]] = {}

    def visit(name, statistics, elements, targets):
        if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64 or targets.ndim != 1:
            raise ValueError("mutual_information needs targets that are class labels, int64 [N]")
        means.setdefault(name, []).append(statistics[0] / elements)
        labels.setdefault(name, []).append(targets)

    _observe(model, graph, batches, visit)
    return {name: _information(torch.cat(found), torch.cat(labels[name])).cpu() for name, found in means.items()}


def _information(values, labels) -> torch.Tensor:
    """values: [N, units], labels: [N] -> [units]."""
    examples, units = values.shape
    ordered = values.sort(0).values
    edges = ordered[torch.arange(1, BINS, device=values.device) * examples // BINS]  # [BINS - 1, units]
    # Equal values share a bin, whatever their number: a unit that is always zero knows nothing.
    bins = torch.searchsorted(edges.T.contiguous(), values.T.contiguous(), right=True)  # [units, N]
    _, labels = labels.unique(return_inverse=True)
    classes = int(labels.max()) + 1
    cell = (torch.arange(units, device=values.device)[:, None] * BINS + bins) * classes + labels
    joint = torch.bincount(cell.flatten(), minlength=units * BINS * classes).reshape(units, BINS, classes).double() / examples

    def entropy(p):
        return torch.special.entr(p).flatten(1).sum(1)

    return (entropy(joint.sum(2)) + entropy(joint.sum(1)) - entropy(joint)).clamp(min=0)


def _totals(model, graph, batches) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Group name -> sum, sum of squares and zeros [units], and the number of elements that a unit had in all."""
    totals: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def visit(name, statistics, elements, _targets):
        totals[name] = totals.get(name, 0) + statistics.sum(1)
        counts[name] = counts.get(name, 0) + elements * statistics.shape[1]

    _observe(model, graph, batches, visit)
    return {name: (*total.cpu(), counts[name]) for name, total in totals.items()}


@torch.no_grad()
def _observe(model, graph, batches, visit) -> None:
    """Runs the data and calls visit(group name, statistics, elements, targets) per batch and group. statistics: float64
    [3, N, units], sum, sum of squares and zeros over an example's elements, of which every unit has `elements`."""
    check_fit(graph, model)
    model = unwrapped(model)
    caught: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def hook(name, _module, args):
        x = args[0].movedim(graph.layers[name].axis, 1)  # [n, C, *positions]
        caught.setdefault(name, []).append((torch.stack([s.double() for s in ops.channel_statistics(x)]), x[0, 0].numel()))

    consumers = dict.fromkeys(name for group in graph.groups for name in group.inputs)
    handles = [model.get_submodule(name).register_forward_pre_hook(functools.partial(hook, name)) for name in consumers]
    try:
        with in_mode(model, training=False):
            for inputs, targets in batches:
                caught.clear()
                run_on(model, inputs)
                examples = count_examples(inputs)
                for group in graph.groups:
                    statistics, elements = torch.zeros(()), 0
                    for name, slots in group.inputs.items():
                        for found, positions in caught.get(name, ()):
                            # A consumer may see each example several times (frames folded into the batch).
                            rows = graph.layers[name].by_example(found.movedim(0, 1), examples)  # [N, times, 3, C]
                            statistics = statistics + rows.sum(1).movedim(1, 0)[:, :, slots.to(found.device)].sum(3)
                            elements += positions * rows.shape[1] * slots.shape[1]
                    if elements:
                        visit(group.name, statistics, elements, targets)
    finally:
        for handle in handles:
            handle.remove()


# -- from the weights --------------------------------------------------------------------------------------------------
# A unit's weights are those of its filters in all the layers that produce it, end to end in one vector; biases are not.


def weight_l1(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Sum of |w| over the unit's filters (Li et al., arXiv:1608.08710)."""
    return _of_filters(model, graph, lambda filters: sum(w.abs().sum(1) for w in filters))


def weight_l2(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """L2 norm of the unit's filters."""
    return _of_filters(model, graph, lambda filters: _energy(filters).sqrt())


def weight_mean_square(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Mean of w^2 over the unit's filters (arXiv:1611.06440, section 2.2, minimum weight)."""
    return _of_filters(model, graph, lambda filters: _energy(filters) / sum(w.shape[1] for w in filters))


def geometric_median(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Sum of the distances to all other units' filters: what lies in the middle can be replaced by the others (FPGM, He et
    al., arXiv:1811.00250, equation 6)."""
    return _of_filters(
        model, graph, lambda filters: torch.stack([torch.cdist(w, w).square() for w in filters]).sum(0).sqrt().sum(1)
    )


def lamp(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """|w|^2 over the sum of |w|^2 of the units of its group that are not smaller: the largest has 1 in every group (Lee et
    al., arXiv:2010.07611, equation 4, of whole filters)."""

    def score(filters):
        energy = _energy(filters)
        order = energy.argsort(stable=True)
        rest = energy[order].flip(0).cumsum(0).flip(0)
        return torch.empty_like(energy).index_copy_(0, order, energy[order] / rest.clamp(min=1e-300))

    return _of_filters(model, graph, score)


def batch_norm_scale(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Mean of |gamma| over the unit's channels in all its batch norms (network slimming, Liu et al., arXiv:1708.06519)."""
    model = unwrapped(model)
    norms = {
        name: model.get_parameter(name) for name in (f"{norm}.weight" for norm in batch_norms(model)) if name in graph.shapes
    }
    scores = {}
    for group in graph.groups:
        scales = [norms[t].detach().double().cpu()[slots] for (t, _), slots in group.slots.items() if t in norms]
        if scales:
            scores[group.name] = torch.cat(scales, 1).abs().mean(1)
    return scores


def random(model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
    """Uniform in [0, 1), from torch's global generator: what any criterion has to beat."""
    return {group.name: torch.rand(group.units, dtype=torch.float64) for group in graph.groups}


def _of_filters(model, graph, score) -> Scores:
    check_fit(graph, model)
    model = unwrapped(model)
    found = {group.name: _filters(model, group) for group in graph.groups}
    return {name: score(filters).cpu() for name, filters in found.items() if filters}


def _filters(model, group: Group) -> list[torch.Tensor]:
    """For each layer that produces the group, float64 [units, weights of a unit]."""
    filters = []
    for name in group.layers:
        layer = model.get_submodule(name)
        # A transposed convolution has its filters in the second dimension, unless it is grouped.
        dimension = int(getattr(layer, "transposed", False) and layer.groups == 1)
        slots = group.slots.get((f"{name}.weight", dimension))
        if slots is not None:  # a weight that two layers share is counted once
            weight = layer.weight.detach().double().movedim(dimension, 0).flatten(1)  # [filters, weights of a filter]
            filters.append(weight[slots.to(weight.device)].flatten(1))
    return filters


def _energy(filters) -> torch.Tensor:
    return sum(w.square().sum(1) for w in filters)


# -- the list ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A criterion, to be called like its function, and its price. passes(units, outputs): forward and backward passes over
    the data, for a graph with so many units and a model with so many outputs."""

    function: Callable[[nn.Module, ChannelGraph, Iterable, Callable], Scores]
    passes: Callable[[int, int], tuple[int, int]]

    def __call__(self, model: nn.Module, graph: ChannelGraph, batches: Iterable, loss_fn: Callable) -> Scores:
        return self.function(model, graph, batches, loss_fn)


def _costs(forward, backward):
    return lambda units, outputs: (forward, backward)


def _one_per_unit(units, outputs):
    """What brute force takes; the replay computes the same from a fraction of the FLOPs."""
    return units + 1, 0


CRITERIA: dict[str, Criterion] = {
    "taylor": Criterion(functools.partial(taylor, reduction="abs"), _costs(1, 1)),
    "taylor-batch": Criterion(functools.partial(taylor, reduction="batch"), _costs(1, 1)),
    "taylor-square": Criterion(functools.partial(taylor, reduction="square"), _costs(1, 1)),
    "residual": Criterion(residual, _costs(1, 1)),
    "obd": Criterion(obd, lambda units, outputs: (1, min(max(outputs - 1, 1), PROBES))),
    "activation-mean": Criterion(activation_mean, _costs(1, 0)),
    "activation-std": Criterion(activation_std, _costs(1, 0)),
    "apoz": Criterion(apoz, _costs(1, 0)),
    "mutual-information": Criterion(mutual_information, _costs(1, 0)),
    "weight-l1": Criterion(weight_l1, _costs(0, 0)),
    "weight-l2": Criterion(weight_l2, _costs(0, 0)),
    "weight-mean-square": Criterion(weight_mean_square, _costs(0, 0)),
    "batch-norm-scale": Criterion(batch_norm_scale, _costs(0, 0)),
    "geometric-median": Criterion(geometric_median, _costs(0, 0)),
    "lamp": Criterion(lamp, _costs(0, 0)),
    "random": Criterion(random, _costs(0, 0)),
    "oracle-abs": Criterion(functools.partial(oracle, mode="abs"), _one_per_unit),
    "oracle-loss": Criterion(functools.partial(oracle, mode="loss"), _one_per_unit),
}


# -- agreement ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Spearman's rho of scores with the oracle, as in the paper's tables; NaN where nothing can be correlated.

    per_group: mean over the groups; all_units: over all units as they are; all_units_l2: the same with each group's scores
    divided by their L2 norm (arXiv:1611.06440, equation 8). groups: rho by group name; left_out: how many groups it does not
    exist for."""

    per_group: float
    all_units: float
    all_units_l2: float
    groups: dict[str, float]
    left_out: int


def spearman(scores: Scores, oracle: Scores) -> Agreement:
    """How well scores rank units as the oracle does. scores, oracle: group name -> [units].

    Groups that only one of them has are ignored, and so are units that are NaN in one of them. Groups with fewer than two
    such units, or with all scores or all oracle values equal, have no correlation of their own: they are left out of the
    mean and counted, and stay in the two figures over all units. A group's norm is that of all its scores, measured by the
    oracle or not. Raises ValueError for a group of another size in one than in the other.
    """
    groups, left_out, raw, normalised, truth = {}, 0, [], [], []
    for name in (name for name in scores if name in oracle):
        s, o = (torch.as_tensor(values[name]).double().cpu() for values in (scores, oracle))
        if s.shape != o.shape:
            raise ValueError(f"group {name!r} has {len(s)} scores and {len(o)} oracle values")
        norm = s.nan_to_num(nan=0).norm()
        both = ~(s.isnan() | o.isnan())
        raw.append(s[both])
        normalised.append(s[both] / norm if norm > 0 else s[both])
        truth.append(o[both])
        rho = _rho(s[both], o[both])
        if math.isnan(rho):
            left_out += 1
        else:
            groups[name] = rho
    per_group = sum(groups.values()) / len(groups) if groups else math.nan
    everything = [torch.cat(values) if values else torch.empty(0) for values in (raw, normalised, truth)]
    return Agreement(per_group, _rho(everything[0], everything[2]), _rho(everything[1], everything[2]), groups, left_out)


def _rho(a, b) -> float:
    """NaN where there is no rank to speak of."""
    from scipy.stats import spearmanr

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return math.nan
    return float(spearmanr(np.asarray(a), np.asarray(b))[0])
