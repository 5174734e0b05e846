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
    # those that came later
    "beside", "equal", "number from data", "channels written", "turned and written", "written: reversed", "written: view",
    "flat halves", "one row of all", "outer", "diagonal", "mask of rows", "selected channel", "windows of channels", "heads",
    "first of heads", "index of channels", "index of 8 channels", "index by mask", "index select of channels", "written line",
    "written by mask", "written number at channels", "written number at turned", "written at channels",
    "written at all channels", "written at two", "written at an index of features", "unequal pieces", "pieces",
    "unbound channels", "joined with zeros", "joined with a ramp", "joined outer", "zeros for channels", "ramp for channels",
    "padded channels", "padded and cropped channels", "replicated channels", "reflected channels", "grid of features",
    "grid of turned", "rois of features", "gather of fewer channels", "gather over channels", "unfolded rows",
    "folded columns", "fft over channels", "log softmax", "mean of no dimensions", "sum over channels", "sum over all",
    "softmax of heads", "group norm", "group norm by constants", "batch norm of constants", "batch norm of rows",
    "batch norm of one map", "batch norm: legit", "batch norm: no training", "batch norm: update", "renorm of examples",
    "losses", "entropy", "dot", "vdot", "mv", "attention", "attention over channels", "batched over channels",
    "product of constants", "mixed by constants", "added to constants", "product of rows", "added to a product",
    "shuffle of fours", "pieces of four", "fours in turn", "every other", "rolled channels", "best channels", "narrowed",
    "mean of all by hand", "constant kernel", "constant transposed", "constant depthwise", "convolved rows", "each alone",
    "depthwise of one map", "mean of heads", "pool of heads", "last of heads", "fourth of heads", "linear of heads",
    "heads of linear", "attention layer", "group norm of one", "group norm of rows", "layer norm layer", "weight norm",
    "weight norm by hand", "spectral norm", "orthogonal", "renorm of filters", "shift and scale", "matrix",
    "kernel of parameters", "kernel and constant bias", "layer norm of a constant", "distils", "layer norm by features",
    "group norm by another", "loss of two", "number of two", "places of two", "channels of two", "added to a product of two",
    "batched over two", "deformed", "deformed by features", "number of a diagonal",
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
