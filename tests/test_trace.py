"""What a trace finds: how much can go, what hangs together, and why the rest stays. It leaves the model alone."""

import contextlib
import pickle

import models as nets
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.ops import roi_align

from taylored import TraceError, compact, masked, random_plan, trace

LIBRARY = torch.library.Library("taylored_tests", "FRAGMENT")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", lambda x: x * 1, "CPU")
LIBRARY.impl("opaque", lambda x: torch.empty_like(x), "Meta")

SHARES = {
    "alexnet": 0.94, "vgg16": 0.94, "resnet18": 0.94, "resnet50": 0.94, "resnext50_32x4d": 0.94, "densenet121": 0.94,
    "googlenet": 0.94, "mobilenet_v2": 0.94, "mobilenet_v3_small": 0.94, "mnasnet0_5": 0.94, "efficientnet_b0": 0.94,
    "regnet_x_400mf": 0.94, "regnet_y_400mf": 0.94, "squeezenet1_0": 0.74, "shufflenet_v2_x1_0": 1.0,
}  # fmt: skip


def build(name, **options):
    """A model of torchvision without its numbers."""
    options |= {"init_weights": False} if name == "googlenet" else {}
    with contextlib.nullcontext() if name.startswith("regnet") else torch.device("meta"):  # regnet computes its widths
        return models.get_model(name, weights=None, **options)


@pytest.mark.parametrize("name", SHARES)
def test_most_filters_are_prunable(name):
    graph = trace(build(name), torch.randn(1, 3, 96, 96))
    assert graph.prunable_filters >= SHARES[name] * graph.filters


def test_vgg16_has_a_group_per_convolution():
    graph = trace(build("vgg16"), torch.randn(1, 3, 64, 64))
    assert (len(graph.groups), graph.units) == (13, 4224)
    assert all(g.layers == (g.name,) and g.layers[0].startswith("features.") for g in graph.groups)
    assert graph.group("features.28").inputs["classifier.0"].shape == (512, 49)
    assert trace(build("vgg16"), torch.randn(1, 3, 64, 64), fully_connected=True).units == 4224 + 2 * 4096


def test_convnext_is_explained_by_its_layer_norms():
    graph = trace(build("convnext_tiny"), torch.randn(1, 3, 64, 64))
    assert "layer norm" in graph.explain()
    assert graph.units > 0  # the wide layers of its blocks


