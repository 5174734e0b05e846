"""Removal is zeroing, on every convolutional classifier of torchvision; training goes on as if the model had been
small from the start; what cannot be cut is refused and left alone."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import os
import signal
import sys
import warnings

import models as nets
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import taylored
from taylored import PlanError, TraceError, compact, masked, ops, random_plan, restore, trace

FAMILIES = [
    "alexnet", "vgg11", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet",
    "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "shufflenet_v2_x1_0",
    "squeezenet1_0", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
]  # fmt: skip
VARIANTS = [
    n for n in models.list_models(module=models) if n not in FAMILIES and not n.startswith(("vit", "swin", "maxvit"))
]  # fmt: skip
RATIOS = (0.2, 0.5, 0.8)


def build(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, **options).eval()
    size = {"inception_v3": 160, "alexnet": 96}.get(name, 64)
    x = 2 * torch.randn(6, 3, size, size)
    return nets.randomised(model, x), x[:2]


@contextlib.contextmanager
def refused(model, error, match):
    """What happens within fails with that error, and leaves the model as it was."""
    before = nets.snapshot(model)
    with pytest.raises(error, match=match):
        yield
    assert nets.unchanged(before, model)


def attributes_match(model):
    for m in model.modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            first, second = (m.in_channels, m.out_channels) if m.transposed else (m.out_channels, m.in_channels)
            assert m.weight.shape[:2] == (first, second // m.groups)
        elif isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features)
        elif isinstance(m, nn.modules.batchnorm._NormBase) and m.weight is not None:
            assert m.num_features == len(m.weight)
        elif isinstance(m, nn.GroupNorm):
            assert m.num_channels == len(m.weight) and m.num_channels % m.num_groups == 0


def check_removal(model, x, graph, plan, tolerance=1e-4, apart=False):
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        with masked(model, graph, plan):
            expected = model(x)
        compact(model, plan)
        with FlopCounterMode(display=False) as counter:
            actual = model(x)
    assert expected.isfinite().all() and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    if apart:
        assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    assert counter.get_total_flops() == plan.flops[1] < plan.flops[0]
    assert sum(p.numel() for p in model.parameters()) == plan.params[1] < plan.params[0]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    attributes_match(model)


def check_family(name):
    model, x = build(name)
    with warnings.catch_warnings():
        if name == "inception_v3":  # its auxiliary head needs larger images than these
            warnings.simplefilter("ignore", UserWarning)
        graph = trace(model, x)
    for seed, ratio in enumerate(RATIOS):  # a deep cut at random may leave a net that is blind to its input
        check_removal(copy.deepcopy(model), x, graph, random_plan(graph, ratio, seed), apart=ratio == RATIOS[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_removal_is_zeroing(name):
    check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_removal_is_zeroing_in_every_variant(name):
    check_family(name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", nets.NETS)
def test_removal_is_zeroing_to_the_last_digits(name, seed):
    model, x = nets.small(name, dtype=torch.float64), nets.inputs(dtype=torch.float64)
    graph = trace(model, x)
    check_removal(model, x, graph, random_plan(graph, RATIOS[seed], seed), tolerance=1e-12, apart=True)


@pytest.mark.parametrize("name", [*nets.NETS, "shufflenet_v2_x0_5"])
def test_one_unit_of_each_group_may_be_all_that_is_left(name):
    torch.manual_seed(0)
    x = nets.inputs() if name in nets.NETS else torch.randn(2, 3, 64, 64)
    model = nets.small(name) if name in nets.NETS else nets.randomised(models.get_model(name, weights=None), x).eval()
    graph = trace(model, x)
    plan = random_plan(graph, 1.0)
    assert {kept for name, kept in plan.kept.items() if name not in graph.bundled} <= {1}
    check_removal(model, x, graph, plan, apart=False)


def test_one_group_of_a_group_norm_may_be_all_that_is_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    graph = trace(model, x)
    check_removal(model, x, graph, random_plan(graph, 0.5))
    assert model[1].num_groups == 1


def test_one_group_of_a_transposed_convolution_may_be_all_that_is_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    graph = trace(model, x)
    check_removal(model, x, graph, random_plan(graph, 0.5))
    assert model[1].groups == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_moved_exactly(dtype):
    model, x = nets.small("depthwise"), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)  # its rehearsal runs in the type that was traced
    half = copy.deepcopy(model).to(dtype)
    compact(model, plan), compact(half, plan)
    assert all(torch.equal(h, p.to(dtype)) for h, p in zip(half.parameters(), model.parameters(), strict=True))


def test_channels_last_weights_stay_so():
    model, x = nets.small("residual").to(memory_format=torch.channels_last), nets.inputs()
    graph = trace(model, x)
    check_removal(model, x, graph, random_plan(graph, 0.5), tolerance=1e-5)
    assert model.inner.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_model_is_cut_through_its_wrapper():
    model, x = nets.small("chain"), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)
    other = copy.deepcopy(model)
    compact(torch.compile(model, backend="eager"), plan), compact(other, plan)
    assert torch.equal(model(x), other(x))


# -- training goes on --------------------------------------------------------------------------------------------------

FOREACH = ("SGD", "Adam", "AdamW", "Adamax", "Adadelta", "ASGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Rprop")
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")  # that run on a CPU
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2, history_size=4),
    "lbfgs_wolfe": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3, history_size=3, line_search_fn="strong_wolfe"),
    **{f"{name}_foreach": functools.partial(getattr(torch.optim, name), lr=1e-2, foreach=True) for name in FOREACH},
    **{f"{name}_fused": functools.partial(getattr(torch.optim, name), lr=1e-2, fused=True) for name in FUSED},
}  # fmt: skip
APART = {"Adafactor", "Muon", "SparseAdam", "Optimizer"}  # each has a test of its own; the last is their base


def test_every_optimizer_of_torch_is_tried():
    made = {type(make([nn.Parameter(torch.zeros(2, 2))])).__name__ for make in OPTIMIZERS.values()}
    assert made | APART >= {name for name, value in vars(torch.optim).items() if inspect.isclass(value)}


def cut(tensor, name, plan):
    """What a plan leaves of a tensor, by hand. A dimension that is not as the plan knows it (Adafactor's) is whole."""
    for (owner, d), indices in plan.keep.items():
        if owner == name and tensor.ndim > d and tensor.shape[d] == plan.shapes[name][d]:
            tensor = tensor.index_select(d, indices)
    return tensor.clone()


def step(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def built_small(model, plan):
    """A separate model of the planned size with the same numbers."""
    other = copy.deepcopy(model)
    for m_name, module in other.named_modules():
        for table in (module._parameters, module._buffers):
            for local, tensor in table.items():
                name = f"{m_name}.{local}" if m_name else local
                if tensor is not None and name in plan.shapes:
                    smaller = cut(tensor.detach(), name, plan)
                    table[local] = nn.Parameter(smaller) if table is module._parameters else smaller
    other.depthwise.groups = len(other.depthwise.weight)
    return other


def state_of(optimizer, names, plan):
    """An optimizer's state dict after the cut, by hand."""
    state = copy.deepcopy(optimizer.state_dict())
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                entry[key] = cut(value, names[index], plan)
    return state


def flat_state_of(optimizer, model, plan):
    """LBFGS: one entry, whose vectors are all parameters end to end."""

    def shorter(value):
        if isinstance(value, list):
            return [shorter(v) for v in value]
        if not isinstance(value, torch.Tensor) or value.ndim != 1 or value.numel() != sum(sizes):
            return value
        parts = value.split(sizes)
        return torch.cat([cut(v.reshape(p.shape), n, plan).flatten() for v, (n, p) in zip(parts, parameters, strict=True)])

    parameters = list(model.named_parameters())
    sizes = [p.numel() for _, p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {i: {k: shorter(v) for k, v in entry.items()} for i, entry in state["state"].items()}
    return state


def trained(kind, steps=3):
    model, x, y = nets.small("depthwise", dtype=torch.float64).train(), nets.inputs(8, dtype=torch.float64), torch.arange(8) % 5
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(steps):
        step(model, optimizer, x, y)
    return model, optimizer, x, y


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_if_small_from_the_start(kind):
    model, optimizer, x, y = trained(kind)
    plan = random_plan(trace(model, x), 0.5)
    reference = built_small(model, plan)
    other = OPTIMIZERS[kind](reference.parameters())
    names = [n for n, _ in model.named_parameters()]
    other.load_state_dict(flat_state_of(optimizer, model, plan) if kind.startswith("lbfgs") else state_of(optimizer, names, plan))
    compact(model, plan, optimizer=optimizer)
    for _ in range(2):
        step(model, optimizer, x, y), step(reference, other, x, y)
        for (name, a), b in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)  # NAdam keeps a float32


def test_adafactors_factored_state_is_cut():
    model, x, y = nets.small("flatten", dtype=torch.float64).train(), nets.inputs(8, dtype=torch.float64), torch.arange(8) % 5
    optimizer = torch.optim.Adafactor(model.parameters(), 1e-2)
    for _ in range(3):
        step(model, optimizer, x, y)
    plan = random_plan(trace(model, x, fully_connected=True), 0.5)
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    compact(model, plan, optimizer=optimizer)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, cut(before[name][key], name, plan) if value.ndim > 0 else before[name][key]), (name, key)
    step(model, optimizer, x, y)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muons_state_is_cut():
    model, x, y = nets.small("flatten", dtype=torch.float64).train(), nets.inputs(8, dtype=torch.float64), torch.arange(8) % 5
    flat = [p for p in model.parameters() if p.ndim == 2]  # it takes matrices alone
    optimizers = [
        torch.optim.Muon(flat, 1e-2),
        torch.optim.SGD([p for p in model.parameters() if p.ndim != 2], 1e-2, momentum=0.9),
    ]
    for _ in range(2):
        optimizers[1].zero_grad()
        step(model, optimizers[0], x, y)
        optimizers[1].step()
    plan = random_plan(trace(model, x, fully_connected=True), 0.5)
    names = {p: n for n, p in model.named_parameters()}
    expected = {p: cut(optimizers[0].state[p]["momentum_buffer"], names[p], plan) for p in flat}
    compact(model, plan, optimizer=optimizers)
    assert all(torch.equal(optimizers[0].state[p]["momentum_buffer"], expected[p]) for p in flat)
    step(model, optimizers[0], x, y), optimizers[1].step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_sparse_adams_state_is_cut_and_sparse_gradients_are_refused():
    model, x = nets.small("chain"), nets.inputs()
    optimizer = torch.optim.SparseAdam(model.parameters(), 1e-2)
    model(x).sum().backward()
    for p in model.parameters():
        p.grad = p.grad.to_sparse()
    optimizer.step()
    plan = random_plan(trace(model, x), 0.5)
    with pytest.raises(PlanError, match=r"first\.weight\.grad.*sparse"):
        compact(model, plan, optimizer=optimizer)
    optimizer.zero_grad()
    expected = {n: cut(optimizer.state[p]["exp_avg_sq"], n, plan) for n, p in model.named_parameters()}
    compact(model, plan, optimizer=optimizer)
    assert all(torch.equal(optimizer.state[p]["exp_avg_sq"], expected[n]) for n, p in model.named_parameters())


def test_gradients_are_cut_with_their_weights():
    model, _, x, _y = trained("momentum")
    plan = random_plan(trace(model, x), 0.5)
    expected = {n: cut(p.grad, n, plan) for n, p in model.named_parameters()}
    compact(model, plan)
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters())


