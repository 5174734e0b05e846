"""`taylored shrink` end to end, on the digits and on a folder of pictures without classes: what it writes is true, and can be used."""

import copy
import json
import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import folder

import taylored
from taylored._cli import data, zoo
from taylored._cli.job import predictions
from taylored._cli.main import main
from taylored._cli.shrink import Calibration, rows, warning

QUICK = ["--train-epochs", "2", "--examples", "150", "--threads", "1"]
SWEEP = ["--target-flops", "0.65", "--sweep", "0.8,0.65,0.5"]
NET = "from taylored._cli.zoo import small_vgg\ndef make(num_classes=7):\n    return small_vgg(num_classes, 3)\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "made"
    assert main(["shrink", "--out", str(out), *QUICK, *SWEEP]) == 0
    return out


@pytest.fixture(scope="module")
def summary(finished):
    return json.loads((finished / "summary.json").read_text())


@pytest.fixture(scope="module")
def digits():
    return data.find("digits").load(8, 1, *data.DIGITS, batch_size=32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of noise, a note that is none, and beside them weights of a network of 7 classes and the file that builds it."""
    root = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    for i, pixels in enumerate(torch.randint(256, (30, 20, 26, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(root / f"{i:02}.JPG", format="JPEG")
    (root / "note.txt").write_text("")
    (root / "more").mkdir()
    (root / "more" / "net.py").write_text(NET)
    torch.save(zoo.small_vgg(7, 3).state_dict(), root / "more" / "seven.pth")
    return root


def flat(root, out, *more):
    net = f"{root / 'more' / 'net.py'}:make"
    arguments = ["shrink", "--data", str(root), "--model", net, "--weights", str(root / "more" / "seven.pth"), "--out", str(out)]
    return main([*arguments, "--image-size", "16", "--batch-size", "8", "--threads", "1", *more])


def loaded(file, model):
    plan = taylored.load(model, file)
    return model.eval(), plan


def share(model, batches, truth):
    return float((predictions(model, batches, torch.device("cpu")) == truth).double().mean())


def test_every_budget_is_met_and_has_a_file(finished, summary):
    assert [(e["target"], e["file"]) for e in summary["targets"]] == [
        (0.65, "pruned.safetensors"), (0.8, "pruned-0.80.safetensors"), (0.5, "pruned-0.50.safetensors"),
    ]  # fmt: skip
    for e in summary["targets"]:
        model, _ = loaded(finished / e["file"], zoo.small_vgg())
        graph = taylored.trace(model, torch.zeros(1, 1, 8, 8))
        assert 0.6 * e["target"] < e["flops_left"] <= e["target"] and e["flops_left"] == graph.flops / summary["flops"]
        assert e["params_left"] == graph.params / summary["params"] and e["units"] == graph.units


def test_nothing_else_is_left(finished):
    assert {p.name for p in finished.iterdir()} == {
        "metrics.jsonl", "summary.json", "report.html", "trained.safetensors", "pruned.safetensors", "pruned-0.80.safetensors",
        "pruned-0.50.safetensors",
    }  # fmt: skip


def test_the_accuracies_are_those_of_the_files_and_of_the_cut_alone(finished, summary, digits):
    _, test = digits
    labels = test.images.labels
    original, _ = loaded(finished / "trained.safetensors", zoo.small_vgg())
    assert summary["measure"] == "accuracy" and summary["held_out"] == 360 and summary["examples"] == 150
    assert summary["before"] == share(original, test, labels)
    for e in summary["targets"]:
        model, plan = loaded(finished / e["file"], zoo.small_vgg())
        assert e["mended"] == share(model, test, labels)
        cut = copy.deepcopy(original)
        taylored.compact(cut, plan)
        assert e["cut"] == pytest.approx(share(cut, test, labels), abs=1e-9)
    assert summary["targets"][2]["mended"] > summary["targets"][2]["cut"]


def test_the_loaded_file_is_the_mended_model_bit_for_bit(finished, digits):
    """Mended biases and running means, which the plan does not cut, come along."""
    train, test = digits
    model, _ = loaded(finished / "trained.safetensors", zoo.small_vgg())
    model.to(memory_format=torch.channels_last)
    plan = taylored.shrink(model, Calibration(train.calibration(150), torch.device("cpu")), 0.65, progress=False)
    again, kept = loaded(finished / "pruned.safetensors", zoo.small_vgg())
    again.to(memory_format=torch.channels_last)
    assert plan == kept
    with torch.inference_mode():
        assert all(torch.equal(model(x), again(x)) for x, _ in test)


def test_metrics_tells_every_round_and_every_budget(finished, summary):
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["train_epoch"] * 2 + ["round", "target"] * 3
    last = [e for e in events if e.get("round") == 1]
    assert [e["flops_left"] for e in last] == pytest.approx([e["flops_left"] for e in summary["targets"]])
    for layer, value in summary["targets"][0]["residuals"].items():
        assert value == max(e["residuals"][layer] for e in events[2:3] if layer in e["residuals"]) and 0 <= value


def test_the_report_stands_alone_and_has_every_figure(finished, summary):
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 3
    assert all(cell in page for line in rows(summary) for cell in line)
    assert warning(summary["targets"][0]["residuals"]) in page
    assert all(r.startswith(("#", "data:")) for r in re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page))


def test_the_warning_counts_the_layers_that_could_not_be_settled():
    assert warning({"a": 0.2, "b": 0.95, "c": 1.3, "d": None}).startswith("2 of 3 layers (67%) are above 0.9")
    assert warning({}).startswith("0 of 0 layers (0%)")


def test_resume_takes_the_fitted_model_and_cuts_as_before(finished, summary, capsys):
    assert main(["shrink", "--out", str(finished), *QUICK, *SWEEP, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "train epoch" not in told
    again = json.loads((finished / "summary.json").read_text())
    for one, other in zip(summary["targets"], again["targets"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    table = [line.split() for line in told.splitlines() if re.match(r"0\.\d\d ", line)]
    assert table == [list(line) for line in rows(again)] and [line[0] for line in table] == ["0.80", "0.65", "0.50"]


def test_without_classes_the_model_stays_and_agreement_is_reported(photos, tmp_path, capsys):
    assert flat(photos, tmp_path, "--sweep", "0.4") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["measure"] == "agreement" and summary["before"] == 1.0
    assert (summary["examples"], summary["held_out"], summary["settings"]["outputs"]) == (24, 6, 7)
    assert "agreement before" in capsys.readouterr().out and "Agreement against FLOPs" in (tmp_path / "report.html").read_text()
    original = zoo.small_vgg(7, 3)
    original.load_state_dict(torch.load(photos / "more" / "seven.pth"))
    _, test = data.find(str(photos), unlabelled=True).load(16, 3, *data.IMAGENET, batch_size=8)
    truth = predictions(original.eval(), test, torch.device("cpu"))
    for e in summary["targets"]:
        model, _ = loaded(tmp_path / e["file"], zoo.small_vgg(7, 3))
        assert e["mended"] == share(model, test, truth)
    assert not (tmp_path / "trained.safetensors").exists()


def test_what_was_shrunk_can_be_exported(photos, tmp_path):
    """The file says how many outputs the model has, which --weights had decided."""
    assert flat(photos, tmp_path) == 0
    assert main(["export", "--pruned", str(tmp_path / "pruned.safetensors"), "--out", str(tmp_path / "small.pt2")]) == 0
    x = torch.randn(3, 3, 16, 16)
    model, _ = loaded(tmp_path / "pruned.safetensors", zoo.small_vgg(7, 3))
    torch.testing.assert_close(torch.export.load(tmp_path / "small.pt2").module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_bits(photos, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert flat(photos, tmp_path / name, "--seed", seed) == 0
    a, b, c = (load_file(tmp_path / name / "pruned.safetensors") for name in "abc")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert a.keys() != c.keys() or not all(torch.equal(a[k], c[k]) for k in a)


def test_a_new_last_layer_is_fitted_and_the_rest_stays(photos, tmp_path):
    labelled = folder(tmp_path / "data")
    assert flat(photos, tmp_path / "out", "--data", str(labelled), "--train-epochs", "1") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["measure"] == "accuracy" and summary["settings"]["outputs"] == 2 and summary["examples"] == 12
    trained, _ = loaded(tmp_path / "out" / "trained.safetensors", zoo.small_vgg(2, 3))
    for name, was in torch.load(photos / "more" / "seven.pth").items():
        assert name.startswith("classifier") or torch.equal(was, trained.state_dict()[name]), name


@pytest.mark.parametrize("limit", [2**30, 0])
def test_calibration_images_are_the_middles_in_a_mixed_order_that_never_changes(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    source = data.find(str(folder(tmp_path)))
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        train, _ = source.load(16, 3, *data.IMAGENET, batch_size=5)
        drawn.append([torch.cat(parts) for parts in zip(*train.calibration(10), strict=True)])
    (x, labels), (again, _) = drawn
    assert torch.equal(x, again) and x.shape == (10, 3, 16, 16) and 0 < int(labels[:5].sum()) < 5
    swapped = {split: source.files[other] for split, other in (("test", "train"), ("train", "test"))}
    _, shown = data.Source(source.name, source.classes, 3, None, swapped).load(16, 3, *data.IMAGENET, batch_size=12)
    (everything, _), *_ = shown
    assert all(any(torch.equal(one, other) for other in everything) for one in x)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target-flops", "0.0001"], "cannot be met"),
        (["--sweep", "0.9,0.0001"], "cannot be met"),
        (["--ignore", "conv9"], "conv9"),
        (["--data", "nowhere"], "or a folder of images"),
        (["--weights", "nowhere.pth"], "no such file"),
    ],
)
def test_wrong_use_is_told_in_one_line_before_anything_is_trained(arguments, said, tmp_path, capsys):
    assert main(["shrink", "--out", str(tmp_path), *arguments]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.startswith("taylored: ") and told.err.count("\n") == 1
    assert "train epoch" not in told.out and not list(tmp_path.iterdir())


def test_a_folder_with_too_few_images_is_told(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert main(["shrink", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has 1 images and no train folder" in capsys.readouterr().err


def test_without_classes_nothing_can_be_trained(photos, tmp_path, capsys):
    assert flat(photos, tmp_path, "--train-epochs", "1") == 2
    assert "no classes to train for" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "wrong"), [("0.8;0.5", "0.8;0.5"), ("0.8,", ""), ("0.5,1.5", "1.5"), ("0", "0")])
def test_a_sweep_that_is_no_list_of_shares_is_named(text, wrong, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["shrink", "--out", str(tmp_path), "--sweep", text])
    assert f"argument --sweep: got {wrong!r}, expected a number" in capsys.readouterr().err


def test_two_images_are_enough_to_run(photos, tmp_path):
    assert flat(photos, tmp_path, "--examples", "2") == 0
    text = (tmp_path / "summary.json").read_text() + (tmp_path / "metrics.jsonl").read_text()
    assert not math.isnan(json.loads((tmp_path / "summary.json").read_text())["before"]) and "NaN" not in text