def test_flops_and_parameters_are_counted_exactly():
    model, x = models.mobilenet_v3_small(weights=None).eval(), torch.randn(2, 3, 64, 64)
    graph = trace(model, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert graph.flops == counter.get_total_flops()
    assert graph.params == sum(p.numel() for p in model.parameters())


def test_explain_lists_every_layer_with_a_reason():
    graph = trace(build("resnet18"), torch.randn(1, 3, 64, 64))
    text = graph.explain()
    assert all(name in text for name in graph.layers)
    assert "fully connected" in graph.explain("fc") or "output" in graph.explain("fc")
    with pytest.raises(KeyError, match="nowhere"):
        graph.explain("nowhere")
    with pytest.raises(KeyError, match="no group 'nowhere'"):
        graph.group("nowhere")


class Net(nn.Module):
    """Two convolutions with something in between, and a head."""

    def __init__(self, between, widths=(8, 8), last=None):
        super().__init__()
        self.first, self.between = nn.Conv2d(3, widths[0], 3, padding=1), between
        self.last, self.head = last or nn.Conv2d(widths[1], 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.last(self.between(self.first(x)).tanh()).tanh().mean((2, 3)))


class Call(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def check(model, x, ratio=0.5):
    """Removal is zeroing; returns the graph."""
    model.eval()
    graph = trace(model, x)
    assert graph.units > 0
    plan = random_plan(graph, ratio)
    with torch.no_grad():
        call = (lambda: model(**x)) if isinstance(x, dict) else (lambda: model(*x)) if isinstance(x, tuple) else lambda: model(x)
        with masked(model, graph, plan):
            expected = call()
        compact(model, plan)
        actual = call()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert plan.params[1] == sum(p.numel() for p in model.parameters()) < plan.params[0]
    return graph


def shuffle(groups):
    def function(_, x):
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return function


def halves(_, x):
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


def crossed(_, x):
    a, b = x.split(x.shape[1] // 2, 1)
    return torch.cat([b, a], 1)


BETWEEN = {
    "group_norm": lambda: Net(nn.GroupNorm(4, 8)),
    "instance_norm": lambda: Net(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "instance_norm_bare": lambda: Net(nn.InstanceNorm2d(8)),
    "transposed": lambda: Net(nn.ConvTranspose2d(8, 6, 2, stride=2), (8, 6)),
    "transposed_depthwise": lambda: Net(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)),
    "grouped": lambda: Net(nn.Conv2d(8, 8, 3, padding=1, groups=4)),
    "chunk": lambda: Net(Call(halves), (8, 4)),
    "split": lambda: Net(Call(crossed)),
    "shuffle": lambda: Net(Call(shuffle(2))),
    "channel_shuffle": lambda: Net(nn.ChannelShuffle(2)),
    "pixel_shuffle": lambda: Net(nn.PixelShuffle(2), (16, 4)),
    "pixel_unshuffle": lambda: Net(nn.PixelUnshuffle(2), (4, 16)),
    "prelu": lambda: Net(nn.PReLU(8)),
    "upsample": lambda: Net(nn.Upsample(scale_factor=2, mode="bilinear")),
    "max_pool": lambda: Net(nn.MaxPool2d(2)),
    "channel_pad": lambda: Net(Call(lambda _, x: F.pad(x, (0, 0, 0, 0, 0, 2))), (8, 10)),
    "reflection_pad": lambda: Net(nn.ReflectionPad2d(1)),
    "dropout": lambda: Net(nn.Dropout2d(0.5)),
    "stochastic": lambda: Net(Call(lambda _, x: x + x.new_zeros(x.shape))),
    "einsum": lambda: Net(Call(lambda _, x: torch.einsum("nchw->nchw", x) * 2)),
    "linear_at_every_position": lambda: Net(Call(lambda m, x: m.mix(x.movedim(1, -1)).movedim(-1, 1), mix=nn.Linear(8, 6)), (8, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_removal_is_zeroing_through(name):
    torch.manual_seed(0)
    check(nets.randomised(BETWEEN[name]()), nets.inputs())


@pytest.mark.parametrize("dimension", [1, 3])
def test_one_and_three_dimensional_nets_are_pruned(dimension):
    convolution, norm = getattr(nn, f"Conv{dimension}d"), getattr(nn, f"BatchNorm{dimension}d")
    model = nn.Sequential(
        convolution(2, 8, 3), norm(8), nn.ReLU(), convolution(8, 6, 3), nn.Flatten(), nn.Linear(6 * 2**dimension, 4)
    )
    check(nets.randomised(model), torch.randn(2, 2, *[6] * dimension))


def test_a_module_that_is_called_twice_is_one_group():
    model = nets.small("twice")
    graph = check(model, nets.inputs())
    (group,) = (g for g in graph.groups if "shared" in g.layers)
    assert {"stem", "shared"} == set(group.layers) and graph.layers["shared"].calls == 2


def test_tied_weights_are_cut_once():
    model = Net(nn.Conv2d(8, 8, 3, padding=1), last=nn.Conv2d(8, 8, 3, padding=1))
    model.head = nn.Linear(8, 5)
    model.last.weight = model.between.weight
    check(model, nets.inputs())
    assert model.last.weight is model.between.weight


def test_dictionaries_tuples_and_tuple_outputs_are_taken():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, left, right):
            return {"out": self.last(self.a(left) + self.b(right))}["out"]

    x = nets.inputs()
    check(Two(), (x, x))
    check(Two(), {"right": x, "left": x})
    with pytest.raises(TypeError, match="example_inputs"):
        trace(Two(), 3)


def test_intermediate_outputs_stay_whole():
    model = Net(nn.ReLU())
    model.forward = lambda x: (model.first(x), model.last(model.first(x)))
    assert "the model's output" in trace(model, nets.inputs()).explain("first")


def test_an_op_without_a_rule_freezes_and_says_so():
    model = Net(Call(lambda _, x: torch.ops.taylored_tests.opaque(x)))
    graph = trace(model, nets.inputs())
    assert "opaque" in graph.explain("first") and "no rule" in graph.explain("first")
    assert not any("first" in g.layers for g in graph.groups)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (Call(lambda _, x: x.softmax(1)), "softmax"),
        (nn.GroupNorm(1, 8), "statistics over all channels"),
        (Call(lambda _, x: x / x.norm(dim=1, keepdim=True)), "over the channels"),
        (Call(lambda _, x: torch.cat(x.split([3, 5], 1)[::-1], 1)), "unequal pieces"),
        (Call(lambda _, x: x + torch.arange(8.0, device=x.device).view(1, 8, 1, 1)), "constant"),
    ],
)
def test_what_cannot_shrink_is_frozen_with_its_reason(between, reason):
    graph = trace(Net(between), nets.inputs())
    assert reason in graph.explain("first")
    assert not any("first" in g.layers for g in graph.groups)


def test_a_model_that_looks_at_its_data_runs_for_real():
    def function(_, x):
        return x if float(x.sum().detach()) > 1e9 else x.relu()

    check(Net(Call(function)), nets.inputs())
    with pytest.raises(TraceError):
        trace(Net(Call(function)).to("meta"), nets.inputs().to("meta"))


class Routed(nn.Module):
    """One of two layers, by what a convolution says."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.router = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.others = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)])
        nn.init.constant_(self.first.weight, 1.0)
        with torch.no_grad():
            self.first.bias.zero_()
            self.router.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 8, 1, 1))
            self.router.bias.copy_(torch.tensor([0.0, bias]))

    def forward(self, x):
        x = self.first(x)
        best = int(self.router(x).mean((0, 2, 3)).argmax())
        return self.others[best](x).mean((2, 3))


@pytest.mark.parametrize("bias", [-0.1, 0.1])
def test_layers_compute_where_what_they_compute_decides(bias):
    """Without the convolutions' sums the bias would choose the layer."""
    with pytest.warns(UserWarning, match="never used.*others.1"):
        graph = trace(Routed(bias), torch.ones(1, 3, 8, 8))
    assert set(graph.group("first").consumers) == {"router", "others.0"}


def test_a_model_that_looks_at_its_data_does_not_convolve_where_it_need_not(monkeypatch):
    def function(_, x):
        return x if float(x.sum().detach()) > 1e9 else x.relu()

    model, seen = Net(Call(function)), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default and not args[0].is_meta:
                seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        trace(model, nets.inputs())
    assert not seen


@pytest.mark.parametrize("real", [False, True])
def test_a_trace_leaves_no_trace(real):
    def function(_, x):
        return x.relu() if not real or float(x.sum()) < 1e9 else x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Call(function), nn.Dropout(0.5), nn.Conv2d(8, 4, 3))
    model[1].eval()  # a mixture of flags
    before, state = nets.snapshot(model), torch.get_rng_state()
    trace(model, nets.inputs())
    assert nets.unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, False, True, True, True]


def test_a_failing_trace_leaves_no_trace_and_names_the_line():
    model = Net(nn.ReLU(), (8, 9))
    before = nets.snapshot(model)
    with pytest.raises(TraceError, match=r"test_trace\.py:\d+"):
        trace(model, nets.inputs())
    assert nets.unchanged(before, model)
    assert not nn.modules.module._global_forward_pre_hooks


def test_auxiliary_heads_train_on_after_the_cut():
    model = models.googlenet(weights=None, init_weights=False, aux_logits=True, num_classes=10).eval()
    graph = trace(model, torch.randn(1, 3, 64, 64))
    assert any(name.startswith("aux1") for g in graph.groups for name in g.inputs)
    compact(model, random_plan(graph, 0.5))
    outputs = model.train()(torch.randn(2, 3, 64, 64))
    sum(o.sum() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_unused_parameters_are_left_with_a_warning():
    model = Net(nn.ReLU())
    model.spare = nn.Conv2d(8, 8, 3)
    with pytest.warns(UserWarning, match="spare"):
        graph = trace(model, nets.inputs())
    compact(model, random_plan(graph, 0.5))
    assert model.spare.weight.shape == (8, 8, 3, 3)


def test_a_model_without_data_is_traced_as_one_with():
    real, meta = models.resnet18(weights=None), build("resnet18")
    a, b = trace(real, torch.randn(1, 3, 64, 64)), trace(meta, torch.randn(1, 3, 64, 64, device="meta"))
    assert repr(a) == repr(b)
    assert random_plan(a, 0.5) == random_plan(b, 0.5)


def test_groups_partition_their_channels():
    graph = trace(nets.small("concatenation"), nets.inputs())
    owned: dict = {}
    for group in graph.groups:
        for key, slots in group.slots.items():
            owned.setdefault(key, []).append(slots.flatten())
    for (tensor, d), parts in owned.items():
        indices = torch.cat(parts)
        assert len(indices.unique()) == len(indices) and int(indices.max()) < graph.shapes[tensor][d]


def test_the_graph_after_a_cut_is_the_trace_of_the_smaller_model():
    for name in nets.NETS:
        model, x = nets.small(name), nets.inputs()
        graph = trace(model, x)
        plan = random_plan(graph, 0.5)
        after = graph.after(plan.removed)
        compact(model, plan)
        again = trace(model, x)
        assert (after.flops, after.params, after.shapes) == (again.flops, again.params, again.shapes)
        assert random_plan(after, 0.5) == random_plan(again, 0.5)


def test_a_graph_can_be_pickled():
    graph = trace(nets.small("residual"), nets.inputs())
    again = pickle.loads(pickle.dumps(graph))
    assert repr(again) == repr(graph) and random_plan(again, 0.5) == random_plan(graph, 0.5)


def test_lazy_models_and_no_models_are_refused():
    with pytest.raises(ValueError, match="lazy"):
        trace(nn.Sequential(nn.LazyConv2d(4, 3)), nets.inputs())
    with pytest.raises(TypeError, match="model must be"):
        trace(torch.relu, nets.inputs())
    with pytest.raises(TypeError, match="must not be scripted"):
        trace(torch.jit.trace(nn.Conv2d(3, 8, 3), nets.inputs()), nets.inputs())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_the_surrounding_grad_mode_does_not_matter(context):
    with context():
        graph = trace(nets.NETS["chain"](), nets.inputs())
    assert graph.units == 14


def test_a_grouped_transposed_convolution_may_come_first():
    """Its weight's labels are those of its inputs, of which there are fewer than of its outputs."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2, 2, groups=3), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1))
    assert check(model, nets.inputs()).prunable_filters == 8


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"])
def test_every_channel_of_a_shuffled_trunk_is_a_unit(name):
    graph = trace(build(name), torch.randn(1, 3, 64, 64))
    assert graph.prunable_filters == graph.filters and len(graph.bundles) == 3
    assert all(s.shape[1] == 1 for n in graph.bundled for s in graph.group(n).slots.values())


@pytest.mark.parametrize("shuffle", [nn.ChannelShuffle(8), Call(shuffle(8))], ids=["operator", "views"])
@pytest.mark.parametrize("spread", [lambda x: F.pixel_unshuffle(x, 2), lambda x: torch.cat([x, x.tanh()] * 2, 1)])
def test_the_places_of_a_channel_stay_in_order_or_it_stays(spread, shuffle):
    """A shuffle by a number that is written out moves a channel's places among themselves once there are fewer channels, which
    no label tells."""
    model = Net(Call(lambda m, x: m.shuffle(spread(x)), shuffle=shuffle), (4, 16))
    assert "several places" in trace(model, nets.inputs()).explain("first")
    check(model, nets.inputs())


def test_a_narrower_graph_says_where_every_channel_goes():
    """The net as it is at each width, run with numbers in the place of its channels."""
    graph = trace(model := nets.small("dealt"), nets.inputs())
    for (width,), narrow in graph.narrower():
        stem = torch.arange(2 * width)
        made = [torch.arange(width) + 100 * (n + 1) for n in range(3)]
        x, consumed = stem, {}
        for n in range(3):
            left, consumed[f"blocks.{n}"] = x.chunk(2)
            x = torch.cat([left, made[n]]).view(2, width).t().flatten()
        consumed["head"] = x
        for group in narrow.groups:
            producer, consumer = group.name.split("->")
            numbers = stem if producer == "stem" else made[int(producer[-1])]
            filters = numbers[group.slots[f"{producer}.weight", 0][:, 0]]
            assert torch.equal(consumed[consumer][group.inputs[consumer][:, 0]], filters)
        assert sum(g.units for g in narrow.groups) == 5 * width == narrow.units
        assert narrow.flops < graph.flops and narrow.rehearser.name_of(model) == ""


def test_pixel_shuffle_ties_the_channels_of_one_output_channel_alone():
    """Whether or not anything consumes what it made."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.aside = nn.Conv2d(3, 16, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            F.pixel_shuffle(self.aside(x), 2)
            return self.last(F.pixel_shuffle(self.first(x), 2).tanh())

    assert check(Net(), nets.inputs()).group("first").units == 4


def test_unbinding_frames_leaves_their_channels_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv3d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(sum(self.second(frame.tanh()) for frame in self.first(x).unbind(2)).mean((2, 3)))

    assert check(Net(), torch.randn(2, 3, 4, 5, 5)).prunable_filters == 14


def test_what_a_forward_pass_keeps_for_the_next_one_is_not_of_the_meta_device():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.sizes, self.grids = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), [], {}

        def forward(self, x):
            x = self.first(x)
            if not hasattr(self, "last"):
                self.last = x.new_ones(x.shape[-1])
            self.sizes.append(x.new_ones(()))
            grid = self.grids.setdefault(x.shape[-1], torch.arange(x.shape[-1], device=x.device))
            return self.second(x.tanh() + grid + self.last)

    model = Keeping()
    graph = trace(model, nets.inputs())
    assert model.sizes == [] and model.grids == {} and not hasattr(model, "last")
    model(nets.inputs())
    kept, sizes = model.last, model.sizes
    assert check(model, nets.inputs()).units == graph.units and model.last is kept and model.sizes is sizes
    assert not any(t.is_meta for t in (*model.sizes, *model.grids.values()))


class Detector(nn.Module):
    """Looks for boxes in its data, as many as there are, and pools within them."""

    def __init__(self):
        super().__init__()
        self.stem, self.score, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1), nn.Linear(8, 5)

    def forward(self, x):
        y = self.stem(x)
        found = (self.score(y)[0, 0] > 0).nonzero()
        boxes = torch.cat([torch.zeros(len(found), 1), found - 1.0, found + 1.0], 1)
        none = boxes[boxes[:, 1] > 100]
        return self.head(roi_align(y, torch.cat([none, boxes]), 2).mean((2, 3)))


