"""The report: one page that needs nothing else, true to the figures it is given; and the latencies it shows."""

import re
import time
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from taylored import PrunePlan, trace
from taylored._cli import latency, report


@pytest.fixture(scope="module")
def run():
    """A history as `prune` returns it, of a plan with a removed unit and a group with scores of zero."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    graph = trace(model, torch.zeros(1, 1, 9, 9))
    plan = PrunePlan.of(graph, {graph.groups[0].name: torch.tensor([1, 4])})
    scores = {g.name: [0.0 if i else n / 10 for n in range(g.units)] for i, g in enumerate(graph.groups)}
    point = {"params": 10, "units": 8, "loss": 0.5, "seconds": 1.0}
    history = [
        {"event": "start", "flops": 1000, "accuracy": 0.9, **point, "loss": None},
        {"event": "round", "round": 1, "flops": 700, "accuracy": 0.8, "scores": scores, "kept": plan.kept, **point},
        {"event": "final_epoch", "epoch": 1, "flops": 700, "accuracy": 0.95, **point},
    ]
    summary = {
        "accuracy_before": 0.9,
        "accuracy_after": 0.95,
        "flops_before": 1000,
        "flops_after": 700,
        "params_before": 4_830_000,
    }
    summary |= {
        "params_after": 2_000_000,
        "units_before": 10,
        "units_after": 8,
        "latency_ms_before": 2.0,
        "latency_ms_after": 1.0,
    }
    summary |= {"seconds": 90.2, "settings": {"model": "<b>net</b>", "data": "photos/of & things"}}
    return summary, history, plan


def test_the_page_stands_alone(run, tmp_path):
    report.write(*run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert page.count("<svg") == 3
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page)
    assert all(r.startswith(("#", "data:")) for r in references)
    assert "<b>net</b>" not in page and "&lt;b&gt;net" in page


def test_the_pages_elements_are_closed(run, tmp_path):
    report.write(*run, tmp_path / "report.html")
    open_elements = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                open_elements.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_elements.pop() == tag

    Checker().feed((tmp_path / "report.html").read_text())
    assert not open_elements


def test_ids_of_different_pictures_differ(run, tmp_path):
    """Two pictures with the same clip path would be cut by the first one's."""
    report.write(*run, tmp_path / "report.html")
    clips = re.findall(r'clipPath id="([^"]+)"', (tmp_path / "report.html").read_text())
    assert clips and len(clips) == len(set(clips))


def test_a_run_without_final_epochs_has_a_page(run, tmp_path):
    summary, history, plan = run
    report.write(summary, history[:2], plan, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("<svg") == 3


def test_the_table_says_what_changed(run):
    text = report.table(run[0])
    for words in ("90.00%", "+5.00 points", "70.0% left", "4.83 M", "2.00x as fast", "1 ms"):
        assert words in text
    assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("number", "text"), [(4_830_000, "4.83 M"), (292_000, "292 k"), (15.5e9, "15.5 G"), (12, "12"), (2.9e6, "2.90 M")]
)
def test_numbers_have_three_digits(number, text):
    assert report.short(number) == text


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.modes = seconds, set()

    def forward(self, x):
        time.sleep(self.seconds)
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        return x


def test_latency_is_per_image_and_leaves_the_mode_alone():
    models = [Sleeper(0.004).train(), Sleeper(0.001).eval()]
    slow, fast = latency.milliseconds_per_image(models, torch.zeros(4, 1), seconds=0.2)
    assert 1.0 <= slow < 4.0 and 0.25 <= fast < slow
    assert models[0].training and not models[1].training
    assert models[0].modes == models[1].modes == {(False, True)}
