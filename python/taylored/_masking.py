"""Removal is zeroing: run a model as if units were gone, by making them zero at the inputs of all their consumers."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from taylored._graph.mode import labels_running
from taylored._graph.values import ChannelGraph, check_fit
from taylored._modules import unwrapped
from taylored._plan import PrunePlan
from taylored._torch_compat import watch_hooks


def masked(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> contextlib.AbstractContextManager[nn.Module]:
    """Within the context the model computes as if the plan's units were removed: zeros at their consumers' inputs.

    Raises TypeError for arguments in another order, ValueError if the graph is not the model's."""
    if not isinstance(plan, PrunePlan):
        raise TypeError(f"plan must be a PrunePlan, got {type(plan).__name__}: masked(model, graph, plan)")
    return zeroed(model, graph, plan.removed)


@contextlib.contextmanager
def zeroed(model: nn.Module, graph: ChannelGraph, units: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
    """Within the context the model computes as if the units (group name -> unit indices) were removed: their channels are
    zero at the inputs of all their consumers."""
    check_fit(graph, model)
    model = unwrapped(model)
    lost: dict[str, list[torch.Tensor]] = {}
    for name, indices in units.items():
        for consumer, slots in graph.group(name).inputs.items():
            lost.setdefault(consumer, []).append(slots[indices].flatten())
    handles = []
    watch_hooks()
    try:
        for consumer, channels in lost.items():
            layer = graph.layers[consumer]
            mask = torch.ones(layer.width)
            mask[torch.cat(channels)] = 0
            handles.append(model.get_submodule(consumer).register_forward_pre_hook(_zeroing(mask, layer.axis)))
        yield model
    finally:
        for handle in handles:
            handle.remove()
        watch_hooks()


def _zeroing(mask, axis):
    def hook(_module, args):
        if not torch.compiler.is_compiling() and labels_running():
            return args
        x = args[0]
        m = mask.to(x.device, x.dtype)
        return (x * m.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]), *args[1:])

    return hook
