"""Situations from public bug reports: each ends in an exact cut, in channels that stay for a reason that is true, or in a refusal in
words before anything is touched."""

import collections
import copy
import dataclasses
import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import taylored
from taylored import PlanError, PrunePlan, TraceError, compact, make_plan, masked, random_plan, save, trace
from taylored._modules import tensors_in

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), function

    def forward(self, x):
        return self.b(self.function(self.a(x).relu()))


def exact(model, x, prunable, ratio=0.5):
    """Traced, so many filters can go, and what is left of it equals the masked model."""
    model = model.eval()
    graph = trace(model, x)
    assert graph.prunable_filters == prunable, graph.explain()
    plan = random_plan(graph, ratio)
    with torch.no_grad(), masked(model, graph, plan):
        expected = list(tensors_in(taylored._modules.run_on(model, x)))
    compact(model, plan)
    with torch.no_grad():
        for a, b in zip(tensors_in(taylored._modules.run_on(model, x)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return graph


def stays(function, reason):
    torch.manual_seed(0)
    graph = trace(model := Between(function).eval(), X)
    assert graph.prunable_filters == 0 and reason in graph.explain("a"), graph.explain()
    with pytest.raises(PlanError):
        make_plan(graph, {}, target_flops=0.5)
    return model


C = 1  # the channels' dimension
KEYS = torch.linspace(-1, 1, 5 * 256).view(1, 5, 256).sin().expand(2, -1, -1)


def inplace_mul(y):
    w = torch.ones(1, y.shape[C], 1, 1)
    w *= torch.linspace(0, 2, y.shape[C]).view(1, -1, 1, 1)
    return y * w


def copied(y):
    w = torch.empty(1, y.shape[C], 1, 1)
    w.copy_(torch.arange(y.shape[C]).view(1, -1, 1, 1))
    return y * w


def index_fill(y):
    return y * torch.ones(1, y.shape[C], 1, 1).index_fill_(1, torch.tensor([0, 1]), 3.0)


def one_item(y):
    w = torch.ones(1, y.shape[C], 1, 1)
    w[:, 0] = 3.0
    return y * w


def set_items(y):
    w = torch.ones(1, y.shape[C], 1, 1)
    w[:, torch.tensor([0, 1])] = 3.0
    return y * w


def masked_fill(y):
    return y * torch.zeros(1, y.shape[C], 1, 1).masked_fill_((torch.arange(y.shape[C]) < 2).view(1, -1, 1, 1), 3.0)


def written_in_part(y):
    out = torch.zeros(y.shape)
    out[:, :, 1:] = y[:, :, 1:]
    return out


@pytest.mark.parametrize("function", [inplace_mul, copied, index_fill, one_item, set_items, masked_fill])
def test_a_fresh_tensor_that_is_written_into_is_a_constant(function):
    stays(function, "meets a constant of 8 values")


def test_an_index_that_is_computed_from_channels_keeps_them():
    def table(y):
        return y * torch.arange(256.0).sin()[y.flatten(2).argmax(2)].mean(1)[:, None, None, None]

    stays(table, "an index in the model's own forward is computed from them")


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda y: y * F.adaptive_max_pool1d(y.flatten(2).transpose(1, 2), 1).reshape(len(y), 1, 16, 16).sigmoid(), "max_pool"),
        (lambda y: y * F.adaptive_avg_pool3d(y.unsqueeze(1), (1, 16, 16)).squeeze(1).sigmoid(), "avg_pool3d"),
        (lambda y: y * F.interpolate(y.mean((2, 3)).unsqueeze(1), size=2, mode="linear").mean(2)[..., None, None], "upsample_linear1d"),
        (lambda y: y * F.group_norm(y.flatten(2).transpose(1, 2), 16).relu().mean((1, 2)).view(-1, 1, 1, 1), "group norm"),
        (lambda y: F.local_response_norm(y, 3), "avg_pool3d"),
        (lambda y: y * F.max_pool1d(y.flatten(2).transpose(1, 2), 2).mean((1, 2))[:, None, None, None], "max_pool"),
    ],
)  # fmt: skip
def test_what_works_over_the_channels_from_another_dimension_keeps_them(function, operator):
    torch.manual_seed(0)
    graph = trace(Between(function).eval(), X)
    assert graph.prunable_filters == 0 and operator in graph.explain("a"), graph.explain()


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y / math.sqrt(y.shape[1]),
        lambda y: y / math.sqrt(y.shape[1]) * torch.ones(()).item(),  # looks at data: the pass computes
        lambda y: y * torch.ones(()).item() * torch.tensor(float(y.shape[1])),
        lambda y: written_in_part(y) + torch.full((), float(y.shape[1])),
        lambda y: F.group_norm(y, 2),
        lambda y: y * (1 / y.shape[1]),
        lambda y: y * (1 + torch.arange(y.shape[1]).float().mean()),
        lambda y: y * torch.ones(1, y.shape[1], 1, 1) / y.shape[1],
        lambda y: y + torch.full((), float(y.shape[1])),
        lambda y: y.clamp(max=0.1 * y.shape[1]),
        lambda y: y * torch.tensor(float(y.shape[1])),
        lambda y: y ** (y.shape[1] / 8),
    ],
)
def test_a_count_of_channels_used_as_a_number_keeps_them(function):
    stays(function, "computes with another number where there are fewer channels")


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y / math.sqrt(y.shape[2]) * torch.linspace(0, 1, y.shape[3]),
        lambda y: y.view(len(y), y.shape[1], -1).view(y.shape),
        lambda y: torch.cat(y.chunk(2, 2), 2),
        lambda y: y * torch.ones(y.shape[1])[:, None, None],
        lambda y: F.pad(y, (1, 1, 1, 1), mode="circular"),
        lambda y: F.fold(F.unfold(y, 2, stride=2).sigmoid(), y.shape[-2:], 2, stride=2),
        lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[-2:]),
        lambda y: F.interpolate(y, scale_factor=0.5, mode="bicubic", antialias=True),
        lambda y: y.gather(3, torch.arange(16).flip(0).expand_as(y)),
        lambda y: y * y[:, :, :1, :1].sigmoid().expand_as(y),
        lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
        lambda y: y.unsqueeze_(1).sigmoid().squeeze_(1),
        lambda y: y.transpose_(1, 2).add(torch.zeros(1, 16, y.shape[2], 16)).transpose_(1, 2),
        lambda y: y * torch.ones(y.shape[1]).unsqueeze_(1).unsqueeze_(2),
        lambda y: F.scaled_dot_product_attention(y.flatten(2), KEYS, KEYS).view_as(y),
    ],
)
def test_what_leaves_channels_alone_lets_them_go(function):
    torch.manual_seed(0)
    exact(Between(function), X, 8)