def test_several_optimizers_and_parameter_groups_are_cut():
    model, x, y = nets.small("chain").train(), nets.inputs(), torch.tensor([0, 1])
    head = list(model.head.parameters())
    body = [p for p in model.parameters() if all(p is not h for h in head)]
    optimizers = [
        torch.optim.SGD(head, 0.1, momentum=0.9),
        torch.optim.Adam([{"params": body[:2]}, {"params": body[2:], "lr": 1e-3}]),
    ]
    nn.functional.cross_entropy(model(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    compact(model, random_plan(trace(model, x), 0.5), optimizer=optimizers)
    for optimizer in optimizers:
        for p, entry in optimizer.state.items():
            assert all(v.shape == p.shape for v in entry.values() if isinstance(v, torch.Tensor) and v.ndim)
        optimizer.step()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_averages_go_on(use_buffers):
    model, optimizer, x, y = trained("momentum")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    average.update_parameters(model)
    step(model, optimizer, x, y)
    average.update_parameters(model)
    plan = random_plan(trace(model, x), 0.5)
    expected = {n: cut(p.detach(), n, plan) for n, p in average.module.named_parameters()}
    compact(model, plan, optimizer=optimizer, also=average)
    assert all(torch.equal(p, expected[n]) for n, p in average.module.named_parameters())
    attributes_match(average)
    step(model, optimizer, x, y)
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, (expected[name] + model.get_parameter(name)) / 2, rtol=1e-9, atol=1e-12)
    assert average.eval()(x).isfinite().all()


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["plain", "compiled", "parallel"]
)
def test_the_average_of_a_wrapped_model_is_cut(wrap):
    model, x = nets.small("chain"), nets.inputs()
    average, plan = AveragedModel(wrap(model)), random_plan(trace(model, x), 0.5)
    compact(wrap(model), plan, also=average)
    assert torch.equal(average(x), model(x)) and average.n_averaged == 0


