"""The oracle is exact: zeroing every unit in turn and running the whole model gives the same; so does removing it."""

import copy
import math
import os
import subprocess
import sys
import textwrap
import warnings

import models as nets
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import taylored
from taylored import compact, ops, oracle, random_plan, trace
from taylored._masking import zeroed
from taylored._oracle.exact import Replay
from taylored._oracle.measure import parse_memory

ARCHITECTURES = [
    "vgg11_bn", "resnet18", "resnext50_32x4d", "densenet121", "googlenet", "squeezenet1_1", "mobilenet_v2",
    "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
]  # fmt: skip


def task(count=6, classes=5, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


@torch.inference_mode()
def brute_force(model, graph, batches, units=None):
    """(change of the mean loss of each unit, mean loss), by running the whole model with the unit zeroed."""

    def loss():
        return sum(float(cross_entropy(model(x), y, reduction="sum")) for x, y in batches) / sum(len(y) for _, y in batches)

    changes, base = {}, loss()
    for group in graph.groups:
        changes[group.name] = torch.full((group.units,), math.nan, dtype=torch.float64)
        for unit in range(group.units) if units is None else units[group.name]:
            with zeroed(model, graph, {group.name: torch.tensor([unit])}):
                changes[group.name][unit] = loss() - base
    return changes, base


def agree(found, expected, base, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name].isnan(), expected[name].isnan())
        error = (found[name] - expected[name]).nan_to_num().abs()
        assert (error <= tolerance * (base + expected[name].nan_to_num()).abs()).all(), name