class Fours(nn.Module):
    """Channels in as many groups as there are fours of them, one after the other from each."""

    def forward(self, x):
        return x.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


class Reversed(nn.Module):
    def forward(self, x):
        return x + x.flip(1).tanh()


@pytest.mark.parametrize("after", [nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 8, 1, groups=2), Reversed()])
def test_channels_of_one_unit_that_would_change_places_stay(after):
    """The fours that are left are in another order, and all of them are one unit."""
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1), Fours(), after, nn.Conv2d(8, 4, 1)).eval(), X)
    assert graph.prunable_filters == 0 and "do not belong together" in graph.explain("0"), graph.explain()


def test_pooling_within_boxes_lets_the_channels_go():
    ops = pytest.importorskip("torchvision").ops
    boxes = torch.tensor([[0.0, 0, 0, 7, 7], [1, 1, 1, 6, 6]])
    exact(Between(lambda y: ops.roi_pool(y, boxes, 4)), X, 8)
    exact(Between(lambda y: ops.roi_align(y, boxes, 4)), X, 8)


def test_a_gate_that_is_expanded_over_the_channels_is_one_value_for_all():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x * self.gate(x).sigmoid().expand_as(x))

    exact(Gated(), X, 8)


class Seg(nn.Module):
    def __init__(self):
        super().__init__()
        self.e1, self.e2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.d2, self.d1 = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        a, i1 = F.max_pool2d(self.e1(x).relu(), 2, return_indices=True)
        b, i2 = F.max_pool2d(self.e2(a).relu(), 2, return_indices=True)
        return self.d1(F.max_unpool2d(self.d2(F.max_unpool2d(b, i2, 2)).relu(), i1, 2))


