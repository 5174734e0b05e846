"""What is saved comes back; a file that is damaged, foreign or of another model is refused with the model untouched."""

import copy
import io
import os
import signal

import models as nets
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import taylored
from taylored import CheckpointError, PlanError, compact, load, random_plan, save, trace
from taylored import _checkpoint as checkpoint
from taylored import _files as files


def saved(path, name="chain", seed=0, **options):
    """A pruned model, its plan and the file it was saved to."""
    model = nets.small(name, seed)
    plan = random_plan(trace(model, nets.inputs()), 0.5)
    compact(model, plan)
    save(model, plan, path, **options)
    return model, plan


@pytest.mark.parametrize("name", nets.NETS)
def test_a_round_trip_gives_equal_outputs(tmp_path, name):
    model, plan = saved(tmp_path / "m", name)
    fresh = nets.small(name, seed=1)
    parameters = list(fresh.parameters())
    assert load(fresh, tmp_path / "m") == plan
    assert torch.equal(fresh(nets.inputs()), model(nets.inputs()))
    assert all(a is b for a, b in zip(parameters, fresh.parameters(), strict=True))


def test_the_loaded_plan_keeps_its_figures(tmp_path):
    _, plan = saved(tmp_path / "m")
    loaded = load(nets.small(), str(tmp_path / "m"))
    assert (loaded.flops, loaded.params, repr(loaded)) == (plan.flops, plan.params, repr(plan))


def test_extras_come_back(tmp_path):
    tensors = {"a": torch.arange(3), "b": torch.zeros(0, 2), "c": torch.ones((), dtype=torch.bfloat16)}
    saved(tmp_path / "m", extra={"note": [1, 2.5, "x", None]}, tensors=tensors)
    state, _, header = checkpoint.read(tmp_path / "m")
    assert header["extra"] == {"note": [1, 2.5, "x", None]}
    assert all(torch.equal(state[f"extra:{n}"], t) and state[f"extra:{n}"].dtype == t.dtype for n, t in tensors.items())


def test_a_file_is_a_state_dict_for_any_reader(tmp_path):
    model, _ = saved(tmp_path / "m")
    weights = {n: t for n, t in load_file(tmp_path / "m").items() if ":" not in n}
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        model[2].weight = model[1].weight
        return model

    model, x = tied(0), torch.randn(1, 3, 9, 9)
    plan = random_plan(trace(model, x), 0.5)
    compact(model, plan)
    save(model, plan, tmp_path / "m")
    assert ("1.weight" in load_file(tmp_path / "m")) != ("2.weight" in load_file(tmp_path / "m"))
    fresh = tied(1)
    load(fresh, tmp_path / "m")
    assert fresh[1].weight is fresh[2].weight
    assert torch.equal(fresh(x), model(x))


