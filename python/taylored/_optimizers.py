"""An optimizer's state: what of it is cut along with the parameters, and how (one table, `RULES`), and how it is kept in a file.

| optimizer | its state | is cut |
| --- | --- | --- |
| any other | what has a parameter's shape: `exp_avg`, `exp_avg_sq`, `momentum_buffer`, ... | as the parameter |
| | what has it with some dimensions reduced to 1: Adafactor's `row_var`, `col_var` | in the others |
| | numbers, and tensors of another form: `step` | not |
| LBFGS | vectors of all parameters, end to end: `d`, `prev_flat_grad`, `old_dirs`, `old_stps` | as all of them |

To add an optimizer whose state has another form, write a `StateRule` and enter it by its class.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.optim import LBFGS, Optimizer

from taylored._errors import PlanError
from taylored._plan import PrunePlan
from taylored._torch_compat import forget_element_count

Optimizers = Optimizer | Sequence[Optimizer] | None


class StateTensor(NamedTuple):
    """A tensor of an optimizer's state. name: "exp_avg of conv.weight"; owner: the parameter whose cuts it takes, None for a
    vector of all; cuts: dimension -> the indices that stay."""

    name: str
    owner: str | None
    tensor: torch.Tensor
    cuts: dict[int, torch.Tensor]


def _nothing(optimizer: Optimizer) -> None:
    """Most optimizers remember nothing beside their state."""


@dataclasses.dataclass(frozen=True)
class StateRule:
    """tensors(plan, optimizer, names): the state to cut, where names has id(parameter) -> its name in the model.
    resized(optimizer): called whenever its parameters have got other sizes. restart(optimizer): called when what was cut off
    comes back and state has been made since that cannot grow. needs_closure: its step asks for the loss, maybe several times."""

    tensors: Callable[[PrunePlan, Optimizer, dict[int, str]], Iterator[StateTensor]]
    resized: Callable[[Optimizer], None] = _nothing
    restart: Callable[[Optimizer], None] = _nothing
    needs_closure: bool = False


def rule_of(optimizer: Optimizer) -> StateRule:
    """The first rule in `RULES` of one of the optimizer's classes."""
    return next(RULES[cls] for cls in type(optimizer).__mro__ if cls in RULES)


def as_optimizers(optimizer: Optimizers) -> list[Optimizer]:
    """None, an optimizer or several of them -> a list. Raises TypeError for what is none."""
    optimizers = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for opt in optimizers:
        if not isinstance(getattr(opt, "param_groups", None), list):
            raise TypeError(f"optimizer must be a torch.optim optimizer or a list of them, got {type(opt).__name__}")
    return optimizers


def state_tensors(plan: PrunePlan, optimizer: Optimizer, names: dict[int, str]) -> Iterator[StateTensor]:
    """All of an optimizer's state that the plan cuts. Raises PlanError for an optimizer of another model."""
    if not any(id(p) in names for p in parameters_of(optimizer)):
        raise PlanError("optimizer has none of the model's parameters: was it made for another model?")
    return rule_of(optimizer).tensors(plan, optimizer, names)


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _per_parameter(plan, optimizer, names):
    """State that has a parameter's shape, or that shape with some dimensions reduced to 1."""
    cuts = plan.cuts
    for p in parameters_of(optimizer):
        name = names.get(id(p))
        for key, value in optimizer.state.get(p, {}).items() if name in cuts else ():
            if isinstance(value, torch.Tensor) and value.ndim == p.ndim:
                fits = all(v in (s, 1) for v, s in zip(value.shape, p.shape, strict=True))
                mine = {d: indices for d, indices in cuts[name].items() if value.shape[d] == p.shape[d]}
                if fits and mine:
                    yield StateTensor(f"{key} of {name}", name, value, mine)
                if fits:
                    continue
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                warnings.warn(
                    f"{type(optimizer).__name__}: the state {key!r} of {name!r}, of shape {tuple(value.shape)}, is not cut: it "
                    f"has not the parameter's shape {tuple(p.shape)}; its next step may fail",
                    stacklevel=5,
                )


def _forget(optimizer: Optimizer) -> None:
    optimizer.state.clear()


def _of_all_parameters(plan, optimizer, names):
    """Vectors of all parameters, end to end."""
    parameters = parameters_of(optimizer)
    kept, size = _kept_of_all(plan, [(names.get(id(p)), p) for p in parameters]), sum(p.numel() for p in parameters)
    for state in optimizer.state.values():
        for key, value in state.items():
            for number, tensor in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(tensor, torch.Tensor) and tensor.shape == (size,):
                    yield StateTensor(f"{key}[{number}] of step {state['n_iter']}", None, tensor, {0: kept})


def _kept_of_all(plan, parameters) -> torch.Tensor:
    """What stays of a vector of all parameters, (name, parameter), end to end."""
    kept, start = [], 0
    for name, p in parameters:
        shape = plan.shapes.get(name, p.shape)
        stretch = torch.arange(math.prod(shape)).view(shape)
        for d, indices in plan.cuts.get(name, {}).items():
            stretch = stretch.index_select(d, indices.cpu())
        kept.append(start + stretch.flatten())
        start += math.prod(shape)
    return torch.cat(kept)


RULES: dict[type, StateRule] = {
    LBFGS: StateRule(_of_all_parameters, forget_element_count, _forget, needs_closure=True),
    object: StateRule(_per_parameter),
}


# -- in a file ---------------------------------------------------------------------------------------------------------


def state_in_file(optimizer: Optimizer) -> tuple[dict, dict[str, torch.Tensor]]:
    """An optimizer's state as JSON and tensors; what is neither is left out, and is the new optimizer's when it comes back."""
    state, tensors = optimizer.state_dict(), {}
    plain: dict[str, dict] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            elif isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):  # LBFGS's history
                tensors |= {f"optimizer/{index}/{key}/{number}": v for number, v in enumerate(value)}
            elif is_json(value):
                plain.setdefault(str(index), {})[key] = value
    groups = [{k: v for k, v in group.items() if is_json(v)} for group in state["param_groups"]]
    return {"state": plain, "param_groups": groups}, tensors


def take_state(optimizer: Optimizer, plain: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Give an optimizer the state that `state_in_file` made of another one's."""
    state: dict[int, dict] = {int(i): dict(entry) for i, entry in plain["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key, *number = name.split("/")
            entry = state.setdefault(int(index), {})
            if number:
                entry.setdefault(key, {})[int(number[0])] = tensor
            else:
                entry[key] = tensor
    for entry in state.values():
        entry |= {key: [value[n] for n in sorted(value)] for key, value in entry.items() if isinstance(value, dict)}
    groups = [
        {**new, **{k: tuple(v) if isinstance(new.get(k), tuple) else v for k, v in old.items()}}
        for new, old in zip(optimizer.state_dict()["param_groups"], plain["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def is_json(value) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
