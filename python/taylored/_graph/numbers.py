"""Numbers that a forward pass computes with: they must not change with the number of channels.

A model that divides by the square root of its channels, read from a shape, runs with fewer of them and computes something else.
So a pass notes the scalar arguments of its operators, and the values of what is made of sizes alone (arange, ones, linspace)
where it meets what the model computes; a run with fewer channels compares them (not one that computes everything: numbers may
then come from what it computes). Sizes are not numbers here: views, splits and
fresh tensors follow the channels, and their labels say whether rightly. No activation is computed.
"""

import hashlib

import torch

from taylored._graph.labels import tensors_of
from taylored._graph.shapes import VIEWS, aten, packets
from taylored._torch_compat import tree_map_only, writes

MOST = 100_000  # elements of a tensor whose values are followed
FACTORIES = frozenset(
    packets("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like")
    + packets("full_like", "arange", "linspace", "logspace", "eye")
    + packets("scalar_tensor", "tril_indices", "triu_indices", "hann_window", "range")
)
# Arguments of these are sizes and places.
SIZES = FACTORIES.union(
    VIEWS,
    packets("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    packets("expand", "as_strided", "repeat", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"),
    packets("slice", "narrow", "select", "convolution", "native_layer_norm", "constant_pad_nd", "unfold"),
    packets("permute", "transpose", "squeeze", "unsqueeze", "cat", "stack", "native_batch_norm", "rand", "randn"),
    packets("channel_shuffle", "unbind"),
)

Noted = tuple  # numbers of one call: plain ones, and (shape, digest or value) of what is made of sizes


class Numbers:
    """What the calls of one pass computed with, by (module, operator) in the order of the calls."""

    def __init__(self, computed: bool = False) -> None:
        self.computed = computed  # whether tensors hold values, which say nothing of where they are from
        self.noted: dict[tuple[str, str], list[Noted]] = {}
        self._made: dict[int, torch.Tensor] = {}  # of tensors made of sizes alone: what they hold
        self._held: list[torch.Tensor] = []

    def of(self, func, args, kwargs, out, owned) -> Noted:
        """The numbers of a call, () if there are none; follows what is made of sizes alone. owned: ids of the model's tensors."""
        packet, tensors = func.overloadpacket, list(tensors_of(args, kwargs))
        if self.computed and packet is aten.lift_fresh:  # torch.tensor(number)
            self._make(out, args[0].clone())
            return ()
        values = [self._value(t, owned) for t in tensors]
        if all(value is not None for value in values) and (tensors or packet in FACTORIES):
            self._follow(func, args, kwargs, out, owned)
            return ()
        if writes(func) and args and isinstance(args[0], torch.Tensor) and id(args[0]) in self._made:
            memory = self._made[id(args[0])].untyped_storage().data_ptr()  # others may see it, of which this is a part
            self._made = {key: made for key, made in self._made.items() if made.untyped_storage().data_ptr() != memory}
        if packet is aten.native_group_norm:
            return (args[4] // args[6],)  # how many channels share statistics
        if packet in SIZES:
            return ()
        plain = tuple(a for a in (*args, *kwargs.values()) if type(a) in (int, float))
        return plain + tuple(_noted(value) for value in values if value is not None)

    def _value(self, tensor, owned) -> torch.Tensor | None:
        """What a tensor holds, None where it depends on the model's input or weights."""
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        return None if self.computed or tensor.is_meta or id(tensor) in owned or tensor.numel() > MOST else tensor

    def _follow(self, func, args, kwargs, out, owned) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return
        if any(isinstance(o, torch.Tensor) and o.numel() > MOST for o in (out if isinstance(out, (tuple, list)) else (out,))):
            return
        args, kwargs = tree_map_only(torch.Tensor, lambda t: self._value(t, owned), (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            found = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # no kernel, or another device
            return
        pairs = zip(out, found) if isinstance(out, (tuple, list)) else ((out, found),)
        for tensor, value in pairs:
            if isinstance(tensor, torch.Tensor) and isinstance(value, torch.Tensor):
                self._make(tensor, value)

    def _make(self, tensor, value) -> None:
        self._made[id(tensor)] = value
        self._held.append(tensor)


def _noted(value: torch.Tensor) -> tuple:
    """The one value that a tensor holds everywhere; its shape and a digest where there are several."""
    if value.numel() and bool((value == value.reshape(-1)[0]).all()):
        first = value.reshape(-1)[0].item()
        return ("value", float(first) if isinstance(first, (int, float)) else str(first))
    data = value.detach().contiguous().reshape(-1)
    data = data.view(torch.uint8) if data.numel() else data
    return (tuple(value.shape), hashlib.blake2b(data.numpy().tobytes(), digest_size=8).hexdigest())


def differ(here: Noted, there: Noted) -> bool:
    """Whether two calls compute with other numbers. What has another shape says nothing: its labels do."""
    if len(here) != len(there):
        return False
    for a, b in zip(here, there):
        if isinstance(a, tuple) and isinstance(b, tuple):
            if a[0] == b[0] and a[1] != b[1]:
                return True
        elif a != b:
            return True
    return False
