"""The loop meets its budget, resumes where it was cut off, and says what is wrong before anything changes."""

import functools

import models as nets
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from taylored import CheckpointError, PlanError, load, prune
from taylored._prune import updates


def data(batches=4, seed=0):
    """Images whose class is the place of a bright square."""
    generator = torch.Generator().manual_seed(seed)
    x, y = 0.3 * torch.randn(8 * batches, 3, 8, 8, generator=generator), torch.arange(8 * batches) % 4
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1
    return list(zip(x.split(8), y.split(8), strict=True))


def accuracy(model):
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in data()) / 4


def run(model, optimizer=None, loader=None, loss=cross_entropy, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    options = {"rounds": 3, "final_epochs": 2, "progress": False, **options}
    if not {"target_flops", "target_params", "remove_units"} & options.keys():
        options["target_flops"] = 0.5
    return prune(model, data() if loader is None else loader, loss, optimizer, nets.inputs(1), **options)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_budget_is_met(name):
    model = nets.small(name).train()
    result = run(model, target_flops=0.5)
    assert result.plan.flops[1] <= 0.5 * result.plan.flops[0] and result.plan.flops[0] == result.graph.flops
    assert sum(p.numel() for p in model.parameters()) == result.plan.params[1]


@pytest.mark.parametrize("budget", [{"target_params": 0.6}, {"remove_units": 6}, {"target_flops": 20000}])
def test_every_kind_of_budget_is_met(budget):
    result = run(nets.small().train(), **budget)
    name, value = next(iter(budget.items()))
    gone = sum(map(len, result.plan.removed.values()))
    reached = {"target_params": result.plan.params[1] / result.plan.params[0], "target_flops": result.plan.flops[1]}
    assert gone == value if name == "remove_units" else reached[name] <= value


def test_a_pruned_net_still_learns():
    model = nets.small().train()
    result = run(model, evaluate=accuracy, final_epochs=10, round_epochs=3.0)
    assert result.history[-1]["accuracy"] > 0.9
    assert f"accuracy={result.history[-1]['accuracy']}" in repr(result)


def test_inputs_may_be_tuples_or_dicts():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.small()

        def forward(self, x, *, scale):
            return self.net(x) * scale

    loader = [({"x": x, "scale": torch.ones(len(x), 1)}, {"label": y}) for x, y in data()]
    example = {"x": nets.inputs(1), "scale": torch.ones(1, 1)}
    model = Scaled().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    options = {"target_flops": 0.5, "rounds": 2, "final_epochs": 0, "progress": False}
    result = prune(model, loader, lambda o, t: cross_entropy(o, t["label"]), optimizer, example, **options)
    assert result.plan.flops[1] <= 0.5 * result.plan.flops[0]


def test_frozen_statistics_stay_and_the_rest_learns():
    model = nets.small("residual").train()
    names = [name for name, _ in model.named_buffers() if "running" in name]
    assert names
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, freeze_statistics=True, checkpoint=None)
    kept = result.plan.cuts
    for name, tensor in model.state_dict().items():
        there = before[name]
        for d, indices in kept.get(name, {}).items():
            there = there.index_select(d, indices)
        if name in names:
            assert torch.equal(tensor, there)
        elif name in dict(model.named_parameters()):
            assert not torch.equal(tensor, there)


def test_the_history_tells_every_step():
    told, model = [], nets.small().train()
    result = run(model, evaluate=accuracy, log=told.append)
    assert told == result.history
    assert [e["event"] for e in told] == ["start", *["round"] * 3, *["final_epoch"] * 2]
    flops = [e["flops"] for e in told]
    assert flops == sorted(flops, reverse=True) and flops[-1] == result.plan.flops[1]
    assert all(set(e["scores"]) == set(result.plan.units) and e["kept"] for e in told if e["event"] == "round")
    assert model.training