class Tiny(nn.Sequential):
    """As small as a net with something to prune can be, so that every byte of its file can be tried."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))


def tiny_file(path):
    model = Tiny()
    plan = random_plan(trace(model, torch.zeros(1, 1, 2, 2)), 0.5)
    compact(model, plan)
    save(model, plan, path)
    return path.read_bytes()


def accepted(path, data, model):
    """Whether a file with that content is loaded; otherwise it must be refused by name."""
    path.write_bytes(data)
    try:
        load(model, path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    return True


def test_every_truncation_is_refused(tmp_path):
    data, fresh = tiny_file(tmp_path / "m"), Tiny()
    before = nets.snapshot(fresh)
    assert not [n for n in range(len(data)) if accepted(tmp_path / "cut", data[:n], fresh)]
    assert not accepted(tmp_path / "cut", data + b"x", fresh)
    assert nets.unchanged(before, fresh)
    assert accepted(tmp_path / "cut", data, fresh)


def test_every_changed_byte_is_refused(tmp_path):
    """At every position one bit, each in turn, and all eight."""
    data, fresh = bytearray(tiny_file(tmp_path / "m")), Tiny()
    before, silent = nets.snapshot(fresh), []
    for place in range(len(data)):
        for bits in (1 << place % 8, 255):
            data[place] ^= bits
            if accepted(tmp_path / "flip", data, fresh):
                silent.append((place, bits))
            data[place] ^= bits
    assert not silent
    assert nets.unchanged(before, fresh)


def test_foreign_files_are_refused(tmp_path):
    fresh = nets.small()
    before = nets.snapshot(fresh)
    save_file(dict(fresh.state_dict()), tmp_path / "plain")
    torch.save(fresh.state_dict(), tmp_path / "pickle")
    (tmp_path / "text").write_text("hello")
    for name, message in (("plain", "not written by"), ("pickle", "damaged or no"), ("text", "damaged or no")):
        with pytest.raises(CheckpointError, match=message):
            load(fresh, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load(fresh, tmp_path / "nowhere")
    assert nets.unchanged(before, fresh)


def wider():
    model = nets.small()
    model.head = nn.Linear(96, 7)
    return model


def pruned():
    model = nets.small()
    compact(model, random_plan(trace(model, nets.inputs()), 0.5, seed=1))
    return model


@pytest.mark.parametrize("other", [lambda: nets.small("residual"), lambda: nets.small("twice"), wider, pruned])
def test_another_model_is_refused_untouched(tmp_path, other):
    saved(tmp_path / "m")
    model = other()
    before = nets.snapshot(model)
    with pytest.raises(CheckpointError, match=r"m: |m does not fit|m was pruned"):
        load(model, tmp_path / "m")
    assert nets.unchanged(before, model)


def test_saving_replaces_and_leaves_no_other_file(tmp_path):
    saved(tmp_path / "m")
    model, _ = saved(tmp_path / "m", seed=3)
    assert os.listdir(tmp_path) == ["m"]
    fresh = nets.small()
    load(fresh, tmp_path / "m")
    assert torch.equal(fresh(nets.inputs()), model(nets.inputs()))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch, call):
    saved(tmp_path / "m")
    old = (tmp_path / "m").read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space"):
        saved(tmp_path / "m", seed=3)
    assert os.listdir(tmp_path) == ["m"] and (tmp_path / "m").read_bytes() == old


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_process_that_is_killed_while_it_saves_leaves_the_old_file(tmp_path, call, when):
    """Killed for good, with nothing cleaned up, just before or just after a step of writing; or with half of it written."""
    saved(tmp_path / "m")
    old, model = (tmp_path / "m").read_bytes(), nets.small(seed=3)
    plan = random_plan(trace(model, nets.inputs()), 0.5)
    compact(model, plan)
    child = os.fork()
    if child == 0:
        try:
            kill_at(call, when)
            save(model, plan, tmp_path / "m")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert ((tmp_path / "m").read_bytes() == old) == ((call, when) != ("replace", "after"))
    load(nets.small(), tmp_path / "m")


def kill_at(call, when):
    """Let this process die at a step of files.write_atomically."""

    def fatal(*arguments):
        if when == "after":
            genuine(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    class Torn(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2] if when == "before" else data)
            os.kill(os.getpid(), signal.SIGKILL)

    if call in ("open", "write"):
        genuine = open
        files.open = fatal if call == "open" else Torn
    else:
        genuine = getattr(os, call)
        setattr(os, call, fatal)


def test_saving_changes_no_model(tmp_path):
    model = nets.small()
    plan = random_plan(trace(model, nets.inputs()), 0.5)
    compact(model, plan)
    before = nets.snapshot(model)
    save(copy.copy(model), plan, tmp_path / "m", extra={"a": 1})
    assert nets.unchanged(before, model)


def test_loading_keeps_the_models_own_type_and_device(tmp_path):
    saved(tmp_path / "m")
    fresh = nets.small().double()
    load(fresh, tmp_path / "m")
    assert all(p.dtype == torch.float64 for p in fresh.parameters())


def test_a_model_that_the_plan_was_not_applied_to_is_not_saved(tmp_path):
    model = nets.small()
    first = random_plan(trace(model, nets.inputs()), 0.3)
    with pytest.raises(PlanError, match="Compact it first"):
        save(model, first, tmp_path / "m")
    compact(model, first)
    second = random_plan(trace(model, nets.inputs()), 0.3)
    compact(model, second)
    with pytest.raises(PlanError, match=r"first\.then"):
        save(model, first, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    save(model, first.then(second), tmp_path / "m")
    fresh = nets.small()
    load(fresh, tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_a_loaded_model_keeps_no_memory_of_what_was_cut(tmp_path):
    saved(tmp_path / "m")
    model = nets.small()
    load(model, tmp_path / "m")
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in model.state_dict().values())


def test_a_failing_write_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        saved(tmp_path / "nowhere" / "m")
    assert raised.value.filename == str(tmp_path / "nowhere" / "m") and "None" not in str(raised.value)


def test_arguments_in_another_order_are_refused_in_words(tmp_path):
    model, plan = saved(tmp_path / "m")
    with pytest.raises(TypeError, match=r"save\(model, plan, path\)"):
        save(tmp_path / "n", model, plan)
    with pytest.raises(TypeError, match=r"load\(model, path\)"):
        load(tmp_path / "m", model)
    with pytest.raises(TypeError, match="export"):
        taylored.export(model, tmp_path / "n.onnx", nets.inputs())
