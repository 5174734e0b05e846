"""What concerns any module: its inputs, wrappers, names, modes and sizes, and the user's line that runs."""

import collections
import collections.abc
import contextlib
import enum
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from taylored._torch_compat import (
    MODULE_ATTRIBUTES,
    BatchNorm,
    Convolution,
    NormWithStatistics,
    compiled_from,
    is_lazy,
    own_tensors,
    tree_leaves,
    tree_map_only,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONSUMERS = (*CONVOLUTIONS, nn.Linear, nn.RNNBase)  # what contracts over its first argument's channels

# What holds no tensors.
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, type, slice, range, nn.Module, np.ndarray, np.generic,
    torch.dtype, torch.device, torch.Size, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
)  # fmt: skip
Inputs = torch.Tensor | tuple | list | dict  # one tensor, positional or keyword arguments

# -- inputs ------------------------------------------------------------------------------------------------------------


def as_arguments(example_inputs: Inputs) -> tuple[tuple, dict]:
    """One tensor, a tuple of positional arguments or a dict of keyword arguments -> (args, kwargs)."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    raise TypeError(f"example_inputs must be a tensor, a tuple or a dict, got {type(example_inputs).__name__}")


def run_on(model: nn.Module, inputs):
    """The model's output for inputs in any of the forms that `as_arguments` takes."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def count_examples(batch) -> int:
    """The size of the first dimension of a batch, however nested: that of its first tensor that has one."""
    return next(len(t) for t in tree_leaves(batch) if isinstance(t, torch.Tensor) and t.ndim)


