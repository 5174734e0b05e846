"""Save a pruned model with its plan, and load it into a freshly built original.

One safetensors file: the model's tensors under their own names (so it is a state dict for any reader), the plan's index
vectors under names that start with "plan:", and a JSON header. Written to a temporary file, then renamed; loading
executes no code, checks everything, and only then touches the model.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from taylored.compact import compact
from taylored.files import digest, write_atomically
from taylored.plan import PlanError, PrunePlan
from taylored.trace import named_tensors, unwrapped

FORMAT = "taylored-1"


class CheckpointError(ValueError):
    """A file is not a checkpoint, is damaged, or does not belong to the model."""


def save(path, model: nn.Module, plan: PrunePlan, *, extra: dict | None = None, tensors: dict[str, torch.Tensor] | None = None):
    """Write a model that `plan` was applied to. Atomic: a reader sees the old file or the new one.

    path: the file; its folder must exist. plan: against the original model (plans compose by `plan.then`). extra: JSON
    values and tensors: further tensors to keep along, both given back by `load`. Raises PlanError if the model does not
    have the shapes that the plan leaves."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: save(path, model, plan)")
    model = unwrapped(model)
    for name, tensor in named_tensors(model).items():
        if name in plan.shapes and tuple(tensor.shape) != plan.shape_after(name):
            raise PlanError(
                f"the model is not what the plan leaves: {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{plan.shape_after(name)}. Compact it first; of several plans in a row save `first.then(second)`"
            )
    state, aliases, seen = {}, {}, {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else name, name)
        if first != name:
            aliases[name] = first
        else:
            state[name] = tensor
    for (tensor, d), indices in plan.keep.items():
        state[f"plan:keep/{d}/{tensor}"] = indices.clone()  # one tensor may be that of several dimensions
    for group, units in plan.removed.items():
        state[f"plan:removed/{group}"] = units
    for name, tensor in (tensors or {}).items():
        state[f"extra:{name}"] = tensor
    state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    header = {
        "aliases": aliases,
        "units": plan.units,
        "shapes": plan.shapes,
        "flops": plan.flops,
        "params": plan.params,
        "extra": extra or {},
    }
    header = json.loads(json.dumps(header))
    header["digest"] = _digest(state, header)
    write_atomically(Path(path), serialize(state, metadata={"format": FORMAT, "taylored": json.dumps(header)}))


def load(path, model: nn.Module):
    """Prune a freshly built original as the file's plan says and give it the file's weights. Returns the plan.

    Raises CheckpointError, with the model untouched, if the file is foreign, damaged, or of another model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: load(path, model)")
    plan, _, _ = load_all(path, model)
    return plan


def load_all(path, model, accept=None):
    """As `load`; returns (plan, extra, extra tensors). accept(extra) may refuse the file, by an exception."""
    model = unwrapped(model)
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
                f"{path} was pruned from {name!r} of shape {plan.shapes[first]}, the model's is {tuple(target[name].shape)}"
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


def read(path) -> tuple[dict[str, torch.Tensor], PrunePlan, dict]:
    """A checkpoint's tensors, its plan and its header, checked against its digest."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} was not written by taylored.save (format {metadata.get('format')!r})")
            header = json.loads(metadata["taylored"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if _digest(state, header) != header.get("digest"):
            raise CheckpointError(f"{path} is damaged: its contents do not match their digest")
        keep, removed = {}, {}
        for name, tensor in state.items():
            if name.startswith("plan:keep/"):
                d, _, tensor_name = name.removeprefix("plan:keep/").partition("/")
                keep[tensor_name, int(d)] = tensor
            elif name.startswith("plan:removed/"):
                removed[name.removeprefix("plan:removed/")] = tensor
        shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
        plan = PrunePlan(removed, keep, header["units"], shapes, tuple(header["flops"]), tuple(header["params"]))
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CheckpointError(f"{path} is damaged or no safetensors file: {type(error).__name__}: {error}") from error
    return state, plan, header


def difference(there: dict, here: dict) -> str:
    """What tells a file's settings from the present ones: all their names, and both values of the first; or nothing."""
    differ = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    return (
        f"({', '.join(differ)}): {differ[0]} is {there.get(differ[0])!r} there and {here.get(differ[0])!r} here" if differ else ""
    )


def _digest(state, header) -> str:
    return digest(json.dumps({k: v for k, v in header.items() if k != "digest"}, sort_keys=True), state)
