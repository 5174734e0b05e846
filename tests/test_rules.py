"""What rules say of single operators, on every torch that is supported."""

import inspect

import models as nets
import pytest
import torch
from torch import nn
from torch.nn.modules import activation

from taylored import compact, masked, random_plan, trace, trace_rule

OVER_CHANNELS = {"GLU", "MultiheadAttention", "Softmax", "Softmin", "LogSoftmax", "Softmax2d"}
ACTIVATIONS = [cls for name in activation.__all__ if name not in OVER_CHANNELS for cls in [getattr(nn, name)]]


def activations():
    for cls in ACTIVATIONS:
        parameters = inspect.signature(cls).parameters
        options = {"threshold": 0.1, "value": 0.2} if cls is nn.Threshold else {}
        yield pytest.param(cls(**options), id=cls.__name__)
        if "inplace" in parameters:
            yield pytest.param(cls(**options, inplace=True), id=f"{cls.__name__}-inplace")


@pytest.mark.parametrize("layer", activations())
def test_every_activation_of_torch_works_channel_by_channel(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 3)).eval()
    x = nets.inputs()
    graph = trace(model, x)
    assert graph.prunable_filters == 8, graph.explain()
    plan = random_plan(graph, 0.5)
    with masked(model, graph, plan):
        expected = model(x)
    compact(model, plan)
    torch.testing.assert_close(model(x), expected)


@torch.library.custom_op("taylored_tests::swap_scale", mutates_args=())
def swap_scale(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3) * factor[:, None, None]


@swap_scale.register_fake
def _(x, factor):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[3], x.shape[2])


class Swaps(nn.Module):
    def __init__(self, moved):
        super().__init__()
        self.a, self.b, self.moved = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), moved
        self.factor = nn.Parameter(torch.rand(6))

    def forward(self, x):
        y = self.a(x)
        if not self.moved:
            return self.b(swap_scale(y, self.factor))
        z = swap_scale(y[..., :6].permute(0, 3, 2, 1), self.factor)  # [N, 6 columns, channels, rows]: the channels lie elsewhere
        return self.b(y * z.mean((1, 2, 3)).view(-1, 1, 1, 1))


def test_labels_that_a_rule_of_ones_own_forgets_stay():
    @trace_rule("taylored_tests::swap_scale")
    def rule(labels, func, args, kwargs, out):
        label = labels.channels(args[0], 1)
        labels.match(label, labels.channels(args[1], 0), "scaled by constants")
        labels.emit(out, 1, label)

    x = torch.randn(2, 3, 8, 8)
    assert trace(Swaps(False).eval(), x).prunable_filters == 6
    graph = trace(Swaps(True).eval(), x)
    assert graph.prunable_filters == 0 and "does not say what becomes of them" in graph.explain("a")
    with pytest.raises(TypeError, match="name"):
        trace_rule(swap_scale)
