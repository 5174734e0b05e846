"""One timer for all benchmarks: contenders take turns, so that a noisy machine treats them alike, and each reports the
median of its turns. A table of medians comes with ratios to the first column."""

import statistics
import time

import torch

TURN = 2e-3  # seconds: a turn repeats a call until it lasts as long, or the call before would decide what is in the caches


def side_by_side(contenders, *, seconds=1.0, rounds=(7, 300)):
    """Median seconds of one call of each contender, ``{name: callable} -> {name: float}``, taking turns in one loop."""
    calls = {}
    for name, function in contenders.items():
        function()  # compilation, page faults, thread pools
        calls[name] = max(1, round(TURN / _seconds(function, 1)))
    times = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name, function in contenders.items():
            times[name].append(_seconds(function, calls[name]) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


class Table:
    """Rows of medians in milliseconds, printed as they are measured, each with its ratio to the contender of interest
    (above 1: slower than it)."""

    def __init__(self, title, ours):
        self.ours = ours
        self.width = None
        print(f"\n{title}\n({torch.get_num_threads()} threads, torch {torch.__version__})")

    def row(self, label, medians):
        if self.width is None:
            self.width = max(len(label), 24)
            print(f"{'':{self.width}}" + "".join(f"{name:>22}" for name in medians))
        ours = medians[self.ours]
        cells = (f"{1e3 * m:10.3f} ms {m / ours:5.2f}x" for m in medians.values())
        print(f"{label:{self.width}}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