def without_warnings(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "runs the whole model": the replay did not work
        return oracle(*arguments, progress=False, **options)


@pytest.mark.parametrize("name", nets.NETS)
def test_every_unit_is_exact(name):
    model, batches = nets.small(name), [task(6), task(3, seed=1)]
    graph = trace(model, nets.inputs(1))
    expected, base = brute_force(model, graph, batches)
    assert any((change.abs() > 1e-4).any() for change in expected.values())
    changes = without_warnings(model, graph, batches, cross_entropy, mode="loss")
    agree(changes, expected, base)
    found = without_warnings(model, graph, batches, cross_entropy)
    assert all(torch.equal(found[n], changes[n].abs()) for n in found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_architectures_are_exact(name):
    from torchvision import models

    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    x, y = task(3, 1000, size=64)
    model = nets.randomised(models.get_model(name, weights=None, **options), x).eval()
    graph = trace(model, x[:1])
    units = {g.name: [torch.randint(g.units, ()).item()] for g in graph.groups}
    expected, base = brute_force(model, graph, [(x, y)], units)
    agree(without_warnings(model, graph, [(x, y)], cross_entropy, mode="loss", units=units), expected, base)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norms", [0, 1, 2, 3])
def test_batch_norms_in_a_row_are_exact(norms, affine):
    torch.manual_seed(0)
    row = [nn.BatchNorm2d(6, affine=affine) for _ in range(norms)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=affine), *row, nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    nets.randomised(model).eval()
    x, y = task()
    graph = trace(model, x[:1])
    agree(without_warnings(model, graph, [(x, y)], cross_entropy, mode="loss"), *brute_force(model, graph, [(x, y)]))


@pytest.fixture
def bfloat16(monkeypatch):
    """Used even where the processor has no arithmetic for it: the same program, on torch's slow kernels."""
    monkeypatch.setattr(sys.modules["taylored._oracle.measure"], "computes_in_bfloat16", lambda device: True)


def test_bfloat16_gives_way_where_it_would_be_slower(monkeypatch):
    monkeypatch.setattr(sys.modules["taylored._oracle.measure"], "computes_in_bfloat16", lambda device: False)
    model, batches = nets.small("chain"), [task()]
    graph = trace(model, nets.inputs(1))
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic"):
        found = oracle(model, graph, batches, cross_entropy, precision="bfloat16", progress=False)
    expected = oracle(model, graph, batches, cross_entropy, progress=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "name", [*nets.NETS, "mobilenet_v3_small", pytest.param("densenet121", marks=pytest.mark.slow), "squeezenet1_1"]
)
def test_bfloat16_rounds_the_change_not_the_value(name, bfloat16):
    """A unit's change is as in float32 but for a few of bfloat16's roundings of itself, however small it is. (One in twenty may
    be further off: torch's kernels for processors without bfloat16 round more often.)"""
    torch.manual_seed(0)
    if name in nets.NETS:
        model, batches, units = nets.small(name), [task(6), task(3, seed=1)], None
    else:
        from torchvision import models

        x, y = task(3, 1000, size=64)
        model, batches = nets.randomised(models.get_model(name, weights=None), x).eval(), [(x, y)]
    graph = trace(model, batches[0][0][:1])
    if name not in nets.NETS:
        units = {g.name: torch.randint(g.units, (2,)) for g in graph.groups}
    exact, fast = (
        without_warnings(model, graph, batches, cross_entropy, mode="loss", units=units, precision=p)
        for p in ("float32", "bfloat16")
    )
    a, b = (torch.cat([found[name][~found[name].isnan()] for name in exact]) for found in (exact, fast))
    assert len(a) > 5 and ((a - b).norm() <= 0.02 * a.norm())
    assert ((a - b).abs() <= 0.1 * a.abs() + 1e-3 * a.abs().max()).double().mean() >= 0.95


@pytest.mark.parametrize("name", nets.NETS)
def test_the_change_is_that_of_the_model_really_pruned(name):
    model, (x, y) = nets.small(name), task()
    graph = trace(model, x[:1])
    changes = without_warnings(model, graph, [(x, y)], cross_entropy, mode="loss")
    with torch.inference_mode():
        base = float(cross_entropy(model(x), y))
    for group in (g for g in graph.groups if g.name not in graph.bundled):  # those of a bundle cannot go one at a time
        for unit in {0, group.units - 1}:
            pruned = copy.deepcopy(model)
            taylored.compact(pruned, taylored.PrunePlan.of(graph, {group.name: torch.tensor([unit])}))
            with torch.inference_mode():
                loss = float(cross_entropy(pruned(x), y))
            assert loss - base == pytest.approx(float(changes[group.name][unit]), abs=1e-5 * loss)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [1, "4KiB", "100kB"])
def test_little_memory_changes_nothing(memory, precision, bfloat16):
    model, batches = nets.small("concatenation"), [task(7)]
    graph = trace(model, nets.inputs(1))
    expected = without_warnings(model, graph, batches, cross_entropy, mode="loss", precision=precision)
    found = without_warnings(model, graph, batches, cross_entropy, mode="loss", precision=precision, memory=memory)
    rtol = 1e-4 if precision == "float32" else 2e-2  # bfloat16 rounds otherwise where fewer pairs run together
    assert all(torch.allclose(found[n], expected[n], rtol=rtol, atol=1e-6) for n in expected)


def test_the_absolute_value_is_taken_after_averaging():
    model, batches = nets.small(), [task(4, seed=s) for s in range(3)]
    graph = trace(model, nets.inputs(1))
    each = [oracle(model, graph, [b], cross_entropy, mode="loss", progress=False) for b in batches]
    whole = oracle(model, graph, batches, cross_entropy, progress=False)
    for name, values in whole.items():
        mean = sum(e[name] for e in each) / 3
        torch.testing.assert_close(values, mean.abs(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(values, sum(e[name].abs() for e in each) / 3, rtol=1e-3)


def test_units_that_are_zero_anyway_are_not_run(monkeypatch):
    x, y = task()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)).eval()
    with torch.no_grad():
        model[0].bias[2] = -100.0  # dead
    graph, pairs = trace(model, x[:1]), []
    replay = Replay.replay

    def counting(self, tail, values, rows, segments):
        pairs.append((tail.group.name, [u for u, *_ in segments], len(rows)))
        return replay(self, tail, values, rows, segments)

    monkeypatch.setattr(Replay, "replay", counting)
    found = oracle(model, graph, [(x, y)], cross_entropy, mode="loss", progress=False)
    assert found["0"][2] == 0 and (found["0"] != 0).sum() == 5
    assert all(2 not in units for name, units, _ in pairs if name == "0")
    assert sum(count for name, _, count in pairs if name == "0") <= 5 * len(x)


def test_convolutions_skip_zeros_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    torch.manual_seed(0)
    x, y = task()
    channels, activations = [3, 5, 130, 128, 131], [nn.ReLU(), nn.ReLU(), nn.SiLU(), nn.ReLU()]
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, channels[1:], strict=False)]
    body = [module for pair in zip(layers, activations, strict=True) for module in pair]
    model = nn.Sequential(*body, nn.Conv2d(131, 128, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(128 * 16, 5)).eval()
    graph, weights = trace(model, x[:1]), []
    skipping = ops.sparse_conv
    monkeypatch.setattr(ops, "sparse_conv", lambda *a: weights.append(tuple(a[1].shape)) or skipping(*a))
    units = {g.name: range(0, g.units, 9) for g in graph.groups}
    found = without_warnings(model, graph, [(x, y)], cross_entropy, mode="loss", units=units)
    agree(found, *brute_force(model, graph, [(x, y)], units))
    # The first has few outputs, the fourth's input is seldom zero, the last has a stride.
    assert set(weights) == {(3, 5, 3, 130), (3, 130, 3, 128)} and len(weights) > 4


def test_a_loss_that_cannot_be_mapped_and_structured_outputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.small("residual")

        def forward(self, x, *, scale):
            return {"logits": self.net(x) * scale, "other": (x,)}

    def loss(output, targets):
        if float(output["logits"].sum()) > 1e9:  # data-dependent: vmap refuses
            raise AssertionError
        return cross_entropy(output["logits"], targets[0])

    model, (x, y) = Named().eval(), task()
    inputs = {"x": x, "scale": torch.ones(len(x), 1)}
    graph = trace(model, {"x": x[:1], "scale": torch.ones(1, 1)})
    plain = trace(model.net, x[:1])
    found = oracle(model, graph, [(inputs, [y])], loss, mode="loss", progress=False)
    expected = oracle(model.net, plain, [(x, y)], cross_entropy, mode="loss", progress=False)
    for (_, a), (_, b) in zip(sorted(found.items()), sorted(expected.items()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_that_cannot_be_exported_is_masked_and_said_to_be():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.small()

        def forward(self, x):
            return self.net(x) if float(x.sum()) < 1e9 else self.net(-x)

    model, (x, y) = Branching().eval(), task()
    graph = trace(model, x[:1])
    with pytest.warns(UserWarning, match="whole model for each unit: it cannot be exported"):
        found = oracle(model, graph, [(x, y)], cross_entropy, mode="loss", progress=False)
    agree(found, *brute_force(model, graph, [(x, y)]))


def test_the_model_is_left_as_it_was():
    model = nets.small("depthwise").train()
    before = nets.snapshot(model)
    oracle(model, trace(model, nets.inputs(1)), [task()], cross_entropy, progress=False)
    assert nets.unchanged(before, model) and model.training


def test_bfloat16_says_how_well_it_agrees(capsys, bfloat16):
    model, batches = nets.small("flatten"), [task(32)]
    graph = trace(model, nets.inputs(1))
    fast = oracle(model, graph, batches, cross_entropy, precision="bfloat16")
    exact = oracle(model, graph, batches, cross_entropy, progress=False)
    assert "Spearman's rho" in capsys.readouterr().out
    a, b = torch.cat(list(fast.values())), torch.cat(list(exact.values()))
    assert not torch.equal(a, b) and torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.95


def test_a_killed_run_goes_on_where_it_was(monkeypatch, tmp_path):
    model, batches = nets.small("concatenation"), [task(5), task(5, seed=1)]
    graph = trace(model, nets.inputs(1))
    expected = oracle(model, graph, batches, cross_entropy, memory="60kB", progress=False)
    monkeypatch.setattr(sys.modules["taylored._oracle.journal"], "SAVE_EVERY", 0.0)
    replay, steps = Replay.replay, []

    def dying(self, *arguments):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(1)
        return replay(self, *arguments)

    options = {"memory": "60kB", "progress": False, "checkpoint": tmp_path / "oracle.safetensors"}
    monkeypatch.setattr(Replay, "replay", dying)
    with pytest.raises(KeyboardInterrupt):
        oracle(model, graph, batches, cross_entropy, **options)
    counted = []
    monkeypatch.setattr(Replay, "replay", lambda self, *a: counted.append(1) or replay(self, *a))
    found = oracle(model, graph, batches, cross_entropy, **options)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    whole = len(counted) + 7
    counted.clear()
    again = oracle(model, graph, batches, cross_entropy, **options)  # it is done: nothing runs
    assert not counted and whole > 14 and all(torch.equal(again[n], expected[n]) for n in expected)
    with pytest.raises(ValueError, match="another model"):
        oracle(nets.small("concatenation", seed=1), graph, batches, cross_entropy, **options)
    (tmp_path / "oracle.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged"):
        oracle(model, graph, batches, cross_entropy, **options)


def test_two_processes_give_the_same(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch, models as nets, test_oracle
        from taylored import oracle, trace
        torch.distributed.init_process_group("gloo")
        model, batches = nets.small("concatenation"), [test_oracle.task(6)]
        found = oracle(model, trace(model, nets.inputs(1)), batches, torch.nn.functional.cross_entropy, progress=False)
        torch.save(found, {str(tmp_path)!r} + f"/{{torch.distributed.get_rank()}}.pt")
        torch.distributed.destroy_process_group()
        """)
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    model = nets.small("concatenation")
    expected = oracle(model, trace(model, nets.inputs(1)), [task(6)], cross_entropy, progress=False)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.allclose(found[n], expected[n], rtol=1e-4, atol=1e-7) for n in expected)


def test_the_bound_is_that_of_the_arithmetic():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model = nn.Sequential(model, nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x[:1])
    first, second, third = 4 * 3 * 9, 8 * 4 * 9, 2 * 8  # multiply-adds per position
    tails = 4 * (second / 4 + third) + 8 * (third / 8)
    bound = Replay(model, graph, x).bound({g.name: range(g.units) for g in graph.groups})
    assert bound == pytest.approx(12 * (first + second + third) / tails)


@pytest.mark.parametrize("text, expected", [("1GiB", 2**30), ("512MiB", 2**29), ("1.5kB", 1500), (7, 7), ("64", 64)])
def test_memory_is_read(text, expected):
    assert parse_memory(text) == expected


def test_bad_arguments_are_named():
    model = nets.small()
    graph, batches = trace(model, nets.inputs(1)), [task()]
    for options, words in [
        ({"mode": "rel"}, "mode"), ({"precision": "int8"}, "precision"), ({"memory": "lots"}, "memory"),
        ({"units": {"nope": [0]}}, "nope"), ({"units": {graph.groups[0].name: [99]}}, "units"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            oracle(model, graph, batches, cross_entropy, progress=False, **options)
    with pytest.raises(ValueError, match="empty"):
        oracle(model, graph, [], cross_entropy, progress=False)
    with pytest.raises(FloatingPointError):
        oracle(model, graph, batches, lambda o, t: cross_entropy(o, t) * math.nan, progress=False)


def test_what_can_be_read_once_only_is_refused():
    model, batches = nets.small("chain"), [task(), task(seed=1)]
    graph = trace(model, nets.inputs(1))
    for once in (iter(batches), (batch for batch in batches)):
        with pytest.raises(TypeError, match="list or a loader"):
            oracle(model, graph, once, cross_entropy, progress=False)
    with pytest.raises(TypeError, match="dict"):
        oracle(model, graph, batches, cross_entropy, units=["first.0"], progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("budget, precision", [(64, "float32"), (128, "float32"), (128, "bfloat16")])
def test_memory_stays_within_the_budget(tmp_path, budget, precision):
    """Resident memory, where malloc gives every large block back at once."""
    script = tmp_path / "peak.py"
    script.write_text(
        textwrap.dedent(f"""
        import threading, time
        import torch
        from torchvision import models
        from taylored import oracle, trace

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096

        def watch():
            while not done:
                peak.append(max(peak.pop(), resident()))
                time.sleep(0.002)

        model, x, y = models.mobilenet_v2(weights=None).eval(), torch.randn(32, 3, 128, 128), torch.zeros(32, dtype=torch.int64)
        graph = trace(model, x[:1])
        units = {{g.name: [0] for g in graph.groups[::3]}}
        loss = torch.nn.functional.cross_entropy
        options = dict(units=units, memory="{budget}MiB", precision="{precision}", progress=False)
        oracle(model, graph, [(x[:2], y[:2])], loss, **options)  # code, thread pools
        before, peak, done = resident(), [0], []
        thread = threading.Thread(target=watch)
        thread.start()
        oracle(model, graph, [(x, y)], loss, **options)
        done.append(True)
        thread.join()
        print(peak[0] - before)
        """)
    )
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.1 * budget * 2**20


def test_a_graph_of_the_model_before_its_cut_is_refused():
    model, batches = nets.small("chain"), [task(4)]
    graph = trace(model, nets.inputs(1))
    compact(model, random_plan(graph, 0.5))
    with pytest.raises(ValueError, match="graph does not fit model"):
        oracle(model, graph, batches, cross_entropy)
    with pytest.raises(TypeError, match="model must be a torch"):
        oracle(graph, model, batches, cross_entropy)
