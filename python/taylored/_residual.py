"""Score units by what the rest cannot make up for: the loss that is left when a unit goes and its consumers are mended.

A consumer's kept inputs predict the removed ones. What they cannot predict of them, times the weights, is an error of the
consumer's output; its loss is quadratic, with the Fisher information of the output. Removing units one by one, each time the one
that costs least, with the inverse covariance downdated as in Optimal Brain Surgeon (Hassibi and Stork, NIPS 1992, equation 5),
gives a curve of loss against units for every group; the slopes of its lower convex hull are the scores.
"""

import numpy as np
import torch
from torch import nn

from taylored._graph.values import ChannelGraph
from taylored._modules import CONVOLUTIONS
from taylored._moments import InputMoments, Moments, best_ridge, ridge_of

BLOCK = 32  # rank-one downdates that are kept before they are carried out


class ResidualScorer(InputMoments):
    """Context manager: forward and backward passes within it are measured; afterwards the model is as it was.

    The Fisher information is that of the loss that backward is called on, at the outputs of all consumers, summed over their
    positions: with labels drawn from the model's own softmax, as `shrink` does, no labels are needed. loss_reduction: "mean" if
    the loss is averaged over the batch, else "sum". Scores are losses: comparable between groups as they are, so that plans want
    `make_plan(..., normalize="none", flops_weight=0)`, or `per_flop=True`. The moments that it has measured serve to mend:
    `compact(model, plan, mend=scorer)`.

    model: as for `TaylorScorer`; in its DistributedDataParallel wrapper each process must call `scores`.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, loss_reduction: str = "mean"):
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        super().__init__(model, graph)
        self.loss_reduction = loss_reduction
        self.fisher: dict[str, torch.Tensor] = {}  # consumer -> [outputs, outputs]: sums over examples and positions of g g'
        self._examples: dict[str, int] = {}

    def __enter__(self) -> "ResidualScorer":
        super().__enter__()
        for name in self.places:
            self._handles.append(self.model.get_submodule(name).register_forward_hook(self._watch(name)))
        return self

    def _passed_on(self, args):
        """Where nothing takes a gradient its output does: no parameter need be trained."""
        if torch.is_grad_enabled() and not args[0].requires_grad:
            return (args[0].detach().requires_grad_(), *args[1:])
        return None

    def _watch(self, name):
        @torch.compiler.disable
        def hook(module, args, output):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda g: self._arrived(name, isinstance(module, CONVOLUTIONS), g.detach()))

        return hook

    def _arrived(self, name, convolves, g) -> None:
        examples = len(g)
        g = g.flatten(2).transpose(0, 1).flatten(1) if convolves else g.reshape(-1, g.shape[-1]).T  # [outputs, positions]
        g = g * examples if self.loss_reduction == "mean" else g
        found = (g @ g.T).double()
        self.fisher[name] = self.fisher[name] + found if name in self.fisher else found
        self._examples[name] = self._examples.get(name, 0) + examples

    def scores(self) -> dict[str, torch.Tensor]:
        """Group name -> float64 [units], on the CPU. Low means removable.

        A group is left out if no gradient reached its consumers or none of them is measured (see `InputMoments`). Raises
        RuntimeError if nothing was measured, FloatingPointError for what is not finite, naming the layer."""
        moments = self.collected()
        if self.graph.groups and not self.fisher:
            raise RuntimeError(f"no backward pass was seen: call loss.backward() within `with {type(self).__name__}(...)`")
        consumers = {name: self._consumer(name, moments[name]) for name in moments if name in self.fisher}
        scores = {}
        for group in self.graph.groups:
            mine = []
            for name in (name for name in group.inputs if name in consumers):
                slots = torch.arange(group.units)[:, None] if self.places[name].shape[1] > 1 else group.inputs[name]
                precision, weights = consumers[name]
                mine.append(Consumer(precision.numpy(), weights.numpy(), slots.numpy()))
            if mine:
                order, costs = greedy(mine)
                slopes = torch.empty(group.units, dtype=torch.float64)
                slopes[torch.from_numpy(order)] = torch.from_numpy(ascending(hull_slopes(costs)))
                scores[group.name] = slopes
        return scores

    def _consumer(self, name, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        """Precision of its input, the inverse of the covariance, and weights: W' F W, [C, C] each."""
        fisher, examples = self.fisher[name], torch.tensor(float(self._examples[name]), dtype=torch.float64)
        if self.parallel is not None:
            fisher, examples = fisher.clone(), examples.to(fisher.device)
            for total in (fisher, examples):
                torch.distributed.all_reduce(total, group=self.parallel.process_group)
        if not fisher.isfinite().all():
            raise FloatingPointError(f"the gradient at the output of {name!r} is not finite")
        weights = quadratic(self.model.get_submodule(name), self.places[name], fisher / examples)

        def error(share):
            return sum(float((residuals(fit, test, share) * weights.diagonal()).sum()) for fit, test in moments.halves())

        share, _ = best_ridge(moments, error)
        return torch.linalg.inv(ridge_of(moments.over()[1], share)).cpu(), weights.cpu()


