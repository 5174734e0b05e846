"""Labels of channels, and what a rule may ask and say about them.

A label is an integer; a tensor's labels are a tuple of int64 tensors, each broadcastable to its shape, no two of which vary
along the same dimension. Channels with equal or united labels live and die together. `Labels` is what every rule is given
(rules.py): it keeps the labels of all tensors of a forward pass. What it means that labels meet, subclasses say: a trace notes
it, a rehearsal checks it.
"""

import itertools
import math
from collections.abc import Iterator

import torch

from taylored._graph.values import FIXED
from taylored._torch_compat import tree_leaves

Label = torch.Tensor  # int64, broadcastable to the shape of the tensor that it belongs to


def varying(label: Label) -> tuple[int, ...]:
    """The dimensions along which a label tensor is not broadcast."""
    return tuple(i for i, size in enumerate(label.shape) if size > 1)


def compress(label: Label) -> Label:
    """Narrow every dimension along which the labels do not change to size 1."""
    label = unexpanded(label)
    for i, size in enumerate(label.shape):
        if size > 1 and bool((label == label.narrow(i, 0, 1)).all()):
            label = label.narrow(i, 0, 1)
    return label


def unexpanded(x: torch.Tensor) -> torch.Tensor:
    """Narrow every dimension along which x is one value in memory."""
    for d, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(d, 0, 1)
    return x