def test_unpooling_ties_the_decoder_to_the_encoder_whose_indices_it_takes():
    graph = exact(Seg(), X, 28)
    assert [set(g.layers) for g in graph.groups] == [{"e1", "d2"}, {"e2"}]


@dataclasses.dataclass
class Output:
    features: torch.Tensor
    logits: torch.Tensor


class Slotted:
    __slots__ = ("features", "logits")

    def __init__(self, features, logits):
        self.features, self.logits = features, logits


class Bag(collections.OrderedDict):
    pass


@pytest.mark.parametrize(
    "kind",
    [
        Output, Slotted, lambda f, z: types.SimpleNamespace(features=f, logits=[z]), lambda f, z: Bag(f=f, z=z),
        lambda f, z: [{"a": (f,)}, {z}], lambda f, z: collections.deque([f, z]),
    ],
)  # fmt: skip
def test_outputs_are_found_in_whatever_holds_them(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            f = self.b(self.a(x).relu())
            return kind(f, self.c(f).mean((2, 3)))

    graph = exact(Net(), X, 8)
    assert "the model's output" in graph.explain("b") and "the model's output" in graph.explain("c")


def test_an_output_that_cannot_be_looked_into_is_named():
    class Net(Between):
        def forward(self, x):
            return iter([super().forward(x)])

    with pytest.raises(TraceError, match="list_iterator"):
        trace(Net(torch.relu), X)


class Frozen(dict):
    def update(self, *a, **k):
        raise TypeError("this mapping is frozen")


class Keeps(nn.Module):
    """Writes to what it holds in its forward pass."""

    shared = None

    def __init__(self, memory):
        super().__init__()
        self.a, self.b, self.memory = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), memory

    def forward(self, x):
        y, m = self.a(x), self.memory
        if isinstance(m, collections.deque):
            m.append(y.detach())
            y = sum(m)
        elif isinstance(m, dict):
            y = y if m["h"][0] is None else y + m["h"][0]
            m["h"][0] = y.detach()
        elif isinstance(m, set):
            m.add(y.detach())
        elif m is None:
            type(self).shared = y.detach()
        else:
            y = y if m.h is None else y + m.h
            m.h = y.detach()
        return self.b(y)


@pytest.mark.parametrize(
    "memory",
    [collections.deque(maxlen=2), types.SimpleNamespace(h=None), {"h": [None]}, Frozen(h=[None]), set(), None],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("used", [False, True])
def test_a_trace_leaves_what_a_forward_writes_to_as_it_was(memory, used):
    model = Keeps(copy.deepcopy(memory)).eval()
    if used:
        model(X)
    before = [id(t) for t in tensors_in(model.memory)], Keeps.shared
    assert trace(model, X).prunable_filters >= 0
    assert ([id(t) for t in tensors_in(model.memory)], Keeps.shared) == before
    assert model(X).device.type == "cpu"


def test_a_cache_by_shape_does_not_keep_channels():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shape = nn.Conv2d(8, 2, 1), None
            self.register_buffer("stride", torch.tensor([8.0]))

        def forward(self, x):
            if self.shape != x.shape:
                self.shape, self.anchors = x.shape, torch.arange(x.shape[-1]) * self.stride[0].item()
            return self.conv(x) + self.anchors

    for used in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Head()).eval()
        if used:
            model(X)
        exact(model, X, 8)


