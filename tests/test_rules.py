"""What rules say of single operators, on every torch that is supported."""

import inspect

import models as nets
import pytest
import torch
from torch import nn
from torch.nn.modules import activation

from taylored import compact, masked, random_plan, trace

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