def residuals(fit: torch.Tensor, test: torch.Tensor, share: float) -> torch.Tensor:
    """[C]: the mean square, under one covariance, of what is left of each channel when all others predict it as they do best
    under another, with a ridge."""
    precision = torch.linalg.inv(ridge_of(fit, share))
    combination = precision / precision.diagonal()[:, None]  # the channel less what the others say of it
    return ((combination @ test) * combination).sum(1)


def input_weights(module: nn.Module, places: torch.Tensor) -> torch.Tensor:
    """A consumer's weight as [outputs, C, places, taps], float64."""
    weight = module.get_parameter("weight").detach().double()
    weight = weight.transpose(0, 1) if getattr(module, "transposed", False) else weight
    return weight.reshape(*weight.shape[:2], -1)[:, places.to(weight.device)]


def quadratic(module: nn.Module, places: torch.Tensor, fisher: torch.Tensor) -> torch.Tensor:
    """sum over places and taps of W' F W, [C, C]: what errors of the inputs cost, taps taken as independent."""
    weight = input_weights(module, places)
    found = weight.new_zeros(weight.shape[1], weight.shape[1])
    for w in weight.flatten(2).unbind(2):
        found += w.T @ (fisher @ w)
    return found


class Consumer:
    """What one consumer makes of the loss as units go: the precision P of its input and the weights Q, [C, C] each, downdated.

    slots: [units, m], where each unit is in its input. Removing channel i costs Q_ii / P_ii and leaves P - P_i P_i' / P_ii and (1
    - p e_i')' Q (1 - e_i p'), with p = P_i / P_ii: a change of rank two. With m = 1 the changes are kept aside and only the
    diagonals, which costs are made of, are up to date."""

    def __init__(self, precision: np.ndarray, weights: np.ndarray, slots: np.ndarray):
        self.P, self.Q, self.slots = precision.copy(), weights.copy(), slots
        self.p, self.q = self.P.diagonal().copy(), self.Q.diagonal().copy()
        self.kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.gone: list[int] = []  # channels whose rows are to be cleared when the changes are carried out

    def costs(self) -> np.ndarray:
        """[units]."""
        if self.slots.shape[1] == 1:
            i = self.slots[:, 0]
            return np.maximum(self.q[i], 0) / np.maximum(self.p[i], 1e-300)
        self.carry_out()
        rows, columns = self.slots[:, :, None], self.slots[:, None, :]
        return np.maximum(np.trace(np.linalg.solve(self.P[rows, columns], self.Q[rows, columns]), axis1=1, axis2=2), 0)

    def remove(self, unit: int) -> None:
        for i in self.slots[unit]:
            self._remove(int(i))
            if self.slots.shape[1] > 1 or len(self.kept) == BLOCK:
                self.carry_out()

    def _remove(self, i):
        P, Q = self.P[i].copy(), self.Q[i].copy()
        for a, p, h in self.kept:
            P -= a[i] * a
            Q -= p[i] * h + h[i] * p
        a, p = P / np.sqrt(P[i]), P / P[i]
        h = Q - Q[i] / 2 * p
        self.p -= a * a
        self.q -= 2 * p * h
        self.p[i], self.q[i] = 1.0, 0.0
        self.kept.append((a, p, h))
        self.gone.append(i)

    def carry_out(self) -> None:
        if not self.kept:
            return
        a, p, h = (np.stack(vectors) for vectors in zip(*self.kept, strict=True))
        self.P -= a.T @ a
        change = p.T @ h
        self.Q -= change + change.T
        self.P[self.gone], self.P[:, self.gone], self.Q[self.gone], self.Q[:, self.gone] = 0.0, 0.0, 0.0, 0.0
        self.P[self.gone, self.gone] = 1.0
        self.kept.clear()
        self.gone.clear()


def greedy(consumers: list[Consumer]) -> tuple[np.ndarray, np.ndarray]:
    """The order in which units go, each time the one whose loss over all consumers is least, and what each of them costs then."""
    units = len(consumers[0].slots)
    order, costs = np.empty(units, dtype=np.int64), np.empty(units)
    gone = np.zeros(units, dtype=bool)
    for step in range(units):
        cost = np.sum([consumer.costs() for consumer in consumers], axis=0)
        cost[gone] = np.inf
        order[step] = unit = int(cost.argmin())
        costs[step], gone[unit] = cost[unit], True
        for consumer in consumers:
            consumer.remove(unit)
    return order, costs


def hull_slopes(costs: np.ndarray) -> np.ndarray:
    """The slopes of the lower convex hull of the sums of costs, one for each of them: what a unit costs in the best bargain."""
    total = np.append(0.0, np.cumsum(costs))
    corners = [0]
    for i in range(1, len(total)):
        while len(corners) > 1 and _above(total, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    lengths = np.diff(corners)
    return np.repeat(np.diff(total[corners]) / lengths, lengths)


def _above(y, a, b, c) -> bool:
    """Whether the corner b lies on or above the line from a to c."""
    return (y[b] - y[a]) * (c - a) >= (y[c] - y[a]) * (b - a)


def ascending(slopes: np.ndarray) -> np.ndarray:
    """Strictly ascending by less than matters, so that units with one slope keep their order."""
    return np.maximum(slopes, np.finfo(np.float64).tiny) * (1 + 1e-9 * np.arange(len(slopes)))
