"""A training script goes on after the cut as it would have with a model built small: schedules, scaled gradients, averages,
checkpointed segments, channels_last, files of its own, copies, and plans that were made without any memory."""

import copy
import inspect
import io
import pickle

import models as nets
import pytest
import torch
from test_compact import step
from test_score import Checkpointed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler, swa_utils
from torchvision import models

import taylored
from taylored import PrunePlan, TaylorScorer, compact, make_plan, random_plan, trace

X, Y = nets.inputs(8, dtype=torch.float64), torch.arange(8) % 5


def start(name="depthwise", optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), steps=3, model=None):
    model = (nets.small(name, dtype=torch.float64) if model is None else model).train()
    made = optimizer(model.parameters())
    for _ in range(steps):
        step(model, made, X, Y)
    return model, made


def equal(a, b, **tolerance):
    for (name, t), u in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(t, u, msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)]),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, 4),
}
PARENTS = {"LRScheduler", "_LRScheduler", "Optimizer"}


def test_every_scheduler_of_torch_is_tried():
    known = {
        n for n, v in vars(lr_scheduler).items() if (inspect.isclass(v) and "LR" in n) or n.endswith(("Scheduler", "Restarts"))
    }
    assert SCHEDULERS.keys() >= known - PARENTS


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_through_the_cut(name):
    """Learning rates and momenta are those of a run without the cut, and the optimizer uses them."""

    def run(cut):
        model, optimizer = start()
        schedule, seen = SCHEDULERS[name](optimizer), []
        for n in range(6):
            if cut and n == 3:
                compact(model, random_plan(trace(model, X), 0.5), optimizer=optimizer)
            step(model, optimizer, X, Y)
            schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
            seen.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        assert all(p.isfinite().all() for p in model.parameters())
        return seen

    assert run(cut=True) == run(cut=False)


def test_scaled_gradients_go_on():
    """A GradScaler made before the cut scales and unscales after it; an overflow skips its step as ever."""
    model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled(factor=1.0):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(X), Y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled()
    compact(model, random_plan(trace(model, X), 0.5), optimizer=optimizer)
    plain, other = copy.deepcopy((model, optimizer))
    scaled(), step(plain, other, X, Y)
    equal(model, plain, rtol=1e-9, atol=1e-12)
    before = {n: p.clone() for n, p in model.named_parameters()}
    scaled(float("inf"))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and scaler.get_scale() == 512


@pytest.mark.parametrize("factor", [2.0**16, 2.0**-16])
def test_a_scaled_loss_gives_the_same_plan(factor):
    model, graph = nets.small("residual", dtype=torch.float64), trace(nets.small("residual"), nets.inputs())
    plans = []
    for scale in (1.0, factor):
        with TaylorScorer(model, graph) as scorer:
            (cross_entropy(model(X), Y) * scale).backward()
        plans.append(make_plan(graph, scorer.scores(), target_flops=0.5))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_are_cut(reentrant):
    model, optimizer = start(model=Checkpointed().double())
    model.reentrant = reentrant
    plain = nets.NETS["depthwise"]().double()
    plain.load_state_dict(model.state_dict())
    plan = random_plan(trace(model, X), 0.5)
    assert plan == random_plan(trace(plain, X), 0.5)
    compact(model, plan, optimizer=optimizer), compact(plain, plan)
    for net in (model.eval(), plain.eval()):
        net.zero_grad()
        cross_entropy(net(X), Y).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 1e-2), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_channels_last_training_goes_on_as_contiguous_training_does(make):
    contiguous, first = start("residual", make, steps=0)
    last, second = start("residual", make, steps=0)
    last.to(memory_format=torch.channels_last)
    for n in range(5):
        if n == 3:
            for model, optimizer in ((contiguous, first), (last, second)):
                compact(model, random_plan(trace(model, X), 0.5), optimizer=optimizer)
        step(contiguous, first, X, Y), step(last, second, X.contiguous(memory_format=torch.channels_last), Y)
    equal(last, contiguous, rtol=1e-9, atol=1e-9)
    assert last.inner.weight.is_contiguous(memory_format=torch.channels_last)
    for state in second.state_dict()["state"].values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.ndim == 4:
                assert value.is_contiguous(memory_format=torch.channels_last)