def tensors_of(args, kwargs) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments, and in lists among them."""
    for value in itertools.chain(args, kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))


def with_ndim(label: Label, ndim: int) -> Label:
    """A label with dimensions of size 1 in front, until it has so many."""
    return label if label.ndim == ndim else label.reshape((1,) * (ndim - label.ndim) + tuple(label.shape))


def _size(tensor, axis, ndim) -> int:
    """That of a dimension of what the tensor is broadcast to, [ndim]."""
    axis -= ndim - tensor.ndim
    return tensor.shape[axis] if axis >= 0 else 1


def _is_expanded(tensor, axis, ndim) -> bool:
    """Whether a tensor is one value in memory along a dimension of what it is broadcast to, [ndim]."""
    return tensor.stride()[axis - ndim + tensor.ndim] == 0


def along_axis(label: Label | None, ndim: int, axis: int) -> tuple[Label, ...]:
    """Labels [C] of one dimension of an `ndim`-dimensional tensor, ready to broadcast."""
    if label is None or label.numel() == 1:
        return ()
    return (label.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)]),)


class Labels:
    """The labels of the tensors of one forward pass: what a rule is given.

    It asks `get` and `channels` what is there, says with `emit` and `set` what comes out, and what that means for what went in:
    `unite`, `unite_rows`, `match` and `broadcast` where labels meet, `split_evenly` where channels are cut in pieces, `freeze`,
    `freeze_all`, `require_all` and `unite_along` where they cannot go one by one."""

    training = False  # whether the pass is one in training mode
    planned = False  # whether the model runs as a plan leaves it: one group of channels may be what is left of several

    def __init__(self) -> None:
        self._uniform: dict[int, list[bool]] = {}  # whether a tensor has the same value in every channel; one for all its views
        self.grouped: set[str] = set()  # grouped convolutions; they stay so when a plan leaves them one group
        self.places_matter = False  # whether anything was seen whose labels tell more than shapes do: slices, splits, constants
        self._parts: set[int] = set()  # ids of views of a part of a tensor
        self.foreign: set[int] = set()  # ids of tensors with values of their own that are not the model's
        self._labels: dict[int, tuple[Label, ...]] = {}
        self._held: list[torch.Tensor] = []  # an id must not be reused while its labels are kept
        self._united: dict[tuple[int, ...], Label] = {}  # labels that `unite_along` has united, by id and dimensions left
        self._slices: dict[int, tuple[torch.Tensor, frozenset[int]]] = {}  # a slice's id -> the fresh tensor, the dimensions cut
        self._lost: dict[int, str] = {}  # why a tensor has no labels, where an op is to blame

    # -- what subclasses say -----------------------------------------------------------------------------------------

    def unite(self, a: Label, b: Label) -> None:
        """What has a label of a lives and dies with what has the label of b at the same place. Same shapes."""
        raise NotImplementedError

    def in_order(self, a: Label, b: Label) -> None:
        """What has a label of a stands where b has one, among what it lives and dies with anyway. Same shapes."""

    def split_evenly(self, rows: Label) -> None:
        """Each column [n] of the labels is a piece of the channels, one of several that must stay equally many."""

    def freeze(self, label: Label, reason: str) -> None:
        """What has one of these labels stays."""
        raise NotImplementedError

    def extent(self) -> object:
        """How much has been noted, for `freeze_forgotten`."""

    def freeze_forgotten(self, args, kwargs, out, extent, reason: str) -> None:
        """Freeze the labels of what went in that a rule has neither given to what came out, nor united, nor frozen since then."""

    def applied(self, convolves: bool, filters, outputs, contracted, unlabelled) -> None:
        """A convolution (or else a matrix product) makes `outputs` channels labelled `filters` ([outputs], or None for the reason
        `unlabelled`) and contracts over the labels `contracted` ([C] or None: it does not mix units)."""

    def counted(self, flops: int, dimensions: list[torch.Tensor]) -> None:
        """An op costs `flops`, in proportion to the number of labels in each dimension."""

    def where(self) -> str:
        """The name of the module that runs."""
        raise NotImplementedError

    # -- which labels a tensor has -----------------------------------------------------------------------------------

    def get(self, tensor: torch.Tensor) -> tuple[Label, ...]:
        """A tensor's labels; none where it has no channels that can go."""
        return self._labels.get(id(tensor), ())

    def set(self, tensor: torch.Tensor, labels) -> None:
        """Give a tensor labels, in the place of those that it has."""
        self._labels[id(tensor)] = tuple(labels)
        self._held.append(tensor)

    def emit(self, tensor, axis: int, label: torch.Tensor | None) -> None:
        """Give a tensor labels [C] along one axis, and no others."""
        self.set(tensor, along_axis(label, tensor.ndim, axis))

    def hold(self, tensor: torch.Tensor) -> None:
        """Keep a tensor alive, so that no other one gets its id."""
        self._held.append(tensor)

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has the same value, or fresh noise, in every channel."""
        return self._uniform.get(id(tensor), (False,))[0]

    def set_uniform(self, tensor: torch.Tensor, uniform: bool = True) -> None:
        """Say that it has, or no longer."""
        if uniform and not self.is_uniform(tensor):
            self.places_matter |= tensor.numel() > 1
            self._uniform[id(tensor)] = [True]
            self._held.append(tensor)
        elif not uniform and id(tensor) in self._uniform:
            self._uniform[id(tensor)][0] = False  # for all that see the same memory

    def share_uniform(self, view: torch.Tensor, x: torch.Tensor, part: bool = False) -> None:
        """A view of x, or of a part, is the same everywhere as long as x is."""
        if self.is_uniform(x):
            self._uniform[id(view)] = self._uniform[id(x)]
            self._held.append(view)
            if part or self.is_part(x):
                self._parts.add(id(view))

    def is_part(self, tensor: torch.Tensor) -> bool:
        """Whether what is written into a tensor makes others differ from place to place, which see more of the same memory."""
        return id(tensor) in self._parts

    def note_slice(self, out: torch.Tensor, x: torch.Tensor, dim: int) -> None:
        """A fresh tensor, or a slice of one, was cut along a dimension: what is written into the slice is written into it."""
        self.places_matter = True
        base, cut = self._slices.get(id(x), (x if self.is_uniform(x) else None, frozenset()))
        if base is not None:
            self._slices[id(out)] = base, cut | {dim}
            self.hold(out)

    def write_slice(self, out: torch.Tensor, values, reason: str) -> None:
        """Values are written into what has no labels: a slice of a fresh tensor, which from now on has theirs, or something that
        others may see through a view."""
        base, cut = self._slices.get(id(out), (None, frozenset()))
        if base is None:
            for t in values:
                self.freeze_all(t, reason)
            return
        for label in self.broadcast(values, out.shape):
            axes = set(varying(label))
            if axes & cut or any(len(axes & set(varying(other))) not in (0, len(axes)) for other in self.get(base)):
                self.freeze(label, reason)
                continue
            there = next((other for other in self.get(base) if axes & set(varying(other))), None)
            if there is None:
                self.set(base, (*self.get(base), label))
            else:
                self.unite(*torch.broadcast_tensors(there, label))

    def lose(self, out, reason) -> None:
        """What an op made has no labels for that reason."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not self.get(tensor):
                self._lost[id(tensor)] = reason
                self._held.append(tensor)

    def pass_on_losses(self, tensors: Iterator[torch.Tensor], out) -> None:
        """What is made of something that lost its labels has none for the same reason."""
        if reason := next((self._lost[id(t)] for t in tensors if id(t) in self._lost), None):
            self.lose(out, reason)

    def why(self, tensor) -> str:
        """Why a tensor has no labels in the dimension in question."""
        if id(tensor) in self.foreign:
            return "a weight that is no parameter of the model (a layer in a plain list is not registered)"
        other = (
            "a weight computed from all of them (standardised, orthogonal)"
            if self.get(tensor)
            else "the model's input, or a value without labels"
        )
        return self._lost.get(id(tensor), other)

    # -- what rules are made of -------------------------------------------------------------------------------------

    def freeze_all(self, tensor, reason, dims=None) -> tuple[torch.Tensor, ...]:
        """Freeze the labels of a tensor that vary along one of dims (None: any); return the others."""
        kept = []
        for label in self.get(tensor):
            if dims is None or any(d in dims for d in varying(label)):
                self.freeze(label, reason)
            else:
                kept.append(label)
        return tuple(kept)

    def require_all(self, tensor, reason, dims) -> tuple[torch.Tensor, ...]:
        """An op needs all that is along dims; returns the labels that go on, see `unite_along`."""
        return tuple(label for label in self.get(tensor) if self.unite_along(label, reason, dims))

    def unite_along(self, label, reason, dims) -> bool:
        """Nothing along dims may go by itself. Labels that vary along nothing else are frozen; others, of channels cut in
        two (heads, radices), are tied along dims, so that all of them go at once. Returns whether they can go."""
        others = [d for d in varying(label) if d not in dims]
        if len(others) == len(varying(label)):
            return True
        if not others:
            self.freeze(label, reason)
            return False
        key = (id(label), *others)
        if key not in self._united:  # a detector takes its scores apart class by class
            self._united[key] = label
            self.unite_rows(
                label.movedim(others, list(range(len(others)))).reshape(math.prod(label.shape[d] for d in others), -1)
            )
        return True

    def broadcast(self, operands, shape) -> tuple[torch.Tensor, ...]:
        """Unite the labels of tensors that are broadcast together to `shape`; returns the result's labels."""
        labelled = [(t, [with_ndim(x, len(shape)) for x in self.get(t)]) for t in operands if t.numel() != 1]
        if not any(labels for _, labels in labelled):
            return ()
        if len(labelled) == 1:
            return tuple(labelled[0][1])
        result: list[torch.Tensor] = []
        for axis, size in enumerate(shape):
            if size == 1:
                continue
            there = [(t, labels) for t, labels in labelled if _size(t, axis, len(shape)) > 1 and not self.is_uniform(t)]
            there = [(t, labels) for t, labels in there if labels or not _is_expanded(t, axis, len(shape))]
            found = [[x for x in labels if x.shape[axis] > 1] for _, labels in there]
            if not any(found):
                continue
            if not all(found):
                bare = next(t for (t, _), mine in zip(there, found, strict=True) if not mine)
                reason = self._lost.get(id(bare), f"meets a constant of {size} values in {self.where()!r}")
                for label in itertools.chain.from_iterable(found):
                    self.unite_along(label, reason, (axis,))
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
            self.unite_rows(moved)
            found = moved[:, 0]
        return found

    def take(self, x, axis, reason) -> Label | None:
        """`channels` of an operator that knows one dimension of channels; what varies along others is frozen for that reason."""
        axis %= x.ndim
        for label in self.get(x):
            if axis not in varying(label):
                self.freeze(label, reason)
        return self.channels(x, axis)

    def fresh(self, size: int) -> Label:
        """Labels [size] for what has none, as all its channels are alike: it goes with whatever it meets."""
        return torch.full((size,), FIXED)

    def unite_rows(self, rows) -> None:
        """Unite the labels of each row with one another."""
        if rows.shape[1] > 1:
            self.unite(rows[:, :1].expand_as(rows), rows)

    def match(self, a: torch.Tensor | None, b: torch.Tensor | None, reason: str) -> None:
        """Two dimensions must keep the same indices. Where only one has labels it cannot change."""
        if a is not None and b is not None:
            if a is not b:
                self.unite(*torch.broadcast_tensors(a, b))
        elif (alone := b if a is None else a) is not None:
            self.freeze(alone, reason)