def test_a_mapping_of_averages_is_cut():
    model, x = nets.small("chain"), nets.inputs()
    shadow = {n: p.detach().clone() for n, p in model.named_parameters()} | {n: b.clone() for n, b in model.named_buffers()}
    plan = random_plan(trace(model, x), 0.5)
    compact(model, plan, also=[shadow])
    assert all(torch.equal(shadow[n], p) for n, p in model.named_parameters())


def test_training_goes_on_while_an_old_loss_is_alive():
    model, optimizer, x, y = trained("momentum")
    loss = nn.functional.cross_entropy(model(x), y)
    compact(model, random_plan(trace(model, x), 0.5), optimizer=optimizer)
    step(model, optimizer, x, y)
    assert loss.isfinite()


def test_frozen_weights_stay_frozen():
    model, x = nets.small("chain").requires_grad_(False), nets.inputs()
    model.head.requires_grad_(True)
    compact(model, random_plan(trace(model, x), 0.5))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


# -- refusals ----------------------------------------------------------------------------------------------------------


class HardView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 5)

    def forward(self, x):
        return self.head(nn.functional.avg_pool2d(self.conv(x), 2).view(-1, 128))  # at fault


class HardSplit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        a, b = self.conv(x).split([4, 4], 1)  # at fault
        return self.head(self.last(a * b).mean((2, 3)))


class HardChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).flatten(1, 2)  # at fault
        return self.head(self.last(x).mean((2, 3)))


class HardNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.head((x + torch.zeros(1, 8, 1, 1)).mean((2, 3)))  # at fault


@pytest.mark.parametrize("net", [HardView, HardSplit, HardChannels, HardNoise])
def test_a_hard_coded_channel_count_is_located_and_its_channels_stay(net):
    model, x = net().eval(), nets.inputs()
    graph = trace(model, x)
    with open(__file__) as file:
        lines = {n for n, line in enumerate(file, 1) if line.rstrip().endswith("# at fault")}
    named = int(graph.explain("conv").partition("test_compact.py:")[2].split(":")[0])
    assert named in lines
    assert not any("conv" in group.layers for group in graph.groups)
    if graph.units:
        check_removal(model, x, graph, random_plan(graph, 0.5))


class Checked(nn.Module):
    """Has two streams, and an assertion about one of them, in plain Python."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3)
        self.one, self.two = nn.Conv2d(8, 5, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        y = self.one(left) + self.two(right)
        assert right.shape[1] == 6
        return y


def test_what_an_assertion_holds_fast_stays_alone():
    model, x = Checked().eval(), nets.inputs()
    graph = trace(model, x)
    assert [group.layers for group in graph.groups] == [("left",)]
    assert "AssertionError" in graph.explain("right")
    check_removal(model, x, graph, random_plan(graph, 0.5))


class Moody(nn.Module):
    """Fails where no data are: in the rehearsal, in which all is on the meta device, once it has been told to."""

    def __init__(self):
        super().__init__()
        self.net, self.mood = nets.small("depthwise"), None

    def forward(self, x):
        if self.mood is not None:
            raise self.mood
        return self.net(x)


@pytest.mark.parametrize(
    "mood", [KeyError("mood"), MemoryError("mood"), KeyboardInterrupt("mood")], ids=lambda e: type(e).__name__
)
def test_a_forward_that_fails_in_the_rehearsal_changes_nothing(mood):
    model, x = Moody().eval(), nets.inputs()
    graph = trace(model, x)
    plan, twin = random_plan(graph, 0.5), copy.deepcopy(model)
    model.mood = twin.mood = mood
    before = [(m, nets.snapshot(m)) for m in (model, twin)]
    for attempt in (lambda: random_plan(graph, 0.5), lambda: compact(twin, plan)):
        with pytest.raises(KeyboardInterrupt if isinstance(mood, KeyboardInterrupt) else TraceError, match="mood"):
            attempt()
    assert all(nets.unchanged(was, m) and not m.net.training for m, was in before)


def test_a_plan_is_rehearsed_anew_for_another_model_or_other_modules(monkeypatch):
    model, x = nets.small("chain"), nets.inputs()
    plan, seen = random_plan(trace(model, x), 0.5), []
    monkeypatch.setattr(sys.modules["taylored._compact"], "rehearse", lambda *arguments: seen.append(arguments))
    compact(copy.deepcopy(model), plan)
    assert len(seen) == 1
    first = model.first
    model.first = copy.deepcopy(first)
    compact(copy.deepcopy(model), plan)
    assert len(seen) == 2
    model.first = first
    compact(model, plan)
    assert len(seen) == 2


class Typed(nn.Module):
    """Remembers the type that it was converted to."""

    def __init__(self):
        super().__init__()
        self.net, self.type_now = nets.small("chain"), torch.float32

    def half(self):
        self.type_now = torch.float16
        return super().half()

    def forward(self, x):
        assert x.dtype == self.type_now
        return self.net(x)


def test_a_model_that_was_converted_since_its_trace_is_not_said_to_hard_code_a_count():
    model, x = Typed().eval(), nets.inputs()
    graph = trace(model, x)
    with refused(model.half(), TraceError, r"'net.first.weight' changed its type since: trace it anew"):
        random_plan(graph, 0.5)
    compact(model, random_plan(trace(model, x.half()), 0.5))
    assert model.net.first.weight.shape[0] == 4


@pytest.mark.parametrize("stage", ["size_attributes", "state_tensors", "rehearse", "_lost", "ops.compact_many_"])
def test_an_exception_within_compact_changes_nothing(monkeypatch, stage):
    model, optimizer, x, _ = trained("adam")
    average, plan = AveragedModel(model), dataclasses.replace(random_plan(trace(model, x), 0.5), rehearsed=False)
    before, state = [nets.snapshot(m) for m in (model, average)], copy.deepcopy(optimizer.state_dict())

    def fail(*_):
        raise MemoryError("no more")

    module = sys.modules["taylored._compact"]
    owner, name = (module.ops, "compact_many_") if "." in stage else (module, stage)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(MemoryError, match="no more"):
        compact(model, plan, optimizer=optimizer, also=average, keep_removed=True)
    assert all(nets.unchanged(was, m) for was, m in zip(before, (model, average), strict=True))
    assert str(optimizer.state_dict()) == str(state)
    monkeypatch.undo()
    compact(model, plan, optimizer=optimizer, also=average)
    assert model(x).isfinite().all()


class LiteralSlice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.head(self.last(x[:, :4] + x[:, 4:8]).mean((2, 3)))


def test_literally_sliced_channels_stay():
    model, x = LiteralSlice(), nets.inputs()
    graph = trace(model, x)
    assert "takes part of the channels" in graph.explain("conv")
    check_removal(model, x, graph, random_plan(graph, 0.5), tolerance=1e-5)
    assert len(model.conv.weight) == 8


def wider():
    model = nets.small("chain")
    model.first, model.norm, model.second = (
        nn.Conv2d(3, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.Conv2d(10, 6, 3, padding=1, stride=2),
    )
    return model


@pytest.mark.parametrize("other", [wider, lambda: nets.small("residual"), lambda: nets.small("flatten")])
def test_the_plan_of_another_model_is_refused(other):
    plan = random_plan(trace(nets.small("chain"), nets.inputs()), 0.5)
    model = other()
    with refused(model, PlanError, "does not fit model"):
        compact(model, plan)


def test_a_plan_is_applied_once():
    model, x = nets.small("chain"), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)
    compact(model, plan)
    with refused(model, PlanError, "expects"):
        compact(model, plan)


def test_an_average_that_does_not_fit_stops_everything():
    model, x = nets.small("chain"), nets.inputs()
    before = nets.snapshot(model)
    plan = random_plan(trace(model, x), 0.5)
    with pytest.raises(PlanError, match=r"also\[1\]"):
        compact(model, plan, also=[copy.deepcopy(model), nets.small("residual")])
    with pytest.raises(TypeError, match=r"also\[0\]"):
        compact(model, plan, also=[3])
    assert nets.unchanged(before, model)


def test_arguments_in_another_order_are_refused_in_words():
    model, x = nets.small("chain"), nets.inputs()
    graph = trace(model, x)
    plan = random_plan(graph, 0.5)
    with refused(model, TypeError, "PrunePlan"):
        compact(model, graph, plan)
    with refused(model, TypeError, "keep_removed"):
        restore(model, compact(copy.deepcopy(model), plan))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with refused(model, TypeError, "optimizer must be a torch.optim optimizer"):
        compact(model, plan, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with refused(model, TypeError, "also must be a module"):
        compact(model, plan, None, optimizer)
    with refused(model, TypeError, "plan must be a PrunePlan"), masked(model, plan, graph):
        pass
    with refused(model, TypeError, "graph must be the ChannelGraph"), masked(model, model, plan):
        pass


def test_what_stays_may_stay_in_another_order():
    model, x = nets.small("chain", dtype=torch.float64), nets.inputs(dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    state, grads = copy.deepcopy(model.state_dict()), {name: p.grad.clone() for name, p in model.named_parameters()}
    momenta = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    plan = random_plan(trace(model, x), 0.5)
    plan = dataclasses.replace(plan, keep={key: kept.flip(0) for key, kept in plan.keep.items()}, graph=None)
    removed = compact(model, plan, optimizer=optimizer, keep_removed=True)
    for name, p in model.named_parameters():
        for now, then in ((p, state[name]), (p.grad, grads[name]), (optimizer.state[p]["exp_avg"], momenta[name])):
            for d, kept in plan.cuts.get(name, {}).items():
                then = then.index_select(d, kept)
            assert torch.equal(now, then)
    restore(model, removed, optimizer)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


class Fault(TorchDispatchMode):
    """The operator call of that number runs out of memory."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.left == 0:
            raise MemoryError(f"no room for {func}")
        self.left -= 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_removed", [False, True])