class Rounded(nn.Module):
    def forward(self, w):
        return (w * 16).round() / 16


@pytest.mark.parametrize("kind", ["parametrized", "pruned"])
def test_depthwise_layers_with_computed_weights_follow_their_groups(kind):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers).eval()
    if kind == "parametrized":
        parametrize.register_parametrization(model[2], "weight", Rounded())
    else:
        prune.ln_structured(model[2], "weight", amount=0.5, n=2, dim=0)
        prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    exact(model, X, 16)
    assert (model[0].out_channels, model[2].groups, model[4].in_channels) == (4, 4, 4)


def test_blur_pooling_with_one_kernel_for_all_channels_lets_them_go():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("k", torch.ones(1, 1, 3, 3) / 9)

        def forward(self, x):
            return F.conv2d(x, self.k.expand(x.shape[1], -1, -1, -1), groups=x.shape[1])

    exact(nn.Sequential(nn.Conv2d(3, 8, 3), Blur(), nn.Conv2d(8, 4, 1)), X, 8)


def test_a_first_state_of_zeros_goes_with_what_it_becomes():
    class ConvLSTM(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, xs):
            b, t, _, h, w = xs.shape
            hidden = cell = torch.zeros(b, self.g.out_channels // 4, h, w)
            for k in range(t):
                i, f, o, c = self.g(torch.cat([self.a(xs[:, k]), hidden], 1)).chunk(4, 1)
                cell = f.sigmoid() * cell + i.sigmoid() * c.tanh()
                hidden = o.sigmoid() * cell.tanh()
            return self.o(hidden)

    exact(ConvLSTM(), torch.randn(2, 3, 3, 8, 8), 40)


def test_zeros_that_are_joined_beside_the_channels_are_no_units():
    """Tacotron's frames before the first."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.start, self.b = nn.Conv1d(3, 8, 3), nn.Linear(4, 8), nn.Conv1d(8, 2, 3)

        def forward(self, x):
            frames = torch.cat([torch.zeros(1, 4), torch.zeros(2, 4)])
            return self.b(self.a(x) + self.start(frames).sum(0)[:, None])

    exact(Net(), torch.randn(2, 3, 12), 8)


def test_a_linear_layer_before_a_decoder_goes_by_the_channel():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.up, self.out = (
                nn.Linear(16, 24 * 16),
                nn.ConvTranspose2d(24, 12, 4, 2, 1),
                nn.ConvTranspose2d(12, 3, 4, 2, 1),
            )

        def forward(self, z):
            return self.out(self.up(self.fc(z).relu().view(len(z), -1, 4, 4)).relu())

    model, z = Decoder().eval(), torch.randn(2, 16)
    graph = trace(model, z, fully_connected=True)
    assert graph.group("fc").units == 24 and graph.group("fc").slots["fc.weight", 0].shape == (24, 16)
    plan = random_plan(graph, 0.5)
    with masked(model, graph, plan):
        expected = model(z)
    compact(model, plan)
    torch.testing.assert_close(model(z), expected)


def test_what_training_alone_does_with_features_ties_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            y = self.c(torch.cat([a, b], 1)).mean((2, 3))
            return (y, F.mse_loss(a, b)) if self.training else y

    model = Net()
    graph = exact(model, X, 16)
    assert [set(g.layers) for g in graph.groups] == [{"a", "b"}]
    model.train()(X)


def test_what_trace_lets_go_a_plan_can_take():
    def sliced(y):
        return y * torch.ones(1, 8, 1, 1)[:, : y.shape[1]]

    def product(y):
        return y * (torch.ones(1, y.shape[1]) @ torch.ones(y.shape[1], 1))

    exact(Between(sliced), X, 8)
    assert trace(Between(product), X).prunable_filters == 0


def test_merging_branches_through_data_is_refused_with_the_line():
    class Rep(nn.Module):
        def __init__(self, i, c):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(i, 2 * i, 1), nn.Conv2d(2 * i, c, 3, padding=1)
            self.merged = nn.Conv2d(i, c, 3, padding=1)

        def forward(self, x):
            w1, w2 = self.wide.weight.data.clone(), self.narrow.weight.data.clone()
            self.merged.weight.data = F.conv2d(w2, w1.permute(1, 0, 2, 3)).contiguous()
            return self.merged(x)

    model = nn.Sequential(Rep(3, 8), nn.ReLU(), Rep(8, 2)).eval()
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, X)
    assert graph.prunable_filters == 0 and "test_situations.py" in graph.explain()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_was_made_of_a_model_is_refused_before_anything_is_touched():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(TraceError, match="exported program"):
        trace(torch.export.export(chain, (X,)).module(), X)
    prepared = prepare_fx(copy.deepcopy(chain), get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    with pytest.raises(TraceError, match="quantized"):
        trace(convert_fx(prepared), X)


class Wrapped(torch.Tensor):
    pass


def test_weights_that_are_no_plain_tensors_are_named():
    chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    chain.register_buffer("table", torch.zeros(3).as_subclass(Wrapped))
    with pytest.raises(TypeError, match=r"'table' is a .*Wrapped"):
        trace(chain, X)


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([False] * 7 + [True]), torch.arange(8.0) / 8, [3.7, 5.2], 3, torch.zeros(2, 2, dtype=torch.int64), [9], [-1]],
)
def test_unit_indices_are_integers_that_exist(wrong):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    graph = trace(model, X)
    with pytest.raises(PlanError, match=r"removed\['0'\]"):
        PrunePlan.of(graph, {"0": wrong})
    with pytest.raises(ValueError, match=r"units\['0'\]"):
        taylored.oracle(model, graph, [(X, torch.zeros(2, dtype=torch.int64))], F.cross_entropy, units={"0": wrong})
    assert PrunePlan.of(graph, {"0": torch.tensor([5, 3], dtype=torch.int16)}).removed["0"].tolist() == [3, 5]


def test_a_square_weight_and_its_transpose_are_two_in_a_file(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)
            self.register_buffer("b", self.a.weight.detach().t())

        def forward(self, x):
            return self.a(x) @ self.b

    model = Tied()
    plan = PrunePlan.of(trace(model, torch.randn(2, 6)), {})
    save(model, plan, tmp_path / "m")
    fresh = Tied()
    fresh.b = torch.zeros(6, 6)
    taylored.load(fresh, tmp_path / "m")
    assert torch.equal(fresh.b, model.b) and not torch.equal(fresh.b, fresh.a.weight)


def test_scores_of_a_single_unbatched_image_are_refused_in_words():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = trace(model, X)
    with taylored.TaylorScorer(model, graph), pytest.raises(RuntimeError, match="give a batch"):
        model(X[0]).sum().backward()


def test_culprits_are_found_by_halving(monkeypatch):
    """A view whose size comes from another tensor's channels has nobody to blame by label."""
    import taylored._graph.tracing as tracing

    class Attention(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.q, self.p, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

        def forward(self, x):
            n, c, h, w = x.shape
            return self.p(self.q(x).softmax(1).view(n, c, h, w)) + self.b(x)

    class Net(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1)) for _ in range(depth))
            self.attention, self.head = Attention(8), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            for block in self.body:
                x = x + block(x)
            return self.head(self.attention(x))

    runs, run = [], tracing.Rehearsal.run
    monkeypatch.setattr(tracing.Rehearsal, "run", lambda *a: runs.append(1) or run(*a))
    graph = trace(Net(32).eval(), X)
    assert len(graph.groups) >= 32 and len(runs) <= 20


