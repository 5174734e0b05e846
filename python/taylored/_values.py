"""Frozen data classes that hold arrays, as values: compared by what they hold, and turned into JSON and tensors and back.

`encode` makes of a value what JSON can say, with numbers in the place of arrays and tensors, and `decode` makes the value
again. It makes classes that it is given and no others: a file cannot name what is to be run.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch


class Value:
    """Base of frozen data classes with arrays in them: equal if all fields are that take part in comparisons."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and same(_compared(self), _compared(other))

    def __hash__(self) -> int:
        """Of the fields that are cheap to look at."""
        return hash(tuple(v for v in _compared(self).values() if isinstance(v, (str, int, bool))))


def _compared(value) -> dict[str, object]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}


def same(a, b) -> bool:
    """Whether two nested values hold the same, arrays included."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, torch.Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and (a.stride() == b.stride() if a.is_meta else torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def encode(value) -> tuple[object, dict[str, torch.Tensor]]:
    """A value as JSON, and the tensors that it names. Raises ValueError for what is no data: a function, an open file."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[object, str] = {}  # of equal arrays one is written

    def array(x, kind):
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x.detach().cpu().contiguous()
        key = (x.dtype, tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        name = names.setdefault(key, f"array/{len(names)}")
        tensors[name] = x
        return [kind, name]

    def of(x):
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        if isinstance(x, np.ndarray):
            return array(x, "array")
        if isinstance(x, torch.Tensor) and x.is_meta:
            return ["meta", list(x.shape), list(x.stride()), _dtype_name(x.dtype)]
        if isinstance(x, torch.Tensor):
            return array(x, "tensor")
        if isinstance(x, torch.dtype):
            return ["dtype", _dtype_name(x)]
        if type(x) in (list, tuple):
            return [type(x).__name__, *map(of, x)]
        if type(x) is torch.Size:
            return ["tuple", *x]
        if type(x) is dict:
            return ["dict", *([of(key), of(item)] for key, item in x.items())]
        if isinstance(x, Value):
            return [type(x).__name__, *map(of, _compared(x).values())]
        raise ValueError(f"a {type(x).__module__}.{type(x).__name__} cannot be saved: it is no number, text, tensor or container")

    return of(value), tensors


def decode(code, tensors: dict[str, torch.Tensor], classes: Iterable[type[Value]]):
    """What `encode` was given. classes: those that there may be. Raises ValueError for anything else."""
    known = {cls.__name__: cls for cls in classes}

    def of(x):
        if not isinstance(x, list):
            if x is not None and not isinstance(x, (bool, int, float, str)):
                raise ValueError(f"{x!r} has no meaning here")
            return x
        kind, *rest = x
        if kind == "array":
            return arrays[rest[0]]
        if kind == "tensor":
            return tensors[rest[0]]
        if kind == "meta":
            return torch.empty_strided(*rest[:2], dtype=_dtype(rest[2]), device="meta")
        if kind == "dtype":
            return _dtype(rest[0])
        if kind in ("list", "tuple"):
            return [list, tuple][kind == "tuple"](map(of, rest))
        if kind == "dict":
            return {of(key): of(item) for key, item in rest}
        if kind in known:
            names = [field.name for field in dataclasses.fields(known[kind]) if field.compare]
            return known[kind](**dict(zip(names, map(of, rest), strict=True)))
        raise ValueError(f"{kind!r} is no kind of value that may be here")

    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    return of(code)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found