@pytest.mark.parametrize("order", ["ascending", "another"])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.LBFGS])
def test_a_cut_and_its_undoing_that_fail_anywhere_change_nothing(make, order, keep_removed):
    model, x = nets.small("chain"), nets.inputs()
    optimizer, average = make(model.parameters()), AveragedModel(model)
    step(model, optimizer, x, torch.tensor([0, 1]))
    plan = random_plan(trace(model, x), 0.5)
    if order == "another":
        plan = dataclasses.replace(plan, keep={key: kept.flip(0) for key, kept in plan.keep.items()}, graph=None)

    def everything():
        tensors = [{**m.state_dict(), **{f"{n}.grad": p.grad for n, p in m.named_parameters()}} for m in (model, average)]
        return tensors, {n: vars(m).get("in_channels") for n, m in model.named_modules()}, optimizer.state_dict()

    def until_it_succeeds(call):
        before = copy.deepcopy(everything())
        for number in itertools.count():
            try:
                with Fault(number):
                    call()
            except MemoryError:
                assert same_state(everything(), before)
                attributes_match(model)
                assert all(p.data_ptr() == t.data_ptr() for p, t in zip(model.parameters(), places, strict=True))
            else:
                assert number > 10 and not same_state(everything(), before)
                return

    places, removed = [p.data for p in model.parameters()], []
    until_it_succeeds(lambda: removed.append(compact(model, plan, optimizer, average, keep_removed=keep_removed)))
    step(model, optimizer, x, torch.tensor([0, 1]))
    if keep_removed:
        places = [p.data for p in model.parameters()]
        until_it_succeeds(lambda: restore(model, removed[0], optimizer, average))


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("number", [0, 1, 5, "last"])
def test_data_that_cannot_be_given_to_a_tensor_is_taken_from_the_others(monkeypatch, number):
    model, x = nets.small("chain"), nets.inputs()
    plan, module = random_plan(trace(model, x), 0.5), sys.modules["taylored._compact"]
    number, calls, replace = len(plan.shapes) - 1 if number == "last" else number, itertools.count(), module._replace

    def fail(tensor, data):
        if next(calls) == number:
            raise RuntimeError("no data for you")
        replace(tensor, data)

    monkeypatch.setattr(module, "_replace", fail)
    with refused(model, RuntimeError, "no data for you"):
        compact(model, plan)
    attributes_match(model)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
