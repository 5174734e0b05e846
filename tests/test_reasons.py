"""What `explain` says of channels that stay: the true cause, the module and the line."""

import torch
from test_situations import Between, X, exact
from torch import nn
from torch.nn import functional as F

from taylored import trace


def test_reasons_name_what_is_wrong():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.hidden, self.c = nn.Conv2d(3, 8, 3), [nn.Conv2d(8, 8, 3)], nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.c(self.hidden[0](self.a(x)))

    assert "plain list" in trace(Listed(), X).explain("a")
    chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert "no dimension for examples" in trace(chain, X[0]).explain("0")

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.c(self.b(input=self.a(x)))

    assert "called by keyword" in trace(Named(), X).explain("b")

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.rnn = nn.Conv1d(3, 8, 3), nn.LSTM(8, 4)

        def forward(self, x):
            return self.rnn(nn.utils.rnn.pack_padded_sequence(self.a(x).permute(2, 0, 1), [4, 3]))[0].data

    assert "takes a PackedSequence" in trace(Packed(), torch.randn(2, 3, 6)).explain("rnn")


def line_of(function, offset=1):
    """'file.py:12', so many lines below the function's first."""
    return f"{__file__}:{function.__code__.co_firstlineno + offset}"


def test_a_reason_names_the_module_and_the_line_of_the_forward():
    def function(y):
        y = y * 2
        return y.softmax(1)

    assert line_of(function, 2) in trace(Between(function), X).explain("a")

    class Block(nn.Module):
        def forward(self, y):
            return y / y.norm(dim=1, keepdim=True)

    text = trace(Between(Block()), X).explain("a")
    assert "in 'function'" in text and line_of(Block.forward) in text, text
    # An nn.Sequential has no line of its own; the one that calls `trace` is not the model's.
    chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(5), nn.Conv2d(8, 4, 1))
    text = trace(chain, X).explain("0")
    assert "avg_pool3d in '1' works over the channels" in text and ".py" not in text, text


def test_what_follows_on_kept_channels_is_kept_for_their_reason():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 16, 16])
            self.depthwise, self.scale = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Parameter(torch.ones(8, 1, 1))
            self.b, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.norm(self.a(x))
            return self.last(y + self.b(self.depthwise(y)) * self.scale)

    graph = trace(Block(), X)
    assert graph.prunable_filters == 0
    for layer in ("a", "depthwise", "b"):
        assert "layer norm 'norm' takes statistics" in graph.explain(layer), graph.explain(layer)
    # A constant that no operator without a rule has taken channels from is a constant.
    assert "meets a constant" in trace(Between(lambda y: y * torch.linspace(0, 1, 8).view(8, 1, 1)), X).explain("a")


def test_deformable_convolutions_lose_filters_and_keep_their_inputs():
    from torchvision.ops import DeformConv2d

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.offsets = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 3, padding=1)
            self.deformed, self.b = DeformConv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(F.relu(self.deformed(y, self.offsets(y))))

    graph = exact(Net(), X, 0)  # of the convolutions that explain() lists; those of the deformable one are units all the same
    assert graph.units == 12 and "places in 'deformed' are computed" in graph.explain("offsets"), graph.explain()
