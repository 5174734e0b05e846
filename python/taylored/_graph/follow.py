"""Which batch norm alone follows a layer? Where a layer has no bias, the running mean there takes what one would hold."""

import torch

from taylored._errors import TraceError
from taylored._graph.labels import tensors_of
from taylored._graph.mode import LabelMode, run_pass, stand_ins_of
from taylored._graph.rules import RULES, batch_norm
from taylored._graph.values import ChannelGraph
from taylored._modules import named_tensors

NORMS = frozenset(packet for packet, rule in RULES.items() if rule is batch_norm)
RUNNING_MEAN = 3  # the argument of all of NORMS that it is


class FollowMode(LabelMode):
    """Notes what takes the outputs of layers, and what batch norms take; labels there are none."""

    labelled = False

    def __init__(self, model, values, layers):
        super().__init__(model, values)
        self.layers = layers
        self.made: dict[int, str] = {}  # id of a layer's output -> the layer
        self.uses: dict[str, list[int | None]] = {}  # layer -> ids of the running means that it goes to, None for all else
        self.fed: dict[int, list[str | None]] = {}  # id of a running mean -> the layers that it belongs to the outputs of

    def leave_module(self, module, args, output):
        output = super().leave_module(module, args, output)
        if (name := self.modules.get(module)) in self.layers and isinstance(output, torch.Tensor):
            self.made[id(output)] = name
            self.hold(output)
        return output

    def execute(self, func, args, kwargs):
        out = super().execute(func, args, kwargs)
        if func.overloadpacket in NORMS:
            mean = args[RUNNING_MEAN]
            self.fed.setdefault(id(mean), []).append(self.made.get(id(args[0])))
            self._used(args[:1], id(mean))
            args = args[1:]
        self._used(tensors_of(args, kwargs), None)
        return out

    def freeze_all(self, tensor, reason, dims=None):  # the model's outputs, at the end of a pass
        self._used([tensor], None)
        return ()

    def _used(self, tensors, by):
        for t in tensors:
            if id(t) in self.made:
                self.uses.setdefault(self.made[id(t)], []).append(by)


def following_norms(model: torch.nn.Module, graph: ChannelGraph, layers: set[str]) -> dict[str, str]:
    """Layer -> the name of the running mean of the batch norm that alone takes its output, and takes no other's."""
    evaluation = graph.passes[0]
    mode = FollowMode(model, evaluation.values, layers)
    stand_ins = stand_ins_of(mode, model, named_tensors(model))
    names = {id(t): name for name, t in stand_ins.items()}
    try:
        run_pass(model, stand_ins, mode, False, evaluation.args, evaluation.kwargs)
    except TraceError:
        return {}
    alone = {layer: uses[0] for layer, uses in mode.uses.items() if len(set(uses)) == 1 and uses[0] in names}
    return {layer: names[mean] for layer, mean in alone.items() if set(mode.fed[mean]) == {layer}}
