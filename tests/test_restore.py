"""What was cut comes back exactly; what was learned in between stays; what cannot be put back is refused untouched."""

import copy
import pickle

import models as nets
import pytest
import torch
from test_compact import OPTIMIZERS, step, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_flatten

import taylored
from taylored import PlanError, PrunePlan, Removed, compact, random_plan, restore, trace


def everything(model, optimizers=(), also=()):
    """All that compact changes, but for where it lies in memory."""
    return copy.deepcopy((
        [nets.snapshot(m)[:3] for m in (model, *also)],
        [{n: p.grad for n, p in m.named_parameters()} for m in (model, *also)],
        [{n: t.stride() for n, t in m.state_dict().items()} for m in (model, *also)],
        [o.state_dict() for o in optimizers],
    ))  # fmt: skip


def same(a, b):
    """Whether nested values are equal, to the last bit."""
    (a, here), (b, there) = tree_flatten(a), tree_flatten(b)
    return here == there and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ratio", [0.5, 1.0], ids=["half", "all but one"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_everything_comes_back_exactly(kind, ratio):
    model, optimizer, x, y = trained(kind)
    average = AveragedModel(model)
    average.update_parameters(model)
    before = everything(model, [optimizer], [average])
    parameters = list(model.parameters())
    if kind.startswith("lbfgs"):  # which torch cannot copy
        reference = copy.deepcopy(model)
        other = OPTIMIZERS[kind](reference.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        reference, other = copy.deepcopy((model, optimizer))
    removed = compact(model, random_plan(trace(model, x), ratio), optimizer=optimizer, also=average, keep_removed=True)
    assert model.eval()(x).isfinite().all()
    restore(model.train(), removed, optimizer=optimizer, also=average)
    assert same(everything(model, [optimizer], [average]), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for _ in range(2):
        step(model, optimizer, x, y), step(reference, other, x, y)
        assert same(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_way_in_which_channels_hang_together_comes_back(name, channels_last):
    model, x = nets.small(name), nets.inputs()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    before, expected = everything(model), model(x)
    removed = compact(model, random_plan(trace(model, x, fully_connected=True), 0.5), keep_removed=True, release=True)
    restore(model, removed)
    assert same(everything(model), before) and torch.equal(model(x), expected)


def test_what_was_learned_in_between_stays():
    model, optimizer, x, y = trained("adam")
    plan = random_plan(trace(model, x), 0.5)
    removed = compact(model, plan, optimizer=optimizer, keep_removed=True)
    before = {n: t.clone() for n, t in pickle.loads(pickle.dumps(removed)).lost["model: expand.weight"].items()}
    step(model, optimizer, x, y)
    learned = {n: t.clone() for n, t in model.state_dict().items()}
    momentum = optimizer.state[model.expand.weight]["exp_avg"].clone()
    restore(model, removed, optimizer=optimizer)
    for name, dims in plan.cuts.items():
        kept = model.state_dict()[name]
        for d, indices in dims.items():
            kept = kept.index_select(d, indices)
        assert torch.equal(kept, learned[name])
    rows, columns = (plan.keep["expand.weight", d] for d in (0, 1))
    assert torch.equal(model.expand.weight[plan.removed["expand"]][:, columns], before[0])
    assert torch.equal(optimizer.state[model.expand.weight]["exp_avg"][rows][:, columns], momentum)
    step(model, optimizer, x, y)
    assert all(p.isfinite().all() for p in model.parameters())


def test_lbfgs_that_has_stepped_starts_its_history_anew():
    model, optimizer, x, y = trained("lbfgs")
    removed = compact(model, random_plan(trace(model, x), 0.5), optimizer=optimizer, keep_removed=True)
    step(model, optimizer, x, y)
    restore(model, removed, optimizer=optimizer)
    reference = copy.deepcopy(model)
    step(model, optimizer, x, y)
    step(reference, OPTIMIZERS["lbfgs"](reference.parameters()), x, y)
    assert same(model.state_dict(), reference.state_dict())


def test_gradients_that_are_gone_stay_so_and_new_ones_get_zeros():
    model, x = nets.small("chain"), nets.inputs()
    model(x).sum().backward()
    removed = compact(model, plan := random_plan(trace(model, x), 0.5), keep_removed=True)
    model.zero_grad()
    second = copy.deepcopy(model)
    restore(model, removed)
    assert all(p.grad is None for p in model.parameters())
    second(x).sum().backward()
    restore(
        second, taylored.Removed(plan, {n: v for n, v in removed.lost.items() if "grad" not in n}, removed.strides, removed.sizes)
    )
    assert not second.first.weight.grad[plan.removed["first"]].any() and second.first.weight.grad.any()


def test_cuts_in_a_row_are_undone_last_one_first():
    model, x = nets.small("depthwise"), nets.inputs()
    before, cuts = everything(model), []
    for seed in range(3):
        cuts.append(compact(model, random_plan(trace(model, x), 0.3, seed), keep_removed=True))
    between = everything(model)
    with pytest.raises(PlanError, match="the plan leaves"):
        restore(model, cuts[0])
    assert same(everything(model), between)
    for cut in reversed(cuts):
        restore(model, cut)
    assert same(everything(model), before)


def test_what_is_kept_survives_a_file_and_a_copy(tmp_path):
    model, x = nets.small("residual"), nets.inputs()
    before = everything(model)
    removed = compact(model, random_plan(trace(model, x), 0.5), keep_removed=True)
    torch.save({"model": model.state_dict(), "removed": removed}, tmp_path / "f.pt")
    with torch.serialization.safe_globals([PrunePlan, Removed]):
        there = torch.load(tmp_path / "f.pt", weights_only=True)
    other = copy.deepcopy(model)
    other.load_state_dict(there["model"])
    restore(other, there["removed"])
    assert same(everything(other), before)
    assert "MiB" in repr(removed)


def test_a_model_of_another_type_gets_its_slices_in_that_type():
    model, x = nets.small("chain"), nets.inputs()
    expected = copy.deepcopy(model).double()
    removed = compact(model, random_plan(trace(model, x), 0.5), keep_removed=True)
    restore(model.double(), removed)
    assert same(model.state_dict(), expected.state_dict())


def test_nothing_is_returned_unless_asked_for():
    model, x = nets.small("chain"), nets.inputs()
    assert compact(model, random_plan(trace(model, x), 0.5)) is None


@pytest.mark.parametrize("missing", ["optimizer", "also"])
def test_restoring_without_what_was_compacted_is_refused(missing):
    model, optimizer, x, _ = trained("adam")
    average = AveragedModel(model)
    given = {"optimizer": optimizer, "also": average}
    removed = compact(model, random_plan(trace(model, x), 0.5), **given, keep_removed=True)
    before = everything(model, [optimizer], [average])
    with pytest.raises(PlanError, match=rf"{missing}\[0\] was compacted with the model"):
        restore(model, removed, **{k: v for k, v in given.items() if k != missing})
    assert same(everything(model, [optimizer], [average]), before)


@pytest.mark.parametrize("other", [lambda: nets.small("chain"), lambda: nets.small("residual")])
def test_restoring_another_model_is_refused(other):
    model, x = nets.small("chain"), nets.inputs()
    removed = compact(model, random_plan(trace(model, x), 0.5), keep_removed=True)
    stranger = other()
    before = nets.snapshot(stranger)
    with pytest.raises(PlanError, match="does not fit model"):
        restore(stranger, removed)
    assert nets.unchanged(before, stranger)


def test_a_plan_that_removes_nothing_restores_nothing():
    model, x = nets.small("chain"), nets.inputs()
    before = nets.snapshot(model)
    restore(model, compact(model, PrunePlan.of(trace(model, x), {}), keep_removed=True))
    assert nets.unchanged(before, model)
