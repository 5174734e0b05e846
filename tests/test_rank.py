"""`taylored rank` end to end on the digits: what it writes, that its figures are true, and that processes share the work."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_cli import folder

import taylored
from taylored._cli import data, zoo
from taylored._cli.main import main
from taylored._cli.rank import mean_loss
from taylored._oracle.exact import Replay
from taylored.criteria import CRITERIA

QUICK = ["--train-epochs", "1", "--examples", "48", "--batch-size", "24", "--threads", "1"]
SAMPLED = [*QUICK, "--units", "5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "made"
    assert main(["rank", "--out", str(out), *SAMPLED]) == 0
    return out


@pytest.fixture(scope="module")
def summary(finished):
    return json.loads((finished / "summary.json").read_text())


@pytest.fixture(scope="module")
def model(finished):
    model = zoo.small_vgg()
    taylored.load(model, finished / "trained.safetensors")
    return model.eval()


@pytest.fixture(scope="module")
def scores(finished):
    return read(finished)


@pytest.fixture(scope="module")
def judged():
    return images(0)


def images(seed):
    train, _ = data.find("digits").load(8, 1, *data.DIGITS, batch_size=24)
    torch.manual_seed(seed)
    return train.sample(48)


def read(out):
    scores = {}
    for name, tensor in load_file(out / "scores.safetensors").items():
        criterion, _, group = name.partition("/")
        scores.setdefault(criterion, {})[group] = tensor
    return scores


def test_every_criterion_is_there_group_by_group(scores, summary, model):
    graph = taylored.trace(model, torch.zeros(1, 1, 8, 8))
    assert scores.keys() == summary["criteria"].keys() == CRITERIA.keys()
    for found in scores.values():
        assert {n: (s.shape, s.dtype) for n, s in found.items()} == {g.name: ((g.units,), torch.float64) for g in graph.groups}


def test_the_oracle_is_brute_force_on_the_units_drawn(scores, summary, model, judged):
    graph = taylored.trace(model, torch.zeros(1, 1, 8, 8))
    base = mean_loss(model, judged)
    assert summary["loss"] == pytest.approx(base) and summary["measured"] == 30 and summary["examples"] == 48
    for name, change in scores["oracle-loss"].items():
        units = (~change.isnan()).nonzero().flatten()
        assert len(units) == 5
        for unit in units:
            with taylored.masked(model, graph, taylored.PrunePlan.of(graph, {name: unit[None]})):
                assert float(change[unit]) == pytest.approx(mean_loss(model, judged) - base, rel=1e-3, abs=1e-6)
        torch.testing.assert_close(scores["oracle-abs"][name], change.abs(), equal_nan=True)


def test_the_scores_are_those_of_the_criteria(scores, model, judged):
    graph = taylored.trace(model, torch.zeros(1, 1, 8, 8))
    for criterion in ("taylor", "activation-std", "weight-l2"):
        again = CRITERIA[criterion](model, graph, judged, torch.nn.functional.cross_entropy)
        for name, s in again.items():
            torch.testing.assert_close(scores[criterion][name], s, rtol=1e-4, atol=1e-9)


def test_the_summarys_figures_are_those_of_the_scores(scores, summary):
    for criterion, entry in summary["criteria"].items():
        found = taylored.spearman(scores[criterion], scores["oracle-abs"])
        assert entry["all_units"] == pytest.approx(found.all_units) and entry["per_group"] == pytest.approx(found.per_group)
        assert entry["all_units_l2"] == pytest.approx(found.all_units_l2) and entry["groups"] == pytest.approx(found.groups)
        assert (entry["forward"], entry["backward"]) == CRITERIA[criterion].passes(30, 10) and entry["seconds"] >= 0
    assert summary["criteria"]["oracle-abs"]["all_units"] == pytest.approx(1.0)


def test_the_curve_is_the_loss_of_the_compacted_model(scores, summary, model, judged):
    assert summary["criteria"]["oracle-abs"]["curve"] == []  # not every unit was measured
    graph = taylored.trace(model, torch.zeros(1, 1, 8, 8))
    count, loss = summary["criteria"]["taylor"]["curve"][3]
    plan = taylored.make_plan(graph, scores["taylor"], remove_units=count, flops_weight=0.0)
    assert sum(map(len, plan.removed.values())) == count == round(0.15 * 448)
    smaller = zoo.small_vgg()
    smaller.load_state_dict(model.state_dict())
    taylored.compact(smaller.eval(), plan)
    assert mean_loss(smaller, judged) == pytest.approx(loss, rel=1e-4)


def test_the_page_stands_alone(finished, summary):
    page = (finished / "rank.html").read_text()
    assert page.count("<svg") == 3 and all(name in page for name in summary["criteria"])
    assert all(r.startswith(("#", "data:")) for r in re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page))


def test_nothing_else_is_left(finished):
    assert {p.name for p in finished.iterdir()} == {
        "metrics.jsonl", "summary.json", "rank.html", "scores.safetensors", "trained.safetensors", "checkpoint.safetensors",
    }  # fmt: skip


def test_resume_goes_on_from_what_is_there(finished, scores, capsys, monkeypatch):
    assert main(["rank", "--out", str(finished), *SAMPLED, "--resume", "--seed", "1"]) == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    measured = []
    replay = Replay.replay
    monkeypatch.setattr(Replay, "replay", lambda *arguments: measured.append(arguments) or replay(*arguments))
    assert main(["rank", "--out", str(finished), *SAMPLED, "--resume", "--criteria", "taylor", "lamp"]) == 0
    assert "train epoch" not in capsys.readouterr().out and not measured
    again = read(finished)
    assert again.keys() == {"taylor", "lamp", "oracle-abs", "oracle-loss"}
    for criterion, found in again.items():
        for name, s in found.items():
            torch.testing.assert_close(s, scores[criterion][name], equal_nan=True)


def test_all_units_give_the_oracle_a_curve_and_a_table(tmp_path, capsys):
    assert main(["rank", "--out", str(tmp_path), *QUICK, "--criteria", "taylor", "random", "--examples", "16"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["measured"] == summary["units"] == 448
    losses = [loss for _, loss in summary["criteria"]["oracle-abs"]["curve"]]
    assert len(losses) == 8 and losses[-1] > losses[0]
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("criterion"))
    assert lines[header].split() == [
        "criterion",
        "per",
        "group",
        "all",
        "units",
        "all",
        "units,",
        "L2",
        "forward",
        "backward",
        "seconds",
    ]
    assert {line.split()[0] for line in lines[header + 1 : header + 4]} == {"taylor", "random", "oracle-loss"}
    assert len({len(line) for line in lines[header : header + 4]}) == 1


def test_a_pretrained_body_stays_as_it_is_and_a_new_last_layer_is_trained(tmp_path):
    torch.manual_seed(1)
    pretrained = zoo.small_vgg(10, 3)
    torch.save(pretrained.state_dict(), tmp_path / "vgg.pth")
    (tmp_path / "net.py").write_text("from taylored._cli.zoo import small_vgg\ndef make():\n    return small_vgg(10, 3)\n")
    arguments = ["rank", "--data", str(folder(tmp_path / "data")), "--model", f"{tmp_path / 'net.py'}:make"]
    arguments += ["--weights", str(tmp_path / "vgg.pth"), "--image-size", "16", "--batch-size", "4", "--train-epochs", "1"]
    assert main([*arguments, "--examples", "8", "--units", "2", "--criteria", "taylor", "--out", str(tmp_path / "out")]) == 0
    trained = zoo.small_vgg(2, 3)
    taylored.load(trained, tmp_path / "out" / "trained.safetensors")
    for (name, was), now in zip(pretrained.state_dict().items(), trained.state_dict().values(), strict=True):
        assert name.startswith("classifier") or torch.equal(was, now), name


def test_processes_share_the_units_and_agree(tmp_path):
    torch.manual_seed(2)
    torch.save(zoo.small_vgg().state_dict(), tmp_path / "vgg.pth")
    arguments = ["-m", "taylored", "rank", "--weights", str(tmp_path / "vgg.pth"), "--criteria", "taylor"]
    arguments += ["--examples", "24", "--units", "5", "--threads", "1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, start in (("one", []), ("two", launch)):
        command = [sys.executable, *start, *arguments, "--out", str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ChannelGraph(") == 1  # only the first one speaks
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    for name, s in one["oracle-loss"].items():
        torch.testing.assert_close(two["oracle-loss"][name], s, rtol=1e-5, atol=1e-8, equal_nan=True)
    assert len(list((tmp_path / "two").glob("checkpoint.safetensors.*"))) == 2


@pytest.mark.parametrize("option", [["--criteria", "magic"], ["--memory", "much"], ["--units", "1"], ["--precision", "int8"]])
def test_options_out_of_bounds_are_named(option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["rank", "--out", str(tmp_path), *option])
    assert f"argument {option[0]}: " in capsys.readouterr().err


def test_the_sample_is_the_same_at_every_iteration():
    first, again, other = images(3), images(3), images(4)
    a, b = ([x for x, _ in first] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and sum(map(len, a)) == 48
    assert all(torch.equal(x, y) for x, (y, _) in zip(a, again, strict=True))
    assert not all(torch.equal(x, y) for x, (y, _) in zip(a, other, strict=True))
    train, _ = data.find("digits").load(8, 1, *data.DIGITS, batch_size=24)
    assert len(train.sample(10**6).images) == 1437
