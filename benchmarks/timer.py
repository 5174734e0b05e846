"""One timer for all benchmarks: contenders take turns, so that a noisy machine treats them alike, and each reports the
median of its turns. A table of medians comes with ratios to the first column."""

import statistics
import time

import torch


def side_by_side(contenders, *, seconds=1.0, rounds=(7, 300), prepare=None):
    """Median seconds of each contender, ``{name: callable} -> {name: float}``, taking turns in one loop.

    prepare: called before every single call, untimed; its result is the call's argument. Needed where calls consume
    their input.
    """
    call = (lambda f: (f, ())) if prepare is None else (lambda f: (f, (prepare(),)))
    for function in contenders.values():  # compilation, page faults, thread pools
        function(*call(function)[1])
    times = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name, function in contenders.items():
            function, arguments = call(function)
            before = time.perf_counter()
            function(*arguments)
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in times.items()}


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
            print(f"{'':{self.width}}" + "".join(f"{name:>20}" for name in medians))
        ours = medians[self.ours]
        cells = (f"{1e3 * m:10.3f} ms {m / ours:5.2f}x" for m in medians.values())
        print(f"{label:{self.width}}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