def test_averages_get_their_statistics_after_the_cut():
    model, optimizer = start()
    average = swa_utils.AveragedModel(model)
    average.update_parameters(model)
    compact(model, random_plan(trace(model, X), 0.5), optimizer=optimizer, also=average)
    step(model, optimizer, X, Y)
    average.update_parameters(model)
    swa_utils.update_bn([X], average)
    torch.testing.assert_close(average.module.norm.running_mean, copy_of_statistics(average.module))
    assert average.eval()(X).isfinite().all()


def copy_of_statistics(model):
    """The mean that batch norm sees in one batch."""
    seen = []
    handle = model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    with torch.no_grad():
        model(X)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_a_script_goes_on_from_a_file_of_its_own(tmp_path, kind):
    """State dicts and the plan in one torch.save, loaded with weights_only into a freshly built original."""

    def make(p):
        return getattr(torch.optim, kind)(p, lr=1e-2)

    model, optimizer = start(optimizer=make)
    plan = random_plan(trace(model, X), 0.5)
    compact(model, plan, optimizer=optimizer, release=True)
    step(model, optimizer, X, Y)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "plan": plan}, tmp_path / "f.pt")
    with torch.serialization.safe_globals([PrunePlan]):
        there = torch.load(tmp_path / "f.pt", weights_only=True)
    assert there["plan"] == plan and there["plan"].summary() == plan.summary()
    fresh = nets.small("depthwise", seed=1, dtype=torch.float64).train()
    compact(fresh, there["plan"])
    fresh.load_state_dict(there["model"])
    other = make(fresh.parameters())
    other.load_state_dict(there["optimizer"])
    step(model, optimizer, X, Y), step(fresh, other, X, Y)
    equal(fresh, model)


def test_copies_and_pickles_of_a_cut_model_train_on_apart():
    model, optimizer = start()
    compact(model, random_plan(trace(model, X), 0.5), optimizer=optimizer)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    copies.append(torch.load(file, weights_only=False))
    state = copy.deepcopy(model.state_dict())
    for twin, own in copies:
        step(twin, own, X, Y)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    step(model, optimizer, X, Y)
    for twin, _ in copies:
        equal(twin, model)


def test_a_graph_that_was_pickled_plans_and_cuts():
    model, (x, y) = nets.small("depthwise"), (nets.inputs(8), Y)
    graph = trace(model, x)
    there = pickle.loads(pickle.dumps(graph))
    assert there.explain() == graph.explain() and random_plan(there, 0.5) == random_plan(graph, 0.5)
    with TaylorScorer(model, there) as scorer:
        cross_entropy(model(x), y).backward()
    compact(model, make_plan(there, scorer.scores(), target_flops=0.5))
    assert model(x).isfinite().all()


def test_a_plan_made_on_the_meta_device_is_the_real_models():
    """Planning and the cut itself work without memory, optimizer state included."""
    with torch.device("meta"):
        empty = models.resnet18()
    optimizer = torch.optim.Adam(empty.parameters())
    for p in empty.parameters():
        p.grad = torch.empty_like(p)
    graph = trace(empty, torch.empty(1, 3, 64, 64, device="meta"))
    plan = random_plan(graph, 0.5)
    real = models.resnet18()
    assert random_plan(trace(real, torch.zeros(1, 3, 64, 64)), 0.5) == plan
    removed = compact(empty, plan, optimizer=optimizer, keep_removed=True, release=True)
    compact(real, plan)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}
    assert all(t.is_meta for t in empty.state_dict().values())
    taylored.restore(empty, removed, optimizer=optimizer)
    assert empty.layer1[0].conv1.weight.shape == (64, 64, 3, 3) and trace(empty, torch.zeros(1, 3, 64, 64)).flops == graph.flops


class Shared(nn.Module):
    """Weights that two layers share, and an average of it that shares them too."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.two.weight, self.head = self.one.weight, nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x)).tanh()).tanh().mean((2, 3)))


def test_shared_weights_are_cut_once_and_come_back_shared():
    torch.manual_seed(0)
    model, optimizer = start(model=Shared().double())
    before = copy.deepcopy(model.state_dict())
    removed = compact(model, random_plan(trace(model, X), 0.5), optimizer=optimizer, keep_removed=True)
    assert model.one.weight is model.two.weight and len(model.one.weight) == 3
    taylored.restore(model, removed, optimizer=optimizer)
    assert model.one.weight is model.two.weight
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
