"""Save a pruned model with its plan, and load it into a freshly built original.

One safetensors file: the model's tensors under their own names (so it is a state dict for any reader), the plan's index
vectors under names that start with "plan:", and a JSON header. Written to a temporary file, then renamed; loading
executes no code, checks everything, and only then touches the model.
"""

import os

import torch
from torch import nn

from taylored._compact import compact
from taylored._errors import CheckpointError, PlanError
from taylored._files import DamagedFile, read_tensors, write_tensors
from taylored._modules import check_module, named_tensors
from taylored._plan import PrunePlan

FORMAT = "taylored-1"


def save(
    model: nn.Module,
    plan: PrunePlan,
    path: str | os.PathLike,
    *,
    extra: dict | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model that `plan` was applied to. Atomic: a reader sees the old file or the new one.

    path: the file; its folder must exist. plan: against the original model (plans compose by `plan.then`). extra: JSON
    values and tensors: further tensors to keep along, both given back by `load`. Raises PlanError if the model does not
    have the shapes that the plan leaves."""
    model = check_module(model, "save(model, plan, path)")
    if not isinstance(plan, PrunePlan):
        raise TypeError(f"plan must be a PrunePlan, got {type(plan).__name__}: save(model, plan, path)")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file's, got {type(path).__name__}: save(model, plan, path)")
    for name, tensor in named_tensors(model).items():
        if name in plan.shapes and tuple(tensor.shape) != plan.shape_after(name):
            raise PlanError(
                f"the model is not what the plan leaves: {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{plan.shape_after(name)}. Compact it first; of several plans in a row save `first.then(second)`"
            )
    state: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault(
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name, name
        )
        if first != name:
            aliases[name] = first
        else:
            state[name] = tensor
    for (cut, d), indices in plan.keep.items():
        state[f"plan:keep/{d}/{cut}"] = indices.clone()  # one tensor may be that of several dimensions
    for group, units in plan.removed.items():
        state[f"plan:removed/{group}"] = units
    for name, tensor in (tensors or {}).items():
        state[f"extra:{name}"] = tensor
    header = {
        "aliases": aliases,
        "units": plan.units,
        "shapes": plan.shapes,
        "flops": plan.flops,
        "params": plan.params,
        "extra": extra or {},
    }
    write_tensors(path, FORMAT, header, state)


def load(model: nn.Module, path: str | os.PathLike) -> PrunePlan:
    """Prune a freshly built original as the file's plan says and give it the file's weights. Returns the plan.

    Raises CheckpointError, with the model untouched, if the file is foreign, damaged, or of another model."""
    plan, _, _ = load_all(check_module(model, "load(model, path)"), path)
    return plan


def load_all(model: nn.Module, path: str | os.PathLike, accept=None) -> tuple[PrunePlan, dict, dict[str, torch.Tensor]]:
    """As `load`; returns (plan, extra, extra tensors). accept(extra) may refuse the file, by an exception."""
    model = check_module(model)
    state, plan, header = read(path)
    if accept is not None:
        accept(header["extra"])
    target = model.state_dict()
    weights = {n: t for n, t in state.items() if not n.startswith(("plan:", "extra:"))}
    weights |= {name: weights[first] for name, first in header["aliases"].items()}
    if missing := [name for name in target if name not in weights]:
        raise CheckpointError(f"{path} does not fit the model: it lacks {missing[:3]}{'...' if len(missing) > 3 else ''}")
    if foreign := [name for name in weights if name not in target]:
        raise CheckpointError(f"{path} does not fit the model, which lacks {foreign[:3]}{'...' if len(foreign) > 3 else ''}")
    for name, tensor in weights.items():
        first = header["aliases"].get(name, name)
        if first in plan.shapes and tuple(target[name].shape) != plan.shapes[first]:
            raise CheckpointError(
                f"{path} was pruned from {name!r} of shape {plan.shapes[first]}, the model's is {tuple(target[name].shape)}: "
                "load takes the original, freshly built; a file of several rounds must have been saved with first.then(second)"
            )
        expected = plan.shape_after(first) if first in plan.shapes else tuple(target[name].shape)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, expected {expected}")
    try:
        compact(model, plan, release=True)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    model.load_state_dict(weights)
    return plan, header["extra"], {n.removeprefix("extra:"): t for n, t in state.items() if n.startswith("extra:")}


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], PrunePlan, dict]:
    """A checkpoint's tensors, its plan and its header, checked against its digest."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file's, got {type(path).__name__}: load(model, path)")
    try:
        header, state = read_tensors(path, FORMAT)
        keep, removed = {}, {}
        for name, tensor in state.items():
            if name.startswith("plan:keep/"):
                d, _, tensor_name = name.removeprefix("plan:keep/").partition("/")
                keep[tensor_name, int(d)] = tensor
            elif name.startswith("plan:removed/"):
                removed[name.removeprefix("plan:removed/")] = tensor
        shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
        plan = PrunePlan(removed, keep, header["units"], shapes, tuple(header["flops"]), tuple(header["params"]))
    except DamagedFile as error:
        raise CheckpointError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return state, plan, header


def difference(there: dict, here: dict) -> str:
    """What tells a file's settings from the present ones: all their names, and both values of the first; or nothing."""
    differ = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    return (
        f"({', '.join(differ)}): {differ[0]} is {there.get(differ[0])!r} there and {here.get(differ[0])!r} here" if differ else ""
    )
