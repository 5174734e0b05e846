"""What a forward pass says about channels: which labels were united, which are frozen and why, and what the layers did."""

from typing import NamedTuple

import torch
from torch import nn

from taylored._graph.labels import Label, tensors_of
from taylored._graph.mode import LabelMode, labels_running
from taylored._modules import CONSUMERS, CONVOLUTIONS, NO_LINE


class Application(NamedTuple):
    """One call of a convolution, linear or recurrent layer. filters: the labels of its output channels, None for the reason
    `unlabelled`; outputs: how many they are; contracted: the labels of its input's channels, None where it mixes no units; axis:
    their dimension; positions: elements of its input per example and channel; call: its number; ndim, rows: dimensions and length
    of its input."""

    filters: Label | None
    outputs: int
    unlabelled: str
    contracted: Label | None
    is_convolution: bool
    axis: int
    positions: int
    call: int
    ndim: int = 0
    rows: int = 0


class Tracer(LabelMode):
    """Notes what there is to know."""

    def __init__(self, model: nn.Module, fully_connected: bool, values: str = "none"):
        super().__init__(model, values)
        self.fully_connected = fully_connected
        self.total = 0  # labels that there are
        self.edges: list[tuple[Label, Label]] = []
        self.meetings: list[tuple[Label, Label]] = []  # of those that meet slot by slot, also where there are fewer
        self.ties: list[tuple[Label, Label]] = []  # of equal positions in pieces that must stay equally many
        self.pieces = 1  # the most that anything was cut into
        self.frozen: list[tuple[Label, str]] = []
        self.filters: list[Label] = []
        self.heads: list[Label] = []  # filters of fully connected layers
        self.applications: dict[str, list[Application]] = {}
        self.costs: list[tuple[int, list[Label]]] = []
        self.placed: set[str] = set()  # reasons that say where

    def _lists(self) -> tuple[list, ...]:
        return self.edges, self.meetings, self.ties, self.frozen, self.filters, self.heads, self.costs

    def mark(self) -> tuple:
        """How much has been noted, for `back_to`."""
        calls = {name: len(calls) for name, calls in self.applications.items()}
        return tuple(map(len, self._lists())), calls, self.pieces, set(self.seen)

    def back_to(self, mark: tuple) -> None:
        """Forget what was noted since, in a pass that did not come to its end."""
        sizes, calls, self.pieces, self.seen = mark
        for noted, size in zip(self._lists(), sizes, strict=True):
            del noted[size:]
        self.applications = {name: self.applications[name][:count] for name, count in calls.items()}

    def extent(self):
        return len(self.edges), len(self.ties), len(self.frozen)

    def freeze_forgotten(self, args, kwargs, out, extent, reason):
        edges, ties, frozen = extent
        known = [label.reshape(-1) for t in tensors_of((out,), {}) for label in self.get(t)]
        known += [side for pairs in (self.edges[edges:], self.ties[ties:]) for pair in pairs for side in pair]
        known += [label for label, _ in self.frozen[frozen:]]
        there = torch.cat([torch.empty(0, dtype=torch.int64), *known])
        for t in tensors_of(args, kwargs):
            for label in self.get(t):
                forgotten = label.reshape(-1)[~torch.isin(label.reshape(-1), there)]
                if forgotten.numel():
                    self.freeze(forgotten, reason)

    def in_order(self, a, b):
        self.meetings.append((a.reshape(-1), b.reshape(-1)))

    def fresh(self, size):
        self.total += size
        return torch.arange(self.total - size, self.total)

    def unite(self, a, b):
        self.edges.append((a.reshape(-1), b.reshape(-1)))
        self.in_order(a, b)

    def unite_rows(self, rows):
        if rows.shape[1] > 1:
            self.edges.append((rows[:, :1].expand_as(rows).reshape(-1), rows.reshape(-1)))

    def split_evenly(self, rows):
        self.ties += [(rows[:, 0], rows[:, i]) for i in range(1, rows.shape[1])]
        self.pieces = max(self.pieces, rows.shape[1])
        self.places_matter = True

    def freeze(self, label, reason):
        self.frozen.append((label.reshape(-1), self._placed(reason)))

    def lose(self, out, reason):
        super().lose(out, self._placed(reason))

    def carry(self, func, args, kwargs, out):
        """What an operator that keeps channels makes of them has no labels for the same reason."""
        known = len(self.frozen)
        dimensions = super().carry(func, args, kwargs, out)
        if len(self.frozen) > known:
            self.lose(out, self.frozen[-1][1])
        return dimensions

    def _placed(self, reason: str) -> str:
        """A reason with the module and the line of the forward pass that it was found at."""
        if reason in self.placed or not labels_running():
            return reason
        where, line = self.where(), self.line()
        reason = reason if repr(where) in reason else f"{reason}, in {where!r}"
        reason = reason.replace(" in ''", " in the model's own forward")
        reason += f" ({line})" if line != NO_LINE else ""
        self.placed.add(reason)
        return reason

    def counted(self, flops, dimensions):
        self.costs.append((flops, dimensions))

    def applied(self, convolves, filters, outputs, contracted, unlabelled):
        module, args, call = self.stack[-1] if self.stack else (None, (), -1)
        is_convolution = isinstance(module, CONVOLUTIONS)
        is_layer = isinstance(module, CONSUMERS) and is_convolution == convolves
        standard = is_layer and args and isinstance(args[0], torch.Tensor)
        if is_layer and not standard:
            why = f"{self.where()!r} is called by keyword: give it its input as the first argument"
            if args:  # a PackedSequence
                why = f"{self.where()!r} takes a {type(args[0]).__name__}, which is no tensor"
            for label in (contracted, filters):
                if label is not None:
                    self.freeze(label, why)
            unlabelled = why
            facts = Application(filters, outputs, why, None, is_convolution, 1 if is_convolution else -1, 1, call)
            self.applications.setdefault(self.where(), []).append(facts)
            return
        if isinstance(module, nn.RNNBase) and filters is not None:  # one step does not show that they come back
            self.freeze(filters, f"the recurrent layer {self.where()!r} feeds them back to itself")
        if standard and is_convolution and args[0].ndim < module.weight.ndim:
            for label in (contracted, filters):
                if label is not None:
                    self.freeze(label, f"the input of {self.where()!r} has no dimension for examples")
            contracted = None
        if contracted is not None and not (standard and self._takes(args[0], 1 if is_convolution else -1, contracted)):
            self.freeze(contracted, f"multiplied by weights in {self.where()!r}, outside of a convolution or linear layer")
            contracted = None
        if not standard:
            if filters is not None:
                self.filters.append(filters)  # a filter all the same, but explain() has no layer to list it under
            return
        if filters is not None:
            pointwise_in_space = is_convolution or args[0].ndim > 2 or self.fully_connected
            (self.filters if pointwise_in_space else self.heads).append(filters)
        axis = 1 if is_convolution else -1
        positions = args[0].numel() // max(1, args[0].shape[0] * args[0].shape[axis])
        application = Application(
            filters, outputs, unlabelled, contracted, is_convolution, axis, positions, call, args[0].ndim, len(args[0])
        )
        self.applications.setdefault(self.where(), []).append(application)

    def _takes(self, x, axis, label) -> bool:
        found = self.channels(x, axis)
        return found is not None and torch.equal(found, label)
