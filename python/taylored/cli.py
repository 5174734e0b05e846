"""The command: `taylored prune` takes a classifier and a folder of images, and leaves a smaller one and a report.

It is the walk-through of arXiv:1611.06440 end to end: fit the last layer to the classes, train, rank, prune and
fine-tune in rounds, and measure what came of it. Everything it decides is an option; everything it writes lies in --out.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import taylored
from taylored import data, latency, report, zoo
from taylored.checkpoint import CheckpointError, _write, read
from taylored.plan import NORMS, PlanError, PrunePlan, make_plan
from taylored.prune import updates
from taylored.trace import TraceError

TRAINED, CHECKPOINT, PRUNED = "trained.safetensors", "checkpoint.safetensors", "pruned.safetensors"
METRICS, SUMMARY, REPORT = "metrics.jsonl", "summary.json", "report.html"
# Options that do not change the result: a run may be resumed with others.
FREE = {"command", "out", "resume", "workers", "threads", "device", "latency_batch"}
ERRORS = (data.DataError, zoo.ModelError, CheckpointError, PlanError, TraceError, FloatingPointError)


class OutError(ValueError):
    """--out cannot be used as asked."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    options = parser().parse_args(arguments)
    try:
        prune(options)
    except (*ERRORS, OutError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # A worker process hands its error over with its traceback in front of it.
        print(f"taylored: {lines[-1] if lines[0].startswith('Caught ') else ' '.join(lines)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntaylored: interrupted; the same command with --resume goes on from the last round", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="taylored", description="Networks tailored by Taylor: prune a trained CNN's channels and retrain."
    )
    top.add_argument("--version", action="version", version=f"taylored {taylored.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser(
        "prune",
        help="prune an image classifier to a budget of FLOPs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Fit a classifier to a folder of images, prune it to a budget while it trains, and report.",
    )
    number, positive, fraction = _number(int, 0), _number(int, 1), _number(float, 0, 1)
    group = p.add_argument_group("what")
    group.add_argument(
        "--data", default="digits", metavar="SRC", help="'digits', or a folder with train/CLASS/* and test/CLASS/*"
    )
    group.add_argument(
        "--model", default="small_vgg", metavar="NAME", help="a torchvision name, timm:NAME, small_vgg or file.py:function"
    )
    group.add_argument(
        "--weights", default="none", metavar="W", help="'none', 'DEFAULT' (download), or a .safetensors, .pth or .pt file"
    )
    group.add_argument("--out", required=True, metavar="DIR", help="where the model, the figures and the report go")
    group.add_argument("--resume", action="store_true", help="go on from what --out has")
    group = p.add_argument_group("images")
    group.add_argument(
        "--image-size", type=positive, metavar="N", help="side of the square the model sees (default: the model's; digits: 8)"
    )
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="of the pixels in 0..1 (default: the model's)")
    group.add_argument(
        "--std", type=_number(float, 1e-6), nargs="+", metavar="X", help="of the pixels in 0..1 (default: the model's)"
    )
    group.add_argument("--batch-size", type=positive, default=32, metavar="N", help=" ")
    group.add_argument("--workers", type=number, default=0, metavar="N", help="processes that decode images too many for memory")
    group = p.add_argument_group("training")
    group.add_argument(
        "--train-epochs",
        type=number,
        metavar="N",
        help="before pruning; of everything without weights, else of the new last layer alone (default: 20 without weights, 3 for a new last layer, else 0)",
    )
    group.add_argument(
        "--lr", type=_number(float, 0), metavar="X", help="AdamW's learning rate (default: 0.002 without weights, else 0.0002)"
    )
    group.add_argument(
        "--head-lr", type=_number(float, 0), default=3e-3, metavar="X", help="the same, for training the last layer alone"
    )
    group.add_argument("--weight-decay", type=_number(float, 0), default=1e-4, metavar="X", help=" ")
    group.add_argument("--rounds", type=positive, default=10, metavar="N", help="cuts on the way to the budget")
    group.add_argument(
        "--round-epochs", type=_number(float, 1e-6), default=1.0, metavar="X", help="trained, and scored, before each cut"
    )
    group.add_argument("--final-epochs", type=number, default=10, metavar="N", help="after the last cut")
    group = p.add_argument_group("pruning")
    group.add_argument(
        "--target-flops", type=_fraction_above_0, default=0.5, metavar="F", help="share of the FLOPs that may remain, in (0, 1]"
    )
    group.add_argument(
        "--reduction",
        choices=("abs", "batch", "square"),
        default="abs",
        help="how contributions become scores: mean of |t|, |sum of a batch|, mean of t^2",
    )
    group.add_argument("--normalize", choices=tuple(NORMS), default="l2", help="norm by which each group's scores are divided")
    group.add_argument(
        "--flops-weight", type=_number(float, 0), default=1e-3, metavar="X", help="lambda in: score - lambda * FLOPs of the unit"
    )
    group.add_argument("--round-to", type=positive, default=1, metavar="N", help="keep a multiple of N channels per layer")
    group.add_argument("--min-units", type=positive, default=1, metavar="N", help="units that every group keeps")
    group.add_argument("--max-ratio", type=fraction, default=1.0, metavar="X", help="share of a group that may go")
    group.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules or groups that stay as they are")
    group = p.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=" ")
    group.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: torch's choice)")
    group.add_argument("--seed", type=number, default=0, metavar="N", help=" ")
    group.add_argument("--latency-batch", type=positive, default=8, metavar="N", help="images per batch when latency is measured")
    return top


def _number(kind, least, most=math.inf):
    """An argparse type: a number of that kind within bounds."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {'an integer' if kind is int else 'a number'} {bound}")
        return value

    return parse


def _fraction_above_0(text):
    value = _number(float, 0, 1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1")
    return value


def prune(options: argparse.Namespace) -> dict:
    """The whole walk-through; returns the summary that it also writes to --out."""
    out = _folder(options.out)
    device = _device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    source = data.find(options.data)
    size = options.image_size or source.image_size
    network = zoo.build(options.model, options.weights, len(source.classes), channels=source.channels, image_size=size)
    for note in network.notes:
        print(note)
    example = torch.zeros(1, network.channels, network.image_size, network.image_size, device=device)
    model = network.model.to(device)
    graph = taylored.trace(model, example)
    print(graph)
    _check_budget(graph, options)
    run = Run(options, out, source, network, graph, example, time.perf_counter())
    settings, elapsed = run.begin()
    run.journal = journal = Journal(out / METRICS, elapsed)

    default = data.DIGITS if source.channels == 1 else data.IMAGENET
    mean, std = options.mean or network.mean or default[0], options.std or network.std or default[1]
    batches = source.load(network.image_size, network.channels, mean, std, options.batch_size, options.workers)
    summary, history, plan = run.go(*batches)
    print()
    return summary
