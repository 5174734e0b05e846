"""Models that are put together in unusual ways: what can be pruned is, exactly; what cannot is frozen for a stated reason."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import register_dataclass, tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import taylored
from taylored import trace, trace_rule


def around(layer, channels=12):
    """A convolution before a layer of 8 to `channels` channels, one behind it, and a head."""
    behind = [nn.Conv2d(channels, 6, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), layer, nn.Tanh(), *behind)


class FunctionalWeight(nn.Module):
    """A convolution without a module."""

    def __init__(self):
        super().__init__()
        self.stem, self.weight = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.randn(10, 8, 3, 3) / 8)
        self.bias, self.last, self.head = nn.Parameter(torch.randn(10)), nn.Conv2d(10, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = F.conv2d(self.stem(x).tanh(), self.weight, self.bias, padding=1)
        return self.head(self.last(x.tanh()).tanh().mean((2, 3)))


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al., arXiv:1903.10520)."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.two.weight, self.head = self.one.weight, nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x).tanh()).tanh()).mean((2, 3)))


class Sequence(nn.Module):
    """Two convolutions, whose map is read position by position."""

    def __init__(self, reader, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, 8, 3, stride=2, padding=1) for c in (3, 8))
        self.reader, self.head = reader, nn.Linear(width, 5)

    def read(self, x):
        return self.reader(x)

    def forward(self, x):
        return self.head(self.read(self.second(self.first(x).tanh()).flatten(2).transpose(1, 2)).mean(1))


class Recurrent(Sequence):
    def read(self, x):
        return self.reader(x)[0]


class TimeFirst(Recurrent):
    def read(self, x):
        return super().read(x.transpose(0, 1)).transpose(0, 1)


class Attention(Sequence):
    def read(self, x):
        return self.reader(x, x, x, need_weights=False)[0]


@dataclasses.dataclass
class Found:
    logits: torch.Tensor
    maps: list


register_dataclass(Found)


class Structured(nn.Module):
    """Dictionaries, lists, keyword arguments and a data class, in and out."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(14, 6, 1), nn.Linear(6, 5)

    def forward(self, pair, *, options):
        x = self.last(torch.cat([self.left(pair["images"][0]), self.right(pair["images"][1])], 1)).tanh()
        return {"found": Found(self.head(x.mean((2, 3)) * options["scale"]), [x.mean()])}


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
STRUCTURED = {"pair": {"images": [IMAGES, IMAGES.flip(0)]}, "options": {"scale": torch.tensor(2.0)}}
NETS = {  # how to make it, the filters of its convolutions that can go, why others cannot
    "weight_norm": (lambda: around(parametrizations.weight_norm(nn.Conv2d(8, 12, 3))), 18, "weight norm in '2.parametriz"),
    "weight_norm_hook": (lambda: around(nn.utils.weight_norm(nn.Conv2d(8, 12, 3))), 18, "weight norm in '2' divides"),
    "weight_norm_depthwise": (lambda: around(parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=8)), 8), 22, ""),
    "spectral_norm": (lambda: around(parametrizations.spectral_norm(nn.Conv2d(8, 12, 3))), 6, "aten.mv in"),
    "spectral_norm_hook": (lambda: around(nn.utils.spectral_norm(nn.Conv2d(8, 12, 3))), 6, "aten.mv in"),
    "orthogonal": (lambda: around(parametrizations.orthogonal(nn.Conv2d(8, 12, 3))), 6, "computed from all of them"),
    "standardised": (lambda: around(Standardised(8, 12, 3)), 18, "aten.mean in '2' works over the channels"),
    "functional": (FunctionalWeight, 6, "outside of a convolution or linear layer"),
    "tied": (Tied, 24, ""),
    "lstm": (lambda: Recurrent(nn.LSTM(8, 7, batch_first=True), 7), 16, ""),
    "lstm_two_ways": (lambda: Recurrent(nn.LSTM(8, 7, 2, batch_first=True, bidirectional=True), 14), 16, ""),
    "gru_time_first": (lambda: TimeFirst(nn.GRU(8, 7), 7), 16, ""),
    "rnn": (lambda: Recurrent(nn.RNN(8, 7, batch_first=True), 7), 16, ""),
    "attention": (lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True), 8), 8, "multiplied by weights in 'reader'"),
    "encoder": (lambda: Sequence(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8), 8, "'reader"),
    "structured": (Structured, 14, "works over the channels"),
    "synchronised": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(around(nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)))), 26, ""),
}  # fmt: skip