def test_signals_wait_until_the_cut_is_done(monkeypatch):
    model, x = nets.small("chain"), nets.inputs()
    plan, move = random_plan(trace(model, x), 0.5), ops.compact_many_

    def handler(_number, _frame):
        raise TimeoutError("time is up")

    def compact_many_(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return move(*args)

    monkeypatch.setattr(ops, "compact_many_", compact_many_)
    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeoutError, match="time is up"):
            compact(model, plan)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert all(tuple(model.state_dict()[name].shape) == plan.shape_after(name) for name in plan.shapes)
    model(x)


@pytest.mark.parametrize("indices", [[0, 0], [0, 99], [-1, 0], [1, 0, 1], []])
def test_double_or_stray_indices_are_refused(indices):
    model, x = nets.small("chain"), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)
    key = next(iter(plan.keep))
    bad = dataclasses.replace(plan, keep={**plan.keep, key: torch.tensor(indices, dtype=torch.int64)})
    with refused(model, PlanError, "different"):
        compact(model, bad)


def test_a_weight_with_gaps_is_refused():
    model, x = nets.small("chain"), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)
    model.first.weight = nn.Parameter(torch.randn(8, 3, 3, 6)[..., ::2])
    with refused(model, PlanError, "contiguous"):
        compact(model, plan)


