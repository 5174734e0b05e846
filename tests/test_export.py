"""What is exported gives the same answer as the pruned model, for batches of any size, and weighs what the model weighs."""

import importlib.util
import sys

import models as nets
import numpy as np
import pytest
import torch
from test_cli import QUICK
from torch import nn
from torchvision import models

import taylored
from taylored import ExportError, compact, export, random_plan, trace
from taylored._cli import zoo
from taylored._cli.main import main

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
FORMATS = ["pt2", pytest.param("onnx", marks=pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"))]


def pruned(name):
    torch.manual_seed(0)
    small = name in nets.NETS
    x = nets.inputs(3) if small else torch.randn(3, 3, 64, 64)
    model = nets.small(name) if small else nets.randomised(models.get_model(name, weights=None), x).eval()
    compact(model, random_plan(trace(model, x), 0.5))
    return model, x


def run(path, *inputs):
    """The outputs of an exported file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    outputs = [torch.from_numpy(np.asarray(o)) for o in session.run(None, feed)]
    return outputs[0] if len(outputs) == 1 else outputs


def close(a, b):
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        "depthwise",
        "concatenation",
        "flatten",
        "twice",
        "mobilenet_v3_small",
        pytest.param("shufflenet_v2_x0_5", marks=pytest.mark.slow),
    ],
)
def test_the_exported_model_gives_the_same_answer(tmp_path, name, kind):
    model, x = pruned(name)
    path, before = tmp_path / f"m.{kind}", nets.snapshot(model)
    assert export(model, x[:1], path) < 1e-4
    assert nets.unchanged(before, model)
    for n in (1, 2, 3):
        close(run(path, x[:n]), model(x[:n]))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_file_holds_only_what_is_left(tmp_path, kind):
    model, _ = pruned("resnet18")
    export(model, torch.randn(1, 3, 64, 64), tmp_path / f"m.{kind}")
    size = sum(t.nbytes for t in model.state_dict().values())
    assert size <= (tmp_path / f"m.{kind}").stat().st_size <= size + 500_000
    assert [p.name for p in tmp_path.iterdir()] == [f"m.{kind}"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_was_saved_is_loaded_and_exported(tmp_path, kind):
    model, x = pruned("depthwise")
    fresh = nets.small("depthwise")
    plan = random_plan(trace(fresh, x), 0.5)
    taylored.save(model, plan, tmp_path / "m.safetensors")
    taylored.load(fresh, tmp_path / "m.safetensors")
    export(torch.compile(fresh), x, tmp_path / f"m.{kind}", any_batch=False)
    close(run(tmp_path / f"m.{kind}", x), model(x))


class Two(nn.Module):
    """Two inputs by keyword, a dictionary as output."""

    def __init__(self):
        super().__init__()
        self.net = nets.small("chain")

    def forward(self, x, *, scale):
        y = self.net(x)
        return {"scaled": y * scale, "plain": y}


@pytest.mark.parametrize("kind", FORMATS)
def test_keyword_inputs_and_several_outputs(tmp_path, kind):
    model, inputs = Two().eval(), {"x": nets.inputs(2), "scale": torch.full((2, 1), 3.0)}
    compact(model, random_plan(trace(model, inputs), 0.5))
    assert export(model, inputs, tmp_path / f"m.{kind}") < 1e-4


def test_only_the_two_endings_are_known(tmp_path):
    model, x = pruned("chain")
    with pytest.raises(ExportError, match=r"must end in one of \.onnx, \.pt2"):
        export(model, x, tmp_path / "m.pth")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    model, x = pruned("chain")
    monkeypatch.setattr(sys.modules["taylored._export"], "_has", lambda name: name != "onnxscript")
    with pytest.raises(ExportError, match=r"needs onnxscript: pip install 'taylored\[onnx\]'"):
        export(model, x, tmp_path / "m.onnx")


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
def test_without_onnxruntime_nothing_is_compared(tmp_path, monkeypatch):
    model, x = pruned("chain")
    monkeypatch.setattr(sys.modules["taylored._export"], "_has", lambda name: name != "onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(model, x, tmp_path / "m.onnx") is None
    assert (tmp_path / "m.onnx").exists()


class Whim(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), forward

    def forward(self, x):
        return self.how(self.conv(x))


def test_a_batch_that_the_model_fixes_is_told_with_the_way_out(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = Whim(lambda y: y.reshape(2, -1)).eval()
    with pytest.raises(ExportError, match="any_batch=False"):
        export(model, x, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
    assert export(model, x, tmp_path / "m.pt2", any_batch=False) == 0


def test_another_answer_is_an_error_and_nothing_is_written(tmp_path):
    model = Whim(lambda y: y + torch.rand(()) if torch.compiler.is_exporting() else y).eval()
    with pytest.raises(ExportError, match="another answer"):
        export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert main(["prune", "--out", str(out), *QUICK, "--target-flops", "0.6"]) == 0
    return out


@pytest.mark.parametrize("source", ["pruned", "trained"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_command_exports_what_was_pruned(finished, tmp_path, capsys, kind, source):
    file, path = finished / f"{source}.safetensors", tmp_path / f"m.{kind}"
    assert main(["export", "--pruned", str(file), "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "images anyx1x8x8" in said and "outputs within" in said
    model, x = zoo.small_vgg().eval(), torch.rand(5, 1, 8, 8)
    taylored.load(model, file)
    close(run(path, x), model(x))


def test_the_command_takes_what_a_file_does_not_say(tmp_path, capsys):
    model = zoo.small_vgg(3, 3)
    plan = random_plan(trace(model, torch.zeros(1, 3, 16, 16)), 0.5)
    compact(model, plan)
    taylored.save(model, plan, tmp_path / "m.safetensors")
    arguments = ["export", "--pruned", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "m.pt2")]
    assert main(arguments) == 2
    assert "give --model" in capsys.readouterr().err
    assert main([*arguments, "--model", "small_vgg", "--classes", "3", "--image-size", "16", "--batch", "4"]) == 0
    assert "images 4x3x16x16" in capsys.readouterr().out
    assert main([*arguments, "--model", "resnet18", "--classes", "3"]) == 2
    assert "does not fit the model" in capsys.readouterr().err


def test_the_command_takes_a_function_as_it_is(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n\ndef maps():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))\n"
    )
    model = zoo.build(f"{file}:maps", "none", None).model
    plan = random_plan(trace(model, torch.zeros(1, 3, 16, 16)), 0.5)
    compact(model, plan)
    taylored.save(model, plan, tmp_path / "m.safetensors")
    arguments = ["export", "--pruned", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "m.pt2")]
    assert main([*arguments, "--model", f"{file}:maps"]) == 0
    assert "images anyx3x224x224" in capsys.readouterr().out
    x = torch.rand(2, 3, 224, 224)
    close(run(tmp_path / "m.pt2", x), model.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pruned", "nowhere", "--out", "m.onnx"], "nowhere"),
        (["--pruned", __file__, "--out", "m.onnx"], "damaged or no safetensors file"),
    ],
)
def test_wrong_use_of_the_command_is_told_in_one_line(arguments, said, capsys):
    assert main(["export", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.startswith("taylored: ") and error.count("\n") == 1


def test_an_ending_that_is_not_known_is_told(finished, tmp_path, capsys):
    assert main(["export", "--pruned", str(finished / "pruned.safetensors"), "--out", str(tmp_path / "m.tflite")]) == 2
    assert "must end in one of" in capsys.readouterr().err
