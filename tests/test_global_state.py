"""What one thread does to its model, another thread's model does not notice."""

import subprocess
import sys
import threading

import models as nets
import pytest
import torch
from torch import nn

from taylored import TaylorScorer, masked, random_plan, trace
from taylored._cli.zoo import build
from taylored._torch_compat import eager


class Meeting(nn.Module):
    """A net that stops in the middle of its forward pass until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        x = self.first(x).relu()
        self.inside.set()
        assert self.go_on.wait(60)
        return self.second(x)


@pytest.fixture
def tracing():
    """Within it another thread is in the middle of a trace."""
    model, found = Meeting(), []
    thread = threading.Thread(target=lambda: found.append(trace(model, torch.randn(1, 3, 8, 8))))
    thread.start()
    assert model.inside.wait(60)
    yield
    model.go_on.set()
    thread.join()
    assert found[0].prunable_filters == 6


def test_a_mask_stays_in_force_while_another_thread_traces(tracing):
    model, x = nets.small("chain"), nets.inputs()
    plain = model(x)
    graph = trace(model, x)
    plan = random_plan(graph, 0.5)
    with masked(model, graph, plan):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)


def test_no_hook_is_global_while_another_thread_traces(tracing):
    seen = []
    hooks = nn.modules.module
    assert not hooks._global_forward_pre_hooks and not hooks._global_forward_hooks
    other = nn.Sequential(nn.ReLU())
    other[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(other(torch.ones(2)), seen[0])


def test_what_is_compiled_runs_eagerly_while_another_thread_traces_and_compiled_afterwards():
    compiled = torch.compile(calls := nn.Linear(2, 2), backend="eager")
    stance = torch._dynamo.eval_frame._stance
    with eager(), eager():
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        assert torch.equal(compiled(torch.ones(1, 2)), calls(torch.ones(1, 2)))
    assert torch._dynamo.eval_frame._stance == stance


def test_scores_of_two_models_in_two_threads_do_not_mix():
    tasks = {seed: (nets.small("chain", seed=seed), nets.inputs(4)) for seed in (1, 2)}  # torch's seed is one for all threads

    def scores(seed):
        model, x = tasks[seed]
        graph = trace(model, x)
        with TaylorScorer(model, graph) as scorer:
            for _ in range(5):
                model(x).square().mean().backward()
        return scorer.scores()

    alone, found = {seed: scores(seed) for seed in tasks}, {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: scores(seed)})) for seed in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in alone.items():
        assert all(torch.allclose(found[seed][name], s) for name, s in expected.items())


def test_importing_changes_nothing_of_torch():
    code = """
import sys, torch
from torch.serialization import get_safe_globals
before = get_safe_globals()
import taylored
assert get_safe_globals() == before and "torch._dynamo" not in sys.modules
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
taylored.compact(model, taylored.random_plan(taylored.trace(model, torch.randn(1, 3, 8, 8)), 0.5))
assert not [known for known in get_safe_globals() if "taylored" in str(known)]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_path_is_as_it_was_after_a_model_from_a_file(tmp_path):
    (tmp_path / "beside.py").write_text("from taylored._cli.zoo import small_vgg\n")
    (tmp_path / "net.py").write_text("def make():\n    from beside import small_vgg\n    return small_vgg(10, 3)\n")
    before = list(sys.path)
    build(f"{tmp_path}/net.py:make", "none", 10, channels=3, image_size=8)
    assert sys.path == before
