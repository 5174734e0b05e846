"""Identities that a model runs through: the gate, whose backward pass hands activation and gradient to whoever scores it, and
the mark, which an exported program still bears.

Both are operators of torch, so that torch.compile and torch.export take them as they are.
"""

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

Recorder = Callable[[Tensor, Tensor, int], None]
_recorders: dict[int, Recorder] = {}
_keys: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
_counter = itertools.count()


def gate_key(module: nn.Module) -> int:
    """A number that stays the module's own, so that a compiled graph with its gate in it can be used again."""
    if module not in _keys:
        _keys[module] = next(_counter)
    return _keys[module]


def set_recorder(key: int, recorder: Recorder | None) -> None:
    """What the gates with this key do with (input, gradient, task) in the backward pass; None: nothing."""
    if recorder is None:
        _recorders.pop(key, None)
    else:
        _recorders[key] = recorder


def is_recorded(key: int) -> bool:
    """Whether gates with this key hand on what they see."""
    return key in _recorders


@torch.library.custom_op("taylored::record", mutates_args=("token",))
def _record(token: Tensor, x: Tensor, g: Tensor, key: int, task: int) -> None:
    # The token is never written: declaring it mutated keeps the call in compiled graphs, where it would look unused.
    if key in _recorders:
        _recorders[key](x, g, task)


@_record.register_fake
def _(token, x, g, key, task):
    return None


@torch.library.custom_op("taylored::mark", mutates_args=())
def mark(x: Tensor, number: int) -> Tensor:
    """x, with a number that is found again in an exported program."""
    return x.clone()


@mark.register_fake
def _(x, number):
    return torch.empty_like(x)


MARK = torch.ops.taylored.mark.default


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, token, key, task):
        ctx.save_for_backward(x)
        ctx.token, ctx.key, ctx.task = token, key, task  # not saved: gates that share a token all declare to change it
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        torch.ops.taylored.record(ctx.token, x, g, ctx.key, ctx.task)
        return g, None, None, None, None


def gate(x: Tensor, anchor: Tensor, token: Tensor, key: int, task: int = -1) -> Tensor:
    """Identity whose backward hands (x, gradient, task) to the recorder of `key`. Copies nothing: x is a consumer's input,
    which its weight's gradient needs anyway. anchor: a scalar that requires a gradient, so that the gate is reached even
    where all weights before it are frozen; token: a scalar that does not; task: the backward pass
    that is going on, or -1."""
    return _Gate.apply(x, anchor, token, key, task)
