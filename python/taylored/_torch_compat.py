"""All that is private to torch or differs between its versions, in one place.

Each name says on which versions it was checked; `make floor` runs the tests of the core on the oldest. What torch can only
switch for the whole process is switched here, under a lock.
"""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload  # 2.10 to 2.14
from torch.utils._python_dispatch import TorchDispatchMode  # 2.10 to 2.14
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only, tree_unflatten  # 2.10 to 2.14
from torch.utils.flop_counter import flop_registry  # 2.10 to 2.14

__all__ = ["OpOverload", "TorchDispatchMode", "flop_registry", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"]

Convolution = nn.modules.conv._ConvNd  # the base class of all convolutions; 2.10 to 2.14
BatchNorm = nn.modules.batchnorm._BatchNorm  # of all batch norms; 2.10 to 2.14
NormWithStatistics = nn.modules.batchnorm._NormBase  # of batch and instance norms; 2.10 to 2.14

_lock = threading.RLock()


# -- modules -----------------------------------------------------------------------------------------------------------

MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}  # those that torch gives to every module; 2.10 to 2.14


def own_tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor | None]]:
    """A module's own parameters and buffers, shared ones too, which named_parameters leaves out (2.10 to 2.14)."""
    return itertools.chain(module._parameters.items(), module._buffers.items())


def compiled_from(module: nn.Module) -> nn.Module | None:
    """What a module that torch.compile has returned was made of (2.10 to 2.14)."""
    return getattr(module, "_orig_mod", None)


@contextlib.contextmanager
def around_calls(modules: Iterable[nn.Module], enter: Callable, leave: Callable) -> Iterator[None]:
    """Within the context enter(module, args) -> args and leave(module, args, output) -> output are called around every call of
    the modules, before their own hooks, and leave after an exception too. What register_forward_pre_hook and
    register_forward_hook do with prepend=True, at a tenth of their price, which for a thousand modules is that of a trace
    (2.10 to 2.14)."""
    key: Any = object()  # torch's own are integers
    modules = list(modules)
    try:
        for module in modules:
            kinds: Any = ((module._forward_pre_hooks, enter), (module._forward_hooks, leave))
            for hooks, hook in kinds:
                hooks[key] = hook
                if len(hooks) > 1:
                    hooks.move_to_end(key, last=False)
            module._forward_hooks_always_called[key] = True
        yield
    finally:
        for module in modules:
            module._forward_pre_hooks.pop(key, None)
            module._forward_hooks.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


is_lazy = nn.parameter.is_lazy  # whether a parameter has no shape yet; 2.10 to 2.14


# -- operators ---------------------------------------------------------------------------------------------------------


def operator_name(func) -> str:
    """ "namespace::name" of an operator's overload (2.10 to 2.14)."""
    return func._schema.name


def argument_defaults(func) -> dict[str, object]:
    """Name -> default value of an operator's arguments, in order (2.10 to 2.14)."""
    return {argument.name: argument.default_value for argument in func._schema.arguments}


def writes(func) -> bool:
    """Whether an operator writes on an argument (2.10 to 2.14)."""
    return func._schema.is_mutable


def symbol(size: torch.SymInt):
    """The SymPy expression of a size that torch.export keeps open (2.10 to 2.14)."""
    return size.node.expr


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device's convolutions do: on others torch runs them tens of times slower than in float32 (2.10 to 2.14)."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


# -- autograd ----------------------------------------------------------------------------------------------------------


def current_backward() -> int:
    """The number of the backward pass that this thread is in, -1 outside of one (2.10 to 2.14)."""
    return torch._C._current_graph_task_id()


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Call back when the backward pass ends that this thread is in; one that fails never ends (2.10 to 2.14)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


# -- optimizers --------------------------------------------------------------------------------------------------------


def forget_element_count(optimizer: torch.optim.Optimizer) -> None:
    """LBFGS remembers how many elements its parameters have (2.10 to 2.14)."""
    optimizer._numel_cache = None  # type: ignore[attr-defined]


# -- torch.compile: what the process has compiled is one for all threads -------------------------------------------------


def _dynamo():
    return sys.modules.get("torch._dynamo")  # not loaded: nothing was compiled, and importing it takes a second


def watch_hooks() -> None:
    """Let compiled code look whether hooks have come or gone, which torch leaves out; what was compiled before is made anew.

    Process-wide, and stays so: it costs a guard per module, and other threads' models stay correct. Called before hooks come
    and after they went: torch.compile may have been loaded, and used, in between (2.10 to 2.14)."""
    with _lock:
        if (dynamo := _dynamo()) is not None and dynamo.config.skip_nnmodule_hook_guards:
            dynamo.config.skip_nnmodule_hook_guards = False
            torch.compiler.reset()


def forget_compiled() -> None:
    """Drop compiled code, of which torch keeps no more than a few versions per function and would give up. Process-wide, for
    torch does not know which function calls a model: others' is compiled anew at its next call (2.10 to 2.14)."""
    with _lock:
        if _dynamo() is not None:
            torch.compiler.reset()


_eager = 0  # how many threads want it
_stance = contextlib.ExitStack()  # takes back what was set for them


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Within the context nothing compiled runs, nor is anything compiled. Process-wide: meanwhile other threads' compiled models
    run as they were written, slower and with the same result. Nothing is set where nothing was compiled (2.10 to 2.14)."""
    global _eager
    if _dynamo() is None:
        yield
        return
    with _lock:
        if not _eager:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _eager += 1
    try:
        yield
    finally:
        with _lock:
            _eager -= 1
            if not _eager:
                _stance.close()