class Twins(nn.Module):
    """Two layers of a residual stream."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        x = x + self.one(x).relu()
        return self.last((x + self.two(x).relu()).mean((2, 3)))


def test_tensors_that_share_memory_without_being_one_are_refused():
    model, x = Twins(), nets.inputs()
    model.two.weight.data = model.one.weight.data
    plan = random_plan(trace(model, x), 0.5)
    with refused(model, PlanError, "'model: one.weight' and 'model: two.weight' share memory"):
        compact(model, plan)
    model.two.weight = nn.Parameter(model.one.weight.detach().transpose(0, 1))
    with refused(model, PlanError, "share memory"):
        compact(model, plan)
    model.two.weight = nn.Parameter(model.one.weight.detach().clone())
    with refused(model, PlanError, "share memory"):
        compact(model, plan, also=model.state_dict())
    compact(model, plan)


def test_parameters_side_by_side_in_one_buffer_are_cut():
    model, x = Twins().eval(), nets.inputs()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        p.data = part.view_as(p)
    graph = trace(model, x)
    check_removal(model, x, graph, random_plan(graph, 0.5))


def test_a_model_is_cut_in_inference_mode():
    with torch.inference_mode():
        model, x = nets.small("chain"), nets.inputs()
        graph = trace(model, x)
        check_removal(model, x, graph, random_plan(graph, 0.5))


def test_traces_and_plans_see_through_a_mask():
    model, x = nets.small("depthwise"), nets.inputs()
    graph = trace(model, x)
    plan = random_plan(graph, 0.5)
    with masked(model, graph, plan):
        assert repr(trace(model, x)) == repr(graph) and random_plan(graph, 0.5) == plan


def test_the_mask_goes_with_its_context():
    model, x = nets.small("depthwise"), nets.inputs()
    graph = trace(model, x)
    expected, before = model(x), nets.snapshot(model)
    with pytest.raises(KeyError), masked(model, graph, random_plan(graph, 0.5)):
        assert not torch.equal(model(x), expected)
        raise KeyError
    assert torch.equal(model(x), expected)
    assert nets.unchanged(before, model)


def test_the_mask_reaches_compiled_code_and_leaves_it():
    model, x = nets.small("depthwise"), nets.inputs()
    graph = trace(model, x)
    plan, compiled = random_plan(graph, 0.5), torch.compile(model, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as torch comes
        whole = compiled(x)
        with masked(compiled, graph, plan):
            assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), whole)
        assert torch.equal(compiled(x), whole)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_compaction_allocates_next_to_nothing():
    model = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 1024, 3), nn.ReLU(), nn.Conv2d(1024, 64, 3))
    plan = random_plan(trace(model, torch.randn(1, 3, 8, 8)), 0.5)  # the last layer is the output: 18 MB and 2 MB are cut
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compact(model, dataclasses.replace(plan, graph=None), optimizer=optimizer)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < 1 << 20


def test_release_gives_the_freed_memory_back():
    for release, expected in ((False, 64 * 3 * 9 * 4), (True, None)):
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
        compact(model, random_plan(trace(model, torch.randn(1, 3, 8, 8)), 0.5), release=release)
        weight = model[0].weight
        assert weight.untyped_storage().nbytes() == (expected or weight.numel() * 4)


def test_nothing_to_remove_changes_nothing():
    model, x = nets.small("chain"), nets.inputs()
    before = nets.snapshot(model)
    compact(model, taylored.PrunePlan.of(trace(model, x), {}))
    assert nets.unchanged(before, model)


def test_an_optimizer_of_another_model_is_refused():
    model, x = nets.small(), nets.inputs()
    plan = random_plan(trace(model, x), 0.5)
    with refused(model, PlanError, "none of the model's parameters"):
        compact(model, plan, optimizer=torch.optim.Adam(nets.small().parameters()))


def test_the_graph_of_a_part_of_the_model_is_refused():
    class Longer(nets.Chain):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(5, 5)

        def forward(self, x):
            return self.more(super().forward(x))

    graph, model = trace(nets.small("chain"), nets.inputs()), Longer()
    for use in (
        lambda: compact(model, random_plan(graph, 0.5)),
        lambda: taylored.TaylorScorer(model, graph),
        lambda: masked(model, graph, random_plan(graph, 0.5)).__enter__(),
    ):
        with refused(model, ValueError, r"does not fit model.*'more.weight'"):
            use()