def test_the_state_of_a_recurrent_layer_stays():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.rnn, self.head = nn.Conv1d(3, 8, 3), nn.RNN(8, 7), nn.Linear(7, 4)

        def forward(self, x):
            return self.head(self.rnn(self.a(x).permute(2, 0, 1))[0])

    assert "feeds them back" in exact(Reader(), torch.randn(2, 3, 12), 8).explain("rnn")


class Upsample(nn.Module):
    """Says how many channels it takes, as in diffusers."""

    def __init__(self, c):
        super().__init__()
        self.c, self.conv = c, nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.c
        return self.conv(F.interpolate(x, scale_factor=2.0))


def test_a_count_that_is_asserted_is_looked_for_where_it_is_asserted(monkeypatch):
    import taylored._graph.tracing as tracing

    runs, run = [], tracing.Rehearsal.run
    monkeypatch.setattr(tracing.Rehearsal, "run", lambda *a: runs.append(1) or run(*a))
    body = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(32)]
    graph = exact(nn.Sequential(nn.Conv2d(3, 8, 1), *body, Upsample(8), nn.Conv2d(8, 4, 1)), X, 32 * 8 + 8)
    assert "AssertionError" in graph.explain("32.0") and len(runs) <= 6


class Siamese(nn.Module):
    """Stacks its two images along the batch, as RAFT does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)

    def forward(self, u, v):
        f = self.a(torch.cat([u, v]))
        z = self.b(f)
        (fu, fv), (zu, zv) = f.chunk(2), z.chunk(2)
        return (self.h((fu - fv).abs()) + zu - zv).mean((2, 3))


class Frames(nn.Module):
    """Folds its frames into the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        f = self.a(x.flatten(0, 1))
        return self.b(f).mean((2, 3)).view(*x.shape[:2], 4).mean(1) + self.h(f.view(*x.shape[:2], *f.shape[1:]).amax(1)).mean(
            (2, 3)
        )


