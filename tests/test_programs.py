"""Every step of the random programs by itself, and some in rows: cut exactly or kept for a reason, and never wrong."""

import random
import sys
import warnings
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from programs import STEPS, judge

# What does not survive a cut: it computes with the channels' number, over all of them, or with constants and parts of them.
KEPT = {
    "root of the channels", "share", "mean position", "power", "filled", "constants", "ramp over channels", "written: copy",
    "written: item", "written: index_fill", "written: mul", "written: part", "index", "max over channels", "avg over channels",
    "resized channels", "lrn", "layer norm", "mean", "softmax", "max", "group norm of tokens", "first half", "doubled",
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_cut_exactly_or_keeps_its_channels(step):
    verdict, why = judge((step,), 0)
    assert verdict == ("kept" if step in KEPT else "exact"), why


def test_rows_of_steps_are_never_wrong_and_never_promised_in_vain():
    draw = random.Random(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(60):
            steps = tuple(draw.choices(list(STEPS), k=3))
            verdict, why = judge(steps, number)
            assert verdict in ("exact", "kept"), (steps, verdict, why)