def test_a_detector_that_finds_as_many_boxes_as_it_likes_is_pruned():
    torch.manual_seed(0)
    model, x = Detector().eval(), nets.inputs(1)
    graph = trace(model, x)
    assert [g.layers for g in graph.groups] == [("stem",)]
    plan = random_plan(graph, 0.5)
    with torch.no_grad():
        with masked(model, graph, plan):
            expected = model(x)
        compact(model, plan)
        assert torch.allclose(model(x), expected, atol=1e-6)


class Indexed(nn.Module):
    """Writes maps of two layers into one buffer by number, reads them in another order, and takes windows of them."""

    def __init__(self, fresh):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.fresh = fresh
        self.register_buffer("even", torch.tensor([0, 2]))
        self.register_buffer("odd", torch.tensor([1, 3]))

    def forward(self, x):
        one, two = self.one(x), self.two(x)
        maps = torch.zeros(4, *one.shape[1:]) if self.fresh else one + 1.0
        maps[self.even] = one[self.odd]
        maps[self.odd] = two[self.even]
        return self.last(maps[self.odd][:, :, torch.tensor([3, 1])].unfold(3, 2, 3).amax(4))


@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_written_and_read_by_index_goes_on(fresh):
    graph = check(Indexed(fresh).eval(), nets.inputs(4))
    assert [(group.units, group.layers) for group in graph.groups] == [(8, ("one", "two"))]


