"""Time models against each other in one process: their runs alternate, so that what else the machine does hits both.

Medians, in eval mode and `torch.inference_mode`, with the device synchronised around every run.
"""

import contextlib
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from taylored._modules import in_mode

RUNS = (20, 300)  # of each model: at least, at most


def milliseconds_per_image(models: Sequence[nn.Module], example: torch.Tensor, seconds: float = 10.0) -> list[float]:
    """The median time of each model on the batch `example`, divided by its images, in milliseconds.

    Alternates the models, and their order, for about `seconds`; leaves them in the mode they came in."""
    times: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(in_mode(model, training=False))
        stack.enter_context(torch.inference_mode())
        for model in models:  # first runs choose algorithms and allocate
            for _ in range(3):
                _timed(model, example)
        end = time.perf_counter() + seconds
        turn = 0
        while turn < RUNS[0] or (turn < RUNS[1] and time.perf_counter() < end):
            order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
            for i in order:
                times[i].append(_timed(models[i], example))
            turn += 1
    return [1e3 * statistics.median(t) / len(example) for t in times]


def _timed(model, example) -> float:
    _synchronize(example.device)
    since = time.perf_counter()
    model(example)
    _synchronize(example.device)
    return time.perf_counter() - since


def _synchronize(device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