@pytest.mark.parametrize("reduction", ["abs", "square"])
@pytest.mark.parametrize("kind", [Siamese, Frames])
def test_contributions_are_those_of_the_example_whose_rows_they_are(kind, reduction):
    torch.manual_seed(0)
    model = kind().eval()
    inputs = (torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)) if kind is Siamese else (torch.randn(4, 3, 3, 8, 8),)
    graph = trace(model, inputs)

    def scores(chosen):
        with taylored.TaylorScorer(model, graph, reduction=reduction) as scorer:
            model(*(t[chosen] for t in inputs)).square().sum(1).mean().backward()
        return scorer.scores()["a"]

    alone = torch.stack([scores(slice(n, n + 1)) for n in range(4)]).mean(0)
    torch.testing.assert_close(scores(slice(None)), alone, rtol=1e-4, atol=1e-8)


def test_state_that_no_rule_cuts_is_said_to_stay():
    class Keeps(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["of_all"] = torch.zeros(p.numel())

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    optimizer = Keeps(model.parameters(), lr=0.1)
    optimizer.step()
    with pytest.warns(UserWarning, match="'of_all' of '0.weight'.* is not cut"):
        compact(model, random_plan(trace(model, X), 0.5), optimizer)


def test_misuses_are_told_what_to_do():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(784, 2))
    graph = trace(model, X)
    plan, pairs = random_plan(graph, 0.5), [(X, torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(TypeError, match=r"diff\(model, plan\)"):
        taylored.diff(model, graph)
    with pytest.raises(TypeError, match=r"oracle\(model, graph, batches, loss_fn\)"):
        taylored.oracle(model, graph, F.cross_entropy, pairs)
    with pytest.raises(ValueError, match=r"a list of pairs is \[\(x, y\)\]"):
        taylored.oracle(model, graph, [X], F.cross_entropy)
    for options in ({"scores": {}}, {"scores": {g.name: torch.ones(g.units) for g in graph.groups}, "round_to": 16}):
        with pytest.raises(PlanError, match="no group may lose a unit"):
            make_plan(graph, target_flops=0.5, **options)
    with taylored.TaylorScorer(model, graph), pytest.raises(RuntimeError, match="another TaylorScorer is active"):
        taylored.TaylorScorer(model, graph).__enter__()
    compact(model, plan)
    with pytest.raises(PlanError, match="applied already"):
        compact(model, plan)