def tensors_in(value) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers, also in those that torch's pytree does not know: dataclasses, subclasses of dict, any
    object with attributes. Raises TypeError, naming the type, for what cannot be looked into."""
    seen: set[int] = set()

    def walk(x):
        if isinstance(x, torch.Tensor):
            yield x
            return
        if isinstance(x, PLAIN) or id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Mapping):
            inner = list(x.values())
        elif isinstance(x, (list, tuple, collections.abc.Set, collections.deque)):
            inner = list(x)
        else:
            inner = []
        slots = [name for cls in type(x).__mro__ for name in getattr(cls, "__slots__", ())]
        own = [*vars(x).values()] if hasattr(x, "__dict__") else []
        own += [getattr(x, name) for name in ([slots] if isinstance(slots, str) else slots) if hasattr(x, name)]
        if not inner and not own and not isinstance(x, (Mapping, list, tuple, collections.abc.Set, collections.deque)):
            if hasattr(x, "__dict__") or slots:
                return
            raise TypeError(f"a {type(x).__module__}.{type(x).__qualname__} cannot be looked into for tensors")
        for y in (*inner, *own):
            yield from walk(y)

    yield from walk(value)


def two_examples(args, kwargs) -> tuple[tuple, dict]:
    """A single example doubled along its batch dimension: batch norm in training mode needs two, and torch.export takes a
    size of one for a constant."""

    def double(t):
        return torch.cat([t, t]) if t.ndim > 0 and len(t) == 1 else t

    return tree_map_only(torch.Tensor, double, args), tree_map_only(torch.Tensor, double, kwargs)


# -- wrappers ----------------------------------------------------------------------------------------------------------


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what it wraps (torch.compile's, DataParallel's and DistributedDataParallel's modules), and so on."""
    yield model
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = model.module if parallel else compiled_from(model)
    if isinstance(inner, nn.Module):
        yield from wrappers(inner)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrappers."""
    *_, inner = wrappers(model)
    return inner


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper, if there is one, with which several processes train the model as one."""
    return next((m for m in wrappers(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)


# -- names -------------------------------------------------------------------------------------------------------------


def check_module(model: nn.Module, call: str = "") -> nn.Module:
    """The model without its wrappers. Raises TypeError for what is no module, with the order of arguments in `call`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{call and f': {call}'}")
    return unwrapped(model)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, shared ones once."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(f"model has an uninitialised lazy parameter {name!r}: run one forward pass first")
    return tensors


def named_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def holders(model: nn.Module) -> dict[str, str]:
    """Every place that holds a parameter or buffer, module by module -> its name, which is that of the first of them."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    return {
        f"{prefix}.{local}".lstrip("."): names[id(tensor)]
        for prefix, module in model.named_modules()
        for local, tensor in own_tensors(module)
        if tensor is not None
    }


LIBRARIES = tuple(f"{Path(file).parent}/" for file in (torch.__file__, __file__))


NO_LINE = "in the forward pass"


def user_line(traceback=None, outermost: types.CodeType | None = None) -> str:
    """'file.py:12': the innermost line of a traceback, or of the running stack inside of `outermost`, that is the model's own;
    `NO_LINE` where there is none, as in an nn.Sequential."""
    if traceback is not None:
        found = [(t.tb_frame, t.tb_lineno) for t in _walk(traceback, "tb_next")]
    else:
        inside = itertools.takewhile(lambda f: f.f_code is not outermost, _walk(sys._getframe(), "f_back"))
        found = [(f, f.f_lineno) for f in inside][::-1]
    for frame, line in reversed(found):
        file = frame.f_code.co_filename
        if not file.startswith((*LIBRARIES, "<")):
            return f"{file}:{line}"
    return NO_LINE


def _walk(link, attribute):
    while link is not None:
        yield link
        link = getattr(link, attribute)


# -- modes -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[nn.Module]:
    """The model in training or eval mode; afterwards every module is in the mode it came in."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield model if set(flags.values()) == {training} else model.train(training)
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards everything that a forward pass may have written to is what it was: the modules' own attributes, the containers
    and objects that they hold, however nested, and what their classes hold (anchors, position biases, a mask of the last size).
    Values of the meta device would be of no use to anybody."""
    before = [(owner, _content(owner)) for owner in _reachable(model)]
    try:
        yield
    finally:
        for owner, content in before:
            _put_back(owner, content)


CONTAINERS: tuple[Any, ...] = (dict, list, set, collections.deque)
OWN_STATE = 10_000  # objects that are looked into: a model that holds more of them holds data


def _reachable(model: nn.Module) -> list[object]:
    """The modules, their classes, and the mutable containers and objects that they hold."""
    modules = list(model.modules())
    classes = {cls for m in modules for cls in type(m).__mro__ if not cls.__module__.startswith(("torch.", "builtins"))}
    found: list[object] = [*modules, *classes]
    waiting, seen = list(found), {id(x) for x in found}
    while waiting and len(found) < OWN_STATE:
        for x in _values(_content(waiting.pop())):
            for y in x if isinstance(x, tuple) else (x,):
                if id(y) not in seen and not isinstance(y, (torch.Tensor, *PLAIN)) and _content(y) is not None:
                    seen.add(id(y))
                    found.append(y)
                    waiting.append(y)
    return found


def _content(x):
    """What a mutable container or object holds, None for anything else. The containers' own methods are asked: a subclass may
    refuse, or do something else."""
    if isinstance(x, type):
        return {k: v for k, v in vars(x).items() if not k.startswith("__") and not isinstance(v, CODE)}
    if isinstance(x, nn.Module):
        return {key: value for key, value in vars(x).items() if key not in MODULE_ATTRIBUTES}
    for kind in CONTAINERS:
        if isinstance(x, kind):
            return (kind.copy(x), _attributes(x))
    return _attributes(x)


# What a class holds beside data.
CODE = (
    property, classmethod, staticmethod, types.FunctionType, types.MemberDescriptorType, types.GetSetDescriptorType, type
)  # fmt: skip


# Their objects hold no state of a model's: locks, events, loggers, which other threads change meanwhile.
FOREIGN = {"torch", "numpy", *sys.stdlib_module_names} - {"collections", "types", "__main__"}


def _attributes(x):
    return dict(vars(x)) if hasattr(x, "__dict__") and type(x).__module__.partition(".")[0] not in FOREIGN else None


def _values(content) -> list[object]:
    if content is None:
        return []
    held, attributes = content if isinstance(content, tuple) else (content, None)
    return [*(held.values() if isinstance(held, dict) else held), *(attributes or {}).values()]


def _put_back(x, content) -> None:
    held, attributes = content if isinstance(content, tuple) else (None, content)
    if isinstance(x, type):
        for key in (_content(x) or {}).keys() - content.keys():
            delattr(x, key)
        for key, value in content.items():
            if vars(x).get(key) is not value:
                setattr(x, key, value)
        return
    if isinstance(x, nn.Module):
        for key in vars(x).keys() - content.keys() - MODULE_ATTRIBUTES:
            del x.__dict__[key]
        x.__dict__.update(content)
        return
    if attributes is not None and not _alike(vars(x), attributes):
        vars(x).clear()
        vars(x).update(attributes)
    for kind in CONTAINERS:
        if isinstance(x, kind) and held is not None and not _alike(kind.copy(x), held):
            kind.clear(x)
            (kind.update if kind in (dict, set) else kind.extend)(x, held)


def _alike(a, b) -> bool:
    """Whether two containers hold the very same objects."""
    a, b = ([*c.keys(), *c.values()] if isinstance(c, dict) else list(c) for c in (a, b))
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


# -- sizes -------------------------------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]

# The tensor that shows a module's sizes; a parametrization, or a hook of weight norm or pruning, gives it other names.
WEIGHTS = (
    "weight", "parametrizations.weight.original", "parametrizations.weight.original1", "weight_orig", "weight_v", "weight_ih_l0",
    "running_mean",
)  # fmt: skip


def size_attributes(model: nn.Module, before: Shapes, after: Shapes) -> list[tuple[str, nn.Module, dict[str, int]]]:
    """What modules say about their own sizes, as it will be, by their names.

    before, after: the shapes of the tensors that change."""
    found, name_at = [], holders(model)
    for prefix, module in model.named_modules():
        names = (name_at.get(f"{prefix}.{local}".lstrip(".")) for local in WEIGHTS)
        name = next((name for name in names if name in before), None)
        if name is not None and (values := _sizes(module, before[name], after[name])):
            found.append((prefix, module, values))
    return found


def _sizes(module: nn.Module, old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, int]:
    """The attributes of one module, by the shapes of its weight."""
    if isinstance(module, Convolution):
        groups = module.groups * new[0] // old[0] if module.groups > 1 else 1
        first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        return {first: new[0], second: new[1] * groups, "groups": groups}
    if isinstance(module, nn.Linear):
        return {"in_features": new[1], "out_features": new[0]}
    if isinstance(module, nn.RNNBase):
        return {"input_size": new[1]}
    if isinstance(module, NormWithStatistics):
        return {"num_features": new[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": new[0], "num_groups": module.num_groups * new[0] // old[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": new[0]}
    return {}


@contextlib.contextmanager
def resized(model: nn.Module, shapes: Shapes) -> Iterator[None]:
    """Within the context modules say of their sizes what they will once the model's tensors have the given shapes."""
    there = named_shapes(model)
    attributes = size_attributes(model, {n: shape for n, shape in there.items() if shape != tuple(shapes[n])}, shapes)
    before = [(module, {name: getattr(module, name) for name in values}) for _, module, values in attributes]
    try:
        for _, module, values in attributes:
            module.__dict__.update(values)
        yield
    finally:
        for module, values in before:
            module.__dict__.update(values)


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients that reach the gates but no parameter."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with in_mode(model, training=False), torch.enable_grad():
            model.requires_grad_(False)
            yield
    finally:
        for p, was in wanted:
            p.requires_grad_(was)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every batch norm by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