def test_a_model_is_pruned_in_its_wrapper():
    wrapped, plain, made = nets.small("residual").train(), nets.small("residual").train(), []

    def wrap(model):
        made.append(torch.compile(model, backend="aot_eager"))
        return made[-1]

    assert run(wrapped, wrap=wrap).plan == run(plain).plan
    assert len(made) == 1 + 3  # at the start and after every cut
    for name, t in wrapped.state_dict().items():
        torch.testing.assert_close(t, plain.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_optimizer_with_a_closure_trains_as_by_hand():
    def make(p):
        return torch.optim.LBFGS(p, 0.1, max_iter=3, line_search_fn="strong_wolfe")

    def closure(x, y):
        other.zero_grad()
        loss = cross_entropy(reference(x), y)
        loss.backward()
        return loss

    model, reference = nets.small("residual"), nets.small("residual")
    other = make(reference.parameters())
    run(model, make(model.parameters()), remove_units=0, rounds=1, final_epochs=0, freeze_statistics=True)
    for x, y in data():
        other.step(functools.partial(closure, x, y))
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_parameters_stay_the_same_objects():
    model = nets.small().train()
    parameters = list(model.parameters())
    run(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_a_schedule_spans_all_updates():
    model = nets.small().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    total = updates(data(), 3, 0.5, 2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total)
    run(model, optimizer, scheduler=scheduler, round_epochs=0.5)
    assert scheduler.last_epoch == total == 3 * 2 + 2 * 4


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        lambda p: torch.optim.Adam(p, 1e-2),
        lambda p: torch.optim.LBFGS(p, 0.05, max_iter=2, history_size=3),
    ],
    ids=["sgd", "adam", "lbfgs"],
)
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_an_interrupted_run_resumes_to_the_same_end(tmp_path, kind, stop):
    def start(stop_after=None, **options):
        torch.manual_seed(5)
        model = nets.small().train()
        optimizer = kind(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        seen = []

        def log(event):
            seen.append(event)
            if stop_after is not None and len(seen) > stop_after:
                raise Interrupt

        return model, run(model, optimizer, scheduler=scheduler, log=log, **options)

    whole, expected = start()
    with pytest.raises(Interrupt):
        start(stop, checkpoint=tmp_path / "c")
    model, result = start(checkpoint=tmp_path / "c", resume=True)
    assert result.plan == expected.plan and result.plan.flops == expected.plan.flops
    assert [e["event"] for e in result.history] == [e["event"] for e in expected.history]
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, whole.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_that_is_cut_off_within_a_round_resumes(tmp_path):
    class Breaking(list):
        def __iter__(self):
            yield from self[:2]
            if calls.append(1) or len(calls) == 2:
                raise Interrupt
            yield from self[2:]

    calls = []
    with pytest.raises(Interrupt):
        run(nets.small().train(), loader=Breaking(data()), checkpoint=tmp_path / "c")
    result = run(nets.small().train(), checkpoint=tmp_path / "c", resume=True)
    assert result.plan.flops[1] <= 0.5 * result.plan.flops[0]
    assert [e["event"] for e in result.history] == ["start", *["round"] * 3, *["final_epoch"] * 2]


def test_a_finished_run_resumes_to_itself(tmp_path):
    model, again = nets.small().train(), nets.small(seed=1).train()
    result = run(model, checkpoint=tmp_path / "c")
    assert run(again, checkpoint=tmp_path / "c", resume=True).plan == result.plan
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_nan_loss_abandons_the_round_and_the_checkpoint_stands(tmp_path):
    calls = []

    def loss(output, y):
        calls.append(1)
        return cross_entropy(output, y) * (float("nan") if len(calls) == 6 else 1)

    model = nets.small().train()
    with pytest.raises(FloatingPointError, match="update 2"):
        run(model, loss=loss, checkpoint=tmp_path / "c")
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    fresh = nets.small().eval()
    plan = load(fresh, tmp_path / "c")
    assert plan.removed and fresh(nets.inputs()).isfinite().all()


def meta():
    return nets.small().to("meta")


class Hard(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 4)

    def forward(self, x):
        return self.head(self.conv(x).view(-1, 512))


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (nets.small, {"loader": []}, ValueError, "train_loader is empty"),
        (nets.small, {"loader": iter(data())}, ValueError, "train_loader must have a length"),
        (nets.small, {"rounds": 0}, ValueError, "rounds must be"),
        (nets.small, {"round_epochs": 0}, ValueError, "round_epochs"),
        (nets.small, {"final_epochs": -1}, ValueError, "final_epochs"),
        (nets.small, {"target_flops": 1e-6}, PlanError, "cannot be met"),
        (nets.small, {"target_flops": 0.5, "max_ratio": 0.1}, PlanError, "cannot be met"),
        (nets.small, {"target_flops": -1.0}, PlanError, "target_flops"),
        (nets.small, {"target_flops": 0.5, "target_params": 0.5}, PlanError, "exactly one"),
        (nets.small, {"remove_units": 10**6}, PlanError, "remove_units"),
        (nets.small, {"remove_units": 2.5}, PlanError, "remove_units"),
        (nets.small, {"ignore": "nowhere"}, PlanError, "ignore"),
        (nets.small, {"normalize": "l3"}, PlanError, "normalize"),
        (nets.small, {"reduction": "median"}, ValueError, "reduction"),
        (nets.small, {"checkpoint": "/nowhere/at/all"}, ValueError, "checkpoint"),
        (meta, {}, ValueError, "one real device"),
        (Hard, {}, PlanError, "nothing that can be removed"),
    ],
)
def test_errors_come_before_anything_changes(build, options, error, message):
    model, told = build().train(), []
    before = nets.snapshot(model) if build is not meta else None
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.raises(error, match=message):
        run(model, optimizer, log=told.append, evaluate=told.append, **options)
    assert not told and not optimizer.state
    assert before is None or nets.unchanged(before, model)