def run(model, inputs):
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return torch.cat([t.flatten() for t in tree_leaves(output)])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("name", NETS)
def test_removal_is_zeroing_and_training_goes_on(name):
    make, prunable, reason = NETS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    inputs = torch.utils._pytree.tree_map(lambda t: t.double(), STRUCTURED if name == "structured" else IMAGES)
    run(model, inputs)
    graph = trace(model, inputs)
    assert graph.prunable_filters == prunable and reason in graph.explain()
    optimizer = torch.optim.Adam(model.parameters())
    with taylored.TaylorScorer(model, graph) as scorer:
        run(model, inputs).square().mean().backward()
    optimizer.step()
    scores = scorer.scores()
    assert all(bool((s > 0).any()) for s in scores.values())
    plan = taylored.make_plan(graph, scores, remove_units=graph.units // 2)
    with torch.no_grad(), taylored.masked(model, graph, plan):
        expected = run(model, inputs)
    taylored.compact(model, plan, optimizer)
    with torch.no_grad():
        found = run(model, inputs)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    run(model.train(name != "synchronised"), inputs).square().mean().backward()
    optimizer.step()
    assert trace(model.eval(), inputs).flops == plan.flops[1]


@pytest.mark.parametrize("name", ["lstm", "lstm_two_ways", "gru_time_first", "rnn"])
def test_the_steps_of_a_recurrent_layer_are_counted_and_not_run(name):
    model, x = NETS[name][0]().double().eval(), IMAGES.double()
    with FlopCounterMode(display=False) as counter:
        model(x)
    operators = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(func)
            return func(*args, **(kwargs or {}))

    counts = []
    for images in (x, torch.cat([x] * 3, 3)):  # three times the steps
        operators.clear()
        with Watch():
            graph = trace(model, images)
        counts.append(len(operators))
        assert images is not x or graph.flops == counter.get_total_flops()
    assert counts[0] == counts[1] and graph.flops > 2 * counter.get_total_flops()


def test_each_call_of_a_recurrent_layer_is_one():
    """Scored through several forward passes: a pass of many steps is not many passes."""
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM(8, 7, batch_first=True), 7).eval()
    graph = trace(model, IMAGES)
    assert graph.layers["reader"].calls == 1
    with taylored.TaylorScorer(model, graph) as together:
        sum(run(model, x).square().sum() for x in IMAGES.split(1)).backward()
    with taylored.TaylorScorer(model, graph) as apart:
        for x in IMAGES.split(1):
            run(model, x).square().sum().backward()
    for name, score in apart.scores().items():
        torch.testing.assert_close(together.scores()[name], score)


# -- operators of one's own --------------------------------------------------------------------------------------------


@torch.library.custom_op("taylored_tests::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


@torch.library.custom_op("taylored_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * scale[:, None, None]


for op in (swish, scaled):
    op.register_fake(lambda x, *_: torch.empty_like(x))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8))
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.second(swish(scaled(self.first(x), self.scale))).mean((2, 3)))


@pytest.fixture
def rules():
    import sys

    known = sys.modules["taylored._graph.rules"].RULES
    before = dict(known)
    yield
    known.clear()
    known.update(before)


def test_an_operator_without_a_rule_is_named_and_can_be_taught(rules):
    torch.manual_seed(0)
    model = Own().eval()
    assert 'trace_rule("taylored_tests::scaled")' in trace(model, IMAGES).explain("first")

    @trace_rule("taylored_tests::scaled")
    def rule(labels, func, args, kwargs, out):
        label = labels.channels(args[0], 1)
        labels.match(label, labels.channels(args[1], 0), "scaled by constants")
        labels.emit(out, 1, label)

    assert callable(rule)
    graph = trace(model, IMAGES)
    assert 'trace_rule("taylored_tests::swish")' in graph.explain("first") and "scaled" not in graph.explain("first")
    trace_rule("taylored_tests::swish", like="aten::silu")
    graph = trace(model, IMAGES)
    assert graph.prunable_filters == graph.filters == 14
    plan = taylored.random_plan(graph, 0.5)
    with torch.no_grad(), taylored.masked(model, graph, plan):
        expected = model(IMAGES)
    taylored.compact(model, plan)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-6)
    assert len(model.scale) == 4


def test_the_reason_follows_what_an_unknown_operator_made():
    """A layer behind it, and one whose weight it made, say the same."""

    class Behind(Own):
        def forward(self, x):
            x = F.conv2d(self.first(x), swish(self.second.weight), self.second.bias)
            return self.head(x.mean((2, 3)))

    for model, layer in ((Own(), "second"), (Behind(), "first")):
        assert "taylored_tests::" in trace(model.eval(), IMAGES).explain(), layer


@pytest.mark.parametrize("arguments", [("nope",), ("aten::nope",), ("nope::relu",), ("aten::relu", "aten::nope")])
def test_operators_that_do_not_exist_are_refused(arguments, rules):
    with pytest.raises(ValueError, match="nope"):
        trace_rule(*arguments)
    with pytest.raises(ValueError, match="without a rule"):
        trace_rule("aten::relu", like="aten::linalg_svd")