def test_channels_that_an_index_picks_stay():
    class Picking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.last(self.first(x)[:, [0, 2, 4, 6]])

    graph = trace(Picking(), nets.inputs())
    assert graph.units == 0 and "takes part of the channels" in graph.explain("first")


class SplitAttention(nn.Module):
    """Two maps per channel, weighed by a softmax over the two and summed, as in SKNet and ResNeSt (arXiv:2004.08955)."""

    def __init__(self, stacked):
        super().__init__()
        self.maps = nn.Conv2d(3, 16, 3) if not stacked else nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)])
        self.squeeze, self.excite, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 16, 1), nn.Conv2d(8, 5, 1)
        self.stacked = stacked

    def forward(self, x):
        maps = torch.stack([m(x) for m in self.maps], 1) if self.stacked else self.maps(x).unflatten(1, (2, -1))
        weights = self.excite(self.squeeze(maps.sum(1).mean((2, 3), keepdim=True)).relu()).unflatten(1, (2, -1)).softmax(1)
        return self.last((maps * weights).sum(1))


@pytest.mark.parametrize("stacked", [False, True])
def test_channels_cut_in_two_stay_whole_under_sums_and_softmax(stacked):
    graph = check(SplitAttention(stacked), nets.inputs())
    maps = ("maps.0", "maps.1") if stacked else ("maps",)
    assert [(group.units, group.layers) for group in graph.groups] == [(8, (*maps, "excite")), (6, ("squeeze",))]


