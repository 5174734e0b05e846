"""One training step of VGG16 (batch 8, 224x224, SGD) with scoring against the same step without: time, side by side; the
share of it that the profiler finds in the gate and the operators; peak memory, each in a process of its own. Both steps
are checked to leave the same weights."""

import resource
import subprocess
import sys

import torch
import torchvision
from timer import Table, side_by_side

import taylored


def make(batch=8):
    torch.manual_seed(0)
    model = torchvision.models.vgg16(num_classes=10).eval()  # no dropout: both steps compute the same
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    loss_fn = torch.nn.CrossEntropyLoss()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model(x), y).backward()
        optimizer.step()

    return model, step, taylored.trace(model, x[:1])


def peak(scored: bool) -> int:
    """Bytes of resident memory at the peak of three steps."""
    model, step, graph = make()
    if scored:
        with taylored.TaylorScorer(model, graph):
            for _ in range(3):
                step()
    else:
        for _ in range(3):
            step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def share(scored) -> float:
    """What the gate and the operators take of a step: on a noisy machine, finer than the difference of two steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scored()
    events = profile.key_averages()
    ours = sum(e.self_cpu_time_total for e in events if "taylored::" in e.key or "_Gate" in e.key)
    return ours / sum(e.self_cpu_time_total for e in events)


def main():
    model, step, graph = make()
    twin, twin_step, _ = make()
    scorer = taylored.TaylorScorer(model, graph)

    def scored():
        with scorer:
            step()

    scored(), twin_step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    medians = side_by_side({"with scores": scored, "without": twin_step}, seconds=120, rounds=(10, 40))
    Table("training step, VGG16, batch 8", "without").row("step", medians)
    print(f"scoring adds {100 * (medians['with scores'] / medians['without'] - 1):+.2f}% time by the medians")
    print(f"{100 * share(scored):.2f}% of the scored step is spent in the gate and the operators, by the profiler")
    with_scores, without = (
        sorted(
            int(subprocess.run([sys.executable, __file__, which], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)
        )[1]
        for which in ("peak-scored", "peak-plain")
    )
    results = 8 * sum(len(graph.layers[name].inputs) * 4 for g in graph.groups for name in g.inputs)
    mib = (with_scores / 2**20, without / 2**20, (with_scores - without) / 2**20)
    print("peak memory {:.1f} MiB with, {:.1f} MiB without: {:+.2f} MiB".format(*mib))
    print(f"(the [N, C] results are {results / 2**20:.2f} MiB)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak(sys.argv[1] == "peak-scored"))
    else:
        main()
