"""The command end to end on small data: what it writes, that it can be resumed, and that wrong use is told in one line."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import taylored
from taylored import trace
from taylored._cli import zoo
from taylored._cli.main import main

QUICK = ["--train-epochs", "1", "--rounds", "2", "--round-epochs", "0.25", "--final-epochs", "1"]
KEYS = {f"{key}_{when}" for key in ("accuracy", "flops", "params", "units", "latency_ms") for when in ("before", "after")}


def folder(root, classes=("cat", "dog"), count=6, size=(40, 30)):
    """Pictures of one colour per class: a task that nothing can fail at."""
    for split in ("train", "test"):
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", size, (40 * i, 200 - 90 * i, 5 * n)).save(root / split / name / f"{n}.jpg")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "made" / "on" / "demand"
    assert main(["prune", "--out", str(out), *QUICK, "--target-flops", "0.6", "--round-to", "4"]) == 0
    return out


def test_the_summary_has_every_figure_and_meets_the_budget(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert KEYS | {"seconds", "settings"} <= summary.keys()
    assert 0 < summary["flops_after"] <= 0.6 * summary["flops_before"]
    assert summary["units_after"] < summary["units_before"] and summary["params_after"] < summary["params_before"]
    assert 0 <= summary["accuracy_after"] <= 1 and summary["latency_ms_after"] > 0 and summary["seconds"] > 0


def test_the_summarys_figures_are_those_of_the_written_model(finished):
    summary = json.loads((finished / "summary.json").read_text())
    model = zoo.small_vgg()
    taylored.load(model, finished / "pruned.safetensors")
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    assert (graph.flops, graph.params, graph.units) == tuple(summary[f"{k}_after"] for k in ("flops", "params", "units"))


def test_metrics_has_one_json_line_per_event(finished):
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["train_epoch", "start", "round", "round", "final_epoch", "latency"]
    assert all(a["elapsed"] <= b["elapsed"] for a, b in itertools.pairwise(events))


def test_nothing_temporary_is_left(finished):
    files = {p.name for p in finished.iterdir()}
    assert files == {
        "metrics.jsonl", "summary.json", "report.html", "pruned.safetensors", "trained.safetensors", "checkpoint.safetensors",
    }  # fmt: skip


def test_resume_of_a_finished_run_trains_nothing(finished, capsys):
    before = json.loads((finished / "summary.json").read_text())
    arguments = ["prune", "--out", str(finished), *QUICK, "--target-flops", "0.6", "--round-to", "4", "--resume"]
    assert main(arguments) == 0
    after = json.loads((finished / "summary.json").read_text())
    same = [k for k in KEYS if not k.startswith("latency")]
    assert {k: before[k] for k in same} == {k: after[k] for k in same}
    assert "round" not in capsys.readouterr().out.replace("rounds", "")


def test_resume_with_other_settings_is_refused(finished, capsys):
    assert main(["prune", "--out", str(finished), *QUICK, "--target-flops", "0.5", "--round-to", "4", "--resume"]) == 2
    error = capsys.readouterr().err
    assert "target_flops is 0.6 there and 0.5 here" in error


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    """Up to rounding: the order of the images after the interruption is another one, but the budget is the same."""
    arguments = ["prune", *QUICK, "--target-flops", "0.6"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    from taylored._cli.log import Log

    write = Log.write

    def interrupted(journal, event):
        write(journal, event)
        if event.get("round") == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "write", interrupted)
    assert main([*arguments, "--out", str(tmp_path / "cut")]) == 130
    monkeypatch.undo()
    assert main([*arguments, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    events = [json.loads(line)["event"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert events == ["train_epoch", "start", "round", "round", "final_epoch", "latency"]
    whole, cut = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert whole["accuracy_before"] == cut["accuracy_before"] and whole["flops_before"] == cut["flops_before"]
    assert cut["flops_after"] <= 0.6 * cut["flops_before"]


def test_the_same_seed_gives_the_same_network(tmp_path):
    arguments = ["prune", "--train-epochs", "0", "--rounds", "1", "--round-epochs", "0.1", "--final-epochs", "0", "--seed", "7"]
    for name in ("a", "b"):
        assert main([*arguments, "--threads", "1", "--out", str(tmp_path / name)]) == 0
    first, second = ((tmp_path / name / "pruned.safetensors") for name in ("a", "b"))
    plans = [taylored.load(zoo.small_vgg(), path) for path in (first, second)]
    assert plans[0] == plans[1]


def test_a_folder_of_images_and_a_model_from_a_file(tmp_path):
    data = folder(tmp_path / "data")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Linear(8, num_classes))\n"
    )
    arguments = [
        "prune",
        "--data",
        str(data),
        "--model",
        f"{tmp_path / 'net.py'}:make",
        "--image-size",
        "24",
        "--batch-size",
        "4",
    ]
    assert main([*arguments, *QUICK, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["classes"] == ["cat", "dog"] and summary["units_before"] == 8


def test_a_pretrained_body_stays_frozen_while_the_new_last_layer_trains(tmp_path, monkeypatch):
    data = folder(tmp_path / "data")
    torch.manual_seed(1)
    pretrained = zoo.small_vgg(10, 3)
    torch.save(pretrained.state_dict(), tmp_path / "vgg.pth")
    (tmp_path / "net.py").write_text("from taylored._cli.zoo import small_vgg\ndef make():\n    return small_vgg(10, 3)\n")
    arguments = ["prune", "--data", str(data), "--model", f"{tmp_path / 'net.py'}:make", "--weights", str(tmp_path / "vgg.pth")]
    assert main([*arguments, "--image-size", "16", "--batch-size", "4", *QUICK, "--out", str(tmp_path / "out")]) == 0
    trained = zoo.small_vgg(2, 3)
    taylored.load(trained, tmp_path / "out" / "trained.safetensors")
    for (name, was), now in zip(pretrained.state_dict().items(), trained.state_dict().values(), strict=True):
        assert name.startswith("classifier") or torch.equal(was, now), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet19"], "did you mean resnet1"),
        (["--model", "timm:resnet19"], "unknown to timm"),
        (["--data", "nowhere"], "no such folder"),
        (["--weights", "nowhere.pth"], "no such file"),
        (["--weights", "DEFAULT"], "no default weights"),
        (["--target-flops", "0.0001"], "cannot be met"),
        (["--ignore", "conv9"], "conv9"),
        (["--mean", "0.1", "0.2"], "expected 1 or 1"),
        (["--model", "nowhere.py:make"], "no file"),
    ],
)
def test_wrong_use_is_told_in_one_line(arguments, said, tmp_path, capsys):
    assert main(["prune", "--out", str(tmp_path), "--train-epochs", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("taylored: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "option", [["--target-flops", "0"], ["--target-flops", "1.5"], ["--rounds", "0"], ["--max-ratio", "nan"]]
)
def test_numbers_out_of_bounds_name_the_option(option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prune", "--out", str(tmp_path), *option])
    assert f"argument {option[0]}: got {option[1]!r}, expected" in capsys.readouterr().err


def test_out_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["prune", "--out", str(tmp_path / "file" / "run")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "workers"), [(2**30, "0"), (0, "0"), (0, "1")])
def test_a_damaged_image_is_named(tmp_path, capsys, monkeypatch, limit, workers):
    monkeypatch.setattr("taylored._cli.data.MEMORY_LIMIT", limit)
    data = folder(tmp_path / "data", size=(16, 16))
    (data / "train" / "dog" / "3.jpg").write_bytes(b"\xff\xd8 not a picture")
    arguments = ["prune", "--data", str(data), "--image-size", "16", "--batch-size", "4", "--workers", workers]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("taylored: --data: ") and str(data / "train" / "dog" / "3.jpg") in error and error.count("\n") == 1


def test_python_m_taylored_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "taylored", "--version"], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.strip() == f"taylored {taylored.__version__}"