class Regions(nn.Module):
    """Looks at its data, pools within boxes, and is resnet18 in its ways: a map of its own meets sums in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.classify = nn.Conv2d(8, 6, 3), nn.Linear(6 * 9, 4)

    def forward(self, x):
        boxes = (x.sum((1, 2, 3)) > -1e9).nonzero().float()
        x = F.max_pool2d(self.norm(self.stem(x)).relu_(), 2)
        y = self.body(x)
        y += x
        y = y.relu_()
        boxes = torch.cat([boxes, boxes.new_tensor([[1.0, 1.0, 6.0, 7.0]]).expand(len(boxes), 4)], 1)
        regions = self.head(roi_align(y, boxes, (5, 5)))
        return self.classify(regions.view(len(regions), -1))


def test_a_model_that_looks_at_its_data_is_traced_without_the_sums():
    model, x = Regions().eval(), torch.randn(2, 3, 16, 16)
    graph = trace(model, x)
    assert [p.values for p in graph.passes] == ["some"] and graph.prunable_filters == 22
    plan = random_plan(graph, 0.5)
    with masked(model, graph, plan):
        expected = model(x)
    compact(model, plan)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class Heads(nn.Module):
    """Takes some of its channels' heads, by number and in unequal pieces."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.one, self.two, self.last = nn.Conv2d(4, 5, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        heads = self.first(x).unflatten(1, (3, -1))
        single, double = heads.split((1, 2), 1)
        return self.one(single[:, 0]) + self.two(double.flatten(1, 2)) + self.last(heads[:, 2] * heads.unbind(1)[0])


