"""Carry labels along with every tensor of a forward pass.

`LabelMode` is a dispatch mode: each ATen operator runs on the meta device (shapes, no data), and its rule says what became
of the labels. What a meeting of labels means is up to the subclass: a trace notes it, a rehearsal checks it.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from taylored.rules import FOREIGN, RULES, SHAPES, SKIMMED, opaque, padded, pointwise, slot_at, sparing, tensors_of, varying


class TraceError(RuntimeError):
    """The model could not be traced, or does not run with fewer channels. Names the line of the model at fault."""


# What a forward pass computes: shapes alone, on the meta device; all but convolutions and matrix products (a model that looks
# at its data); everything.
VALUES = ("none", "some", "all")
SHORTCUTS = {"none": SHAPES, "some": SKIMMED, "all": {}}


class LabelMode(TorchDispatchMode):
    """Carries labels along with every tensor that passes the dispatcher.

    A tensor's labels are a tuple of int64 tensors, each broadcastable to its shape, no two of which vary along the
    same dimension. Subclasses say what `unite` and `freeze` do: a trace notes them, a rehearsal checks them."""

    running = False  # whether any is; masks that are in force meanwhile step aside
    labelled = True  # whether there are labels to carry; shapes and FLOPs are found without
    planned = False  # whether the model runs as a plan leaves it: one group of channels may be what is left of several

    def __init__(self, module_names: dict[int, str]):
        super().__init__()
        self.module_names = module_names
        self.stack: list[tuple[nn.Module, tuple, int]] = []  # module, arguments, number of the call
        self.calls = itertools.count()
        self.labels: dict[int, tuple[torch.Tensor, ...]] = {}
        self.alive: list[torch.Tensor] = []  # an id must not be reused while its labels are kept
        self.tied: dict[tuple[int, ...], torch.Tensor] = {}  # labels that `spread` has tied, by id and dimensions left
        self.uniform: set[int] = set()  # tensors with the same value, or fresh noise, in every channel
        self.lost: dict[int, str] = {}  # why a tensor has no labels, where an op is to blame
        self.meta: dict[int, torch.Tensor] = {}
        self.grouped: set[str] = set()  # grouped convolutions; they stay so when a plan leaves them one group
        self.owned: set[int] = set()  # the model's own tensors, and those of them that an op has used
        self.seen: set[int] = set()
        self.steps = 1  # for which what runs stands
        self.values = "none"  # which operators compute, see `VALUES`
        self.dynamic = False  # whether an op's shape depended on its data

    def unite(self, a: torch.Tensor, b: torch.Tensor) -> None:
        raise NotImplementedError

    def balance(self, rows: torch.Tensor) -> None:
        """Each column [n] of the labels is a piece of the channels, one of several that must stay equally many."""

    def freeze(self, label: torch.Tensor, reason: str) -> None:
        raise NotImplementedError

    def applied(self, filters, count, contracted, unlabelled) -> None:
        """A convolution or matrix product makes `count` channels labelled `filters` ([count], or None for the reason
        `unlabelled`) and contracts over the labels `contracted` ([C] or None: it does not mix units)."""

    def counted(self, flops: int, dimensions: list[torch.Tensor]) -> None:
        """An op costs `flops`, in proportion to the number of labels in each dimension."""

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def get(self, tensor) -> tuple[torch.Tensor, ...]:
        return self.labels.get(id(tensor), ())

    def set(self, tensor, labels) -> None:
        self.labels[id(tensor)] = tuple(labels)
        self.alive.append(tensor)

    def emit(self, tensor, axis: int, label: torch.Tensor | None) -> None:
        """Give a tensor labels [C] along one axis, and no others."""
        self.set(tensor, slot_at(label, tensor.ndim, axis))

    def lose(self, out, reason) -> None:
        """What an op made has no labels for that reason."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not self.get(tensor):
                self.lost[id(tensor)] = reason
                self.alive.append(tensor)

    def why(self, tensor) -> str:
        """Why a tensor has no labels in the dimension in question."""
        other = (
            "a weight computed from all of them (standardised, orthogonal)"
            if self.get(tensor)
            else "the model's input, or a value without labels"
        )
        return self.lost.get(id(tensor), other)

    def where(self) -> str:
        return self.module_names.get(id(self.stack[-1][0]), type(self.stack[-1][0]).__name__) if self.stack else "forward"

    def enter_module(self, module, args):
        self.stack.append((module, args, next(self.calls)))
        if self.recurs(module, args) and (steps := args[0].shape[time := self.time(module, args)]) > 1:
            self.steps = steps
            return (args[0].narrow(time, 0, 1), *args[1:])
        return args

    def leave_module(self, module, args, output):
        _, given, _ = self.stack.pop()
        if self.recurs(module, given) and isinstance(output, tuple):
            shape, time, self.steps = list(output[0].shape), self.time(module, given), 1
            shape[time] = given[0].shape[time]
            return (output[0].expand(shape), *output[1:])
        return output

    def recurs(self, module, args) -> bool:
        """Whether a layer that takes one step after another takes a single one instead: all cost and label the same."""
        return self.values == "none" and isinstance(module, nn.RNNBase) and bool(args) and isinstance(args[0], torch.Tensor)

    @staticmethod
    def time(module, args) -> int:
        return args[0].ndim - 2 if module.batch_first else 0

    def to_meta(self, value):
        if isinstance(value, torch.Tensor):
            if id(value) in self.owned:
                self.seen.add(id(value))
            if value.is_meta:
                return value
            if id(value) not in self.meta:
                self.meta[id(value)] = torch.empty_like(value, device="meta")
                self.alive.append(value)
            return self.meta[id(value)]
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return type(value)(self.to_meta(v) for v in value)
        return value

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        return self.execute(func, args, kwargs or {})

    def execute(self, func, args, kwargs):
        """Run an operator, on the meta device or what takes its place, and carry the labels along."""
        if self.values == "none":
            args = tuple(self.to_meta(a) for a in args)
            kwargs = {k: self.to_meta(v) for k, v in kwargs.items()}
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        else:
            self.seen |= self.owned.intersection(map(id, tensors_of(args, kwargs)))
        packet, shortcuts = func.overloadpacket, SHORTCUTS[self.values]
        instead = shortcuts.get(packet, shortcuts.get(func._schema.name)) if not kwargs else None
        out = sparing(func, args, kwargs) if instead is None and self.values == "some" else (instead or func)(*args, **kwargs)
        self.dynamic |= torch.Tag.dynamic_output_shape in func.tags
        dimensions = self.carry(func, args, kwargs, out) if self.labelled else None
        if packet in flop_registry:
            flops = self.steps * flop_registry[packet](*args, **kwargs, out_val=out)
            self.counted(flops, [d for d in dimensions or () if d is not None])
        return out

    def carry(self, func, args, kwargs, out):
        """Give what an operator has made its labels."""
        dimensions, rule = None, RULES.get(func.overloadpacket)
        if rule is None:
            rule = pointwise if torch.Tag.pointwise in func.tags else FOREIGN.get(func._schema.name)
        if rule is not None:
            dimensions = rule(self, func, args, kwargs, out)
        else:
            name = func._schema.name
            opaque(self, args, kwargs, out, f'{name} in {self.where()!r} has no rule: taylored.trace_rule("{name}") can add one')
        if self.lost and (reason := next((self.lost[id(t)] for t in tensors_of(args, kwargs) if id(t) in self.lost), None)):
            self.lose(out, reason)
        return dimensions

    # -- what rules are made of ------------------------------------------------------------------------------------

    def freeze_all(self, tensor, reason, dims=None) -> tuple[torch.Tensor, ...]:
        """Freeze the labels of a tensor that vary along one of dims (None: any); return the others."""
        kept = []
        for label in self.get(tensor):
            if dims is None or any(d in dims for d in varying(label)):
                self.freeze(label, reason)
            else:
                kept.append(label)
        return tuple(kept)

    def whole(self, tensor, reason, dims) -> tuple[torch.Tensor, ...]:
        """An op needs all that is along dims; returns the labels that go on, see `spread`."""
        return tuple(label for label in self.get(tensor) if self.spread(label, reason, dims))

    def spread(self, label, reason, dims) -> bool:
        """Nothing along dims may go by itself. Labels that vary along nothing else are frozen; others, of channels cut in
        two (heads, radices), are tied along dims, so that all of them go at once. Returns whether they can go."""
        others = [d for d in varying(label) if d not in dims]
        if len(others) == len(varying(label)):
            return True
        if not others:
            self.freeze(label, reason)
            return False
        key = (id(label), *others)
        if key not in self.tied:  # a detector takes its scores apart class by class
            self.tied[key] = label
            self.tie(label.movedim(others, list(range(len(others)))).reshape(math.prod(label.shape[d] for d in others), -1))
        return True

    def meet(self, operands, shape) -> tuple[torch.Tensor, ...]:
        """Unite the labels of tensors that are broadcast together to `shape`; returns the result's labels."""
        labelled = [(t, [padded(x, len(shape)) for x in self.get(t)]) for t in operands if t.numel() != 1]
        if not any(labels for _, labels in labelled):
            return ()
        if len(labelled) == 1:
            return tuple(labelled[0][1])
        result: list[torch.Tensor] = []
        for axis, size in enumerate(shape):
            if size == 1:
                continue
            there = [(t, labels) for t, labels in labelled if _size(t, axis, len(shape)) > 1 and id(t) not in self.uniform]
            found = [[x for x in labels if x.shape[axis] > 1] for _, labels in there]
            if not any(found):
                continue
            if not all(found):
                for label in itertools.chain.from_iterable(found):
                    self.spread(label, f"meets a constant of {size} values in {self.where()!r}", (axis,))
                continue
            first = found[0][0]
            for other in itertools.chain.from_iterable(found):
                if other is not first:
                    self.unite(*torch.broadcast_tensors(first, other))
            if not any(first is x for x in result):
                result.append(first)
        return tuple(result)

    def channels(self, x, axis) -> torch.Tensor | None:
        """One label per index of x's dimension `axis`, [C]; labels that differ elsewhere in a slot are united."""
        axis %= x.ndim
        found = None
        for label in self.get(x):
            if axis not in varying(label):
                continue
            moved = label.movedim(axis, 0).reshape(label.shape[axis], -1)  # [C, rest]
            self.tie(moved)
            found = moved[:, 0]
        return found

    def tie(self, rows) -> None:
        """Unite the labels of each row with one another."""
        if rows.shape[1] > 1:
            self.unite(rows[:, :1].expand_as(rows), rows)

    def bind(self, a: torch.Tensor | None, b: torch.Tensor | None, reason: str) -> None:
        """Two dimensions must keep the same indices. Where only one has labels it cannot change."""
        if a is not None and b is not None:
            if a is not b:
                self.unite(*torch.broadcast_tensors(a, b))
        elif a is not None or b is not None:
            self.freeze(a if a is not None else b, reason)


def _size(tensor, axis, ndim):
    axis -= ndim - tensor.ndim
    return tensor.shape[axis] if axis >= 0 else 1


LIBRARIES = tuple(f"{Path(file).parent}/" for file in (torch.__file__, __file__))


def line_at_fault(traceback=None) -> str:
    """'file.py:12': the innermost line of a traceback, or of the running stack, that is the model's own."""
    if traceback is not None:
        found = [(t.tb_frame, t.tb_lineno) for t in _walk(traceback, "tb_next")]
    else:
        found = [(f, f.f_lineno) for f in _walk(sys._getframe(), "f_back")][::-1]
    for frame, line in reversed(found):
        file = frame.f_code.co_filename
        if not file.startswith((*LIBRARIES, "<")):
            return f"{file}:{line}"
    return "in the forward pass"


def _walk(link, attribute):
    while link is not None:
        yield link
        link = getattr(link, attribute)