def test_a_loader_that_runs_dry_is_an_error():
    class Dry(list):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="yields nothing"):
        run(nets.small().train(), loader=Dry(data()))


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path):
    (tmp_path / "c").write_bytes(b"damaged")
    model = nets.small().train()
    before = nets.snapshot(model)
    with pytest.raises(CheckpointError):
        run(model, checkpoint=tmp_path / "c", resume=True)
    assert nets.unchanged(before, model)


@pytest.mark.parametrize("other", [{"target_flops": 0.3}, {"rounds": 2}, {"round_to": 2}, {"reduction": "square"}])
def test_resuming_with_other_settings_is_refused(tmp_path, other):
    run(nets.small().train(), checkpoint=tmp_path / "c", rounds=1, final_epochs=0)
    model = nets.small().train()
    before = nets.snapshot(model)
    with pytest.raises(CheckpointError, match=f"other settings .{next(iter(other))}"):
        run(model, checkpoint=tmp_path / "c", resume=True, **{"rounds": 1, "final_epochs": 0, **other})
    assert nets.unchanged(before, model)
    more = run(model, checkpoint=tmp_path / "c", resume=True, rounds=1, final_epochs=1)  # going on for longer is fine
    assert [e["event"] for e in more.history] == ["start", "round", "final_epoch"]


def test_mixed_up_arguments_are_named():
    model = nets.small().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    options = {"target_flops": 0.5, "progress": False}
    with pytest.raises(TypeError, match="model must be"):
        prune(data(), model, cross_entropy, optimizer, nets.inputs(1), **options)
    with pytest.raises(TypeError, match="optimizer must be"):
        prune(model, data(), cross_entropy, None, nets.inputs(1), **options)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        run(model, torch.optim.SGD(nets.small().parameters(), 0.05))
    with pytest.raises(ValueError, match=r"must yield \(inputs, targets\)"):
        run(model, loader=[x for x, _ in data()])


def test_a_bundle_shrinks_in_rounds_and_an_interrupted_run_goes_on(tmp_path):
    """The later rounds, and the resumed run, ask a model that has been cut already for layouts of the whole one."""

    def stop(event):
        if event.get("round") == 2:
            raise KeyboardInterrupt

    whole, resumed = nets.small("dealt").train(), nets.small("dealt").train()
    result = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(nets.small("dealt").train(), checkpoint=tmp_path / "c", log=stop)
    assert run(resumed, checkpoint=tmp_path / "c", resume=True).plan == result.plan
    assert result.plan.flops[1] <= 0.5 * result.plan.flops[0]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_resuming_needs_a_file():
    with pytest.raises(ValueError, match="checkpoint="):
        run(nets.small().train(), resume=True)