def test_heads_that_are_taken_apart_lose_the_same_positions():
    graph = check(Heads(), nets.inputs())
    assert [(group.units, group.layers) for group in graph.groups] == [(4, ("first",))]


@pytest.mark.parametrize(
    "op", ["index_select", "roll", "cumsum", "sort", "topk", "masked_fill", "rot90", "median", "grid_sample"]
)
def test_channels_go_on_through_what_happens_along_other_dimensions(op):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
            self.register_buffer("columns", torch.tensor([0, 2, 3]))

        def forward(self, x):
            x = self.first(x)
            x = {
                "index_select": lambda: x.index_select(3, self.columns),
                "roll": lambda: x.roll((1, 2), (2, 3)),
                "cumsum": lambda: x.cumsum(3),
                "sort": lambda: x.sort(2)[0],
                "topk": lambda: x.flatten(2).topk(3)[0].unsqueeze(3),
                "rot90": lambda: x.rot90(1, (2, 3)),
                "median": lambda: x.median(3, keepdim=True)[0],
                "grid_sample": lambda: F.grid_sample(x, torch.linspace(-1, 1, 40).view(1, 4, 5, 2).expand(len(x), -1, -1, -1)),
                "masked_fill": lambda: x.masked_fill(x > 0, 0.5),
            }[op]()
            return self.last(x)

    assert check(Net(), nets.inputs()).units == 8


@pytest.mark.parametrize("op", [lambda x: x.roll(1, 1), lambda x: x.roll(1), lambda x: x.cumsum(1), lambda x: x.sort(1)[0]])
def test_what_happens_along_channels_holds_them_fast(op):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.last(op(self.first(x)))

    graph = trace(Net(), nets.inputs())
    assert graph.units == 0 and "works over the channels" in graph.explain("first")


def test_gated_linear_units_lose_both_halves():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GLU(1), nn.Conv2d(8, 5, 1))
    assert check(model, nets.inputs()).units == 8


def test_channels_are_known_where_no_boxes_are_found():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.score = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)
            self.head, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x):
            y = self.stem(x)
            found = (self.score(y)[0, 0] > 1e9).nonzero().to(y.dtype)
            boxes = torch.cat([torch.zeros(len(found), 1), found, found], 1)
            regions = torch.zeros(len(boxes), y.shape[1], 2, 2)
            regions[torch.arange(len(boxes))] = roi_align(y, boxes, 2)
            return self.last(self.head(regions.relu()).relu())

    graph = check(Net(), nets.inputs())
    assert [group.layers for group in graph.groups] == [("stem",), ("head",)]


def test_heads_that_one_layer_took_together_are_joined_with_others():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pooled, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            heads = self.first(x).unflatten(1, (2, -1))
            pooled = self.pooled(heads.flatten(0, 1)).unflatten(0, (-1, 2))
            return self.last(torch.cat([heads, pooled], 3).flatten(1, 2))

    assert check(Net(), nets.inputs()).units == 4
