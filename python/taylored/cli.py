"""The command: `taylored prune` takes a classifier and a folder of images, and leaves a smaller one and a report;
`taylored rank` judges the criteria instead (rank.py), `taylored export` writes what was pruned for other runtimes.

`prune` is the walk-through of arXiv:1611.06440 end to end: fit the last layer to the classes, train, rank, prune and
fine-tune in rounds, and measure what came of it. Everything it decides is an option; everything it writes lies in --out.
"""

import argparse
import copy
import ctypes
import json
import math
import platform
import sys
from pathlib import Path

import torch
from torch import nn

import taylored
from taylored import data, latency, report, zoo
from taylored.checkpoint import CheckpointError, load, read
from taylored.criteria import CRITERIA
from taylored.export import FORMATS, ExportError, export
from taylored.files import write_atomically
from taylored.job import (
    CHECKPOINT,
    METRICS,
    SUMMARY,
    TRAINED,
    Journal,
    OutError,
    accuracy,
    begin,
    cosine,
    fit,
    images,
    prepare,
)
from taylored.labels import TraceError
from taylored.oracle import PRECISIONS, parse_memory
from taylored.plan import NORMS, PlanError, make_plan
from taylored.prune import updates
from taylored.rank import rank

PRUNED, REPORT = "pruned.safetensors", "report.html"
ERRORS = (data.DataError, zoo.ModelError, CheckpointError, PlanError, TraceError, ExportError, FloatingPointError)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for what the options can mend, 1 for the disk, 130 when interrupted."""
    options = parser().parse_args(arguments)
    _keep_freed_memory()
    try:
        {"prune": prune, "rank": rank, "export": export_file}[options.command](options)
    except (*ERRORS, OutError) as error:
        print(f"taylored: {_one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a file that vanished: it says which
        print(f"taylored: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntaylored: interrupted; the same command with --resume goes on from there", file=sys.stderr)
        return 130
    return 0


def _keep_freed_memory() -> None:
    """Let the process keep the memory that tensors leave behind. glibc hands every large block back to the kernel and gets it
    again page by page, at each layer of each step: a training step on a CPU took 1.5 times as long."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: mallopt(3)
            libc.mallopt(option, 2**31 - 1)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Caught "):  # a worker process hands its error over behind its traceback and its type
        return lines[-1].partition("Error: ")[2]
    return " ".join(lines)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="taylored", description="Networks tailored by Taylor: prune a trained CNN's channels and retrain."
    )
    top.add_argument("--version", action="version", version=f"taylored {taylored.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, line, description in (
        (
            "prune",
            _prune_options,
            "prune an image classifier to a budget of FLOPs",
            "Fit a classifier to a folder of images, prune it to a budget while it trains, and report.",
        ),
        (
            "rank",
            _rank_options,
            "judge criteria of pruning by the oracle",
            "Measure what a classifier loses without each of its units, score the units by every criterion, and report which "
            "criteria agree with the measurement. Runs on several processes under torchrun.",
        ),
        (
            "export",
            _export_options,
            "write a pruned model for ONNX or torch.export",
            "Build the model that a file of taylored was pruned from, load the file into it, and write it for another runtime; "
            "the written model is run and compared.",
        ),
    ):
        add(commands.add_parser(name, help=line, description=description, formatter_class=_Help))
    return top


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default where there is one and the text does not."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == [] or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


def _prune_options(p) -> None:
    _what_and_images(p)
    group = _training(p)
    group.add_argument(
        "--lr",
        type=_number(float, 0),
        metavar="X",
        help="AdamW's learning rate while pruning; it falls to 0.01 of itself after the last cut (default: 1e-4 with weights, "
        "else 3e-4)",
    )
    group.add_argument(
        "--batch-norm",
        choices=("frozen", "train"),
        help="from the first round on: use the statistics there are, or each batch's (default: frozen with weights, else train)",
    )
    group.add_argument("--rounds", type=POSITIVE, default=10, metavar="N", help="cuts on the way to the budget")
    group.add_argument(
        "--round-epochs", type=_number(float, 1e-6), default=1.0, metavar="X", help="trained, and scored, before each cut"
    )
    group.add_argument("--final-epochs", type=NUMBER, default=10, metavar="N", help="after the last cut")
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
    group.add_argument("--round-to", type=POSITIVE, default=1, metavar="N", help="keep a multiple of N channels per layer")
    group.add_argument("--min-units", type=POSITIVE, default=1, metavar="N", help="units that every group keeps")
    group.add_argument("--max-ratio", type=FRACTION, default=1.0, metavar="X", help="share of a group that may go")
    group.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules or groups that stay as they are")
    group = _machine(p)
    group.add_argument("--latency-batch", type=POSITIVE, default=8, metavar="N", help="images per batch when latency is measured")


def _rank_options(p) -> None:
    _what_and_images(p)
    _training(p)
    p.set_defaults(lr=None)  # what `prune` trains weights at, where epochs are asked for and the last layer is not new
    group = p.add_argument_group("ranking")
    group.add_argument(
        "--criteria",
        nargs="+",
        choices=("all", *CRITERIA),
        default=["all"],
        metavar="NAME",
        help="one or more of: %(choices)s",
    )
    group.add_argument("--examples", type=POSITIVE, default=1000, metavar="N", help="training images to judge on")
    group.add_argument(
        "--units", type=_number(int, 2), metavar="N", help="measure only so many of each group, drawn at random (default: all)"
    )
    group.add_argument("--memory", type=_memory, default="1GiB", metavar="SIZE", help="for the oracle's values: '512MiB', '4GiB'")
    group.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="float32", help="of the oracle; bfloat16 is faster and approximate"
    )
    _machine(p)


def _export_options(p) -> None:
    p.add_argument("--pruned", required=True, metavar="FILE", help="what `taylored prune` or `taylored.save` wrote")
    p.add_argument("--out", required=True, metavar="FILE", help=f"the file to write, ending in one of {', '.join(FORMATS)}")
    p.add_argument("--model", metavar="NAME", help="as for prune (default: the one that the file names)")
    p.add_argument(
        "--classes", type=POSITIVE, metavar="N", help="that the model tells apart (default: as in the file, or its own)"
    )
    p.add_argument(
        "--image-size", type=POSITIVE, metavar="N", help="side of the images (default: as in the file, or the model's)"
    )
    p.add_argument("--batch", type=POSITIVE, metavar="N", help="images per batch, fixed (default: any number)")


def _what_and_images(p) -> None:
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
        "--image-size",
        type=POSITIVE,
        metavar="N",
        help="side of the square the model sees (default: the model's; digits: 8)",
    )
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="of the pixels in 0..1 (default: the model's)")
    group.add_argument(
        "--std", type=_number(float, 1e-6), nargs="+", metavar="X", help="of the pixels in 0..1 (default: the model's)"
    )
    group.add_argument("--batch-size", type=POSITIVE, default=32, metavar="N", help="images per batch")
    group.add_argument(
        "--workers",
        type=NUMBER,
        default=0,
        metavar="N",
        help="processes that decode images, where they are too many to be kept decoded in memory",
    )


def _training(p):
    group = p.add_argument_group("training")
    group.add_argument(
        "--train-epochs",
        type=NUMBER,
        metavar="N",
        help="at first (default: 20 without weights, all layers; 3 for a new last layer, that alone; else 0)",
    )
    group.add_argument(
        "--train-lr",
        "--head-lr",
        dest="train_lr",
        type=_number(float, 0),
        default=2e-3,
        metavar="X",
        help="AdamW's learning rate at first, falling to 0.01 of itself",
    )
    group.add_argument("--weight-decay", type=_number(float, 0), default=1e-4, metavar="X", help="AdamW's")
    return group


def _machine(p):
    group = p.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    group.add_argument("--threads", type=POSITIVE, metavar="N", help="of the CPU (default: torch's choice)")
    group.add_argument("--seed", type=NUMBER, default=0, metavar="N", help="of every random choice")
    return group


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


NUMBER, POSITIVE, FRACTION = _number(int, 0), _number(int, 1), _number(float, 0, 1)


def _memory(text):
    try:
        parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected bytes, or text like '512MiB' or '2GiB'") from error
    return text


def _fraction_above_0(text):
    value = _number(float, 0, 1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1")
    return value


def prune(options: argparse.Namespace) -> dict:
    """The whole walk-through; returns the summary that it also writes to --out."""
    job = prepare(options)
    # The budget is checked with any scores at all: whether it can be met depends on counts alone.
    even = {group.name: torch.ones(group.units) for group in job.graph.groups}
    make_plan(job.graph, even, **_planning(options))
    resumed = begin(job, (TRAINED, CHECKPOINT, PRUNED, METRICS, SUMMARY, REPORT))
    journal = Journal(job.out / METRICS)
    train, test = images(job)
    fit(job, train, journal, resumed)
    original = copy.deepcopy(job.model)
    result = _prune(job, train, test, journal)
    summary = _summarise(job, original, result, journal)
    print(f"\n{report.table(summary)}\n")
    print(f"report: {job.out / REPORT}\nmodel:  {job.out / PRUNED}")
    return summary


def export_file(options: argparse.Namespace) -> None:
    """Build, load, write, and say what was written."""
    extra = read(options.pruned)[2]["extra"]
    settings = extra.get("summary", extra).get("settings", {})
    name = options.model or settings.get("model")
    classes = options.classes or len(settings.get("classes", ())) or None
    if not name:
        raise CheckpointError(f"{options.pruned} does not say what model it was pruned from: give --model")
    size, channels = options.image_size or settings.get("image_size"), settings.get("channels", 3)
    network = zoo.build(name, "none", classes, channels=channels, image_size=size)
    load(options.pruned, network.model)
    example = torch.randn(options.batch or 2, network.channels, network.image_size, network.image_size)
    difference = export(network.model, example, options.out, any_batch=options.batch is None)
    shape = "x".join(map(str, (options.batch or "any", *example.shape[1:])))
    checked = f"outputs within {difference:.1g} of the largest" if difference is not None else "not run: onnxruntime is missing"
    print(f"{options.out}: images {shape}, {Path(options.out).stat().st_size / 1e6:.2f} MB; {checked}")


def _planning(options) -> dict:
    names = ("target_flops", "normalize", "flops_weight", "round_to", "min_units", "max_ratio", "ignore")
    return {name: getattr(options, name) for name in names}


def _prune(job, train, test, journal) -> taylored.PruneResult:
    """Rank, cut and fine-tune, at a constant learning rate until the last cut and a falling one after it."""
    s = job.settings
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])
    cutting = updates(train, s["rounds"], s["round_epochs"], 0)
    tuning = max(1, updates(train, s["rounds"], s["round_epochs"], s["final_epochs"]) - cutting)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(max(0, step - cutting) / tuning))
    return taylored.prune(
        job.model,
        train,
        nn.CrossEntropyLoss(),
        optimizer,
        job.example,
        **_planning(job.options),
        rounds=s["rounds"],
        round_epochs=s["round_epochs"],
        final_epochs=s["final_epochs"],
        reduction=s["reduction"],
        freeze_statistics=s["batch_norm"] == "frozen",
        evaluate=lambda model: accuracy(model, test, job.device),
        scheduler=schedule,
        checkpoint=job.out / CHECKPOINT,
        resume=job.options.resume,
        progress=sys.stderr.isatty(),
        log=lambda event: journal.write(event | {"flops_left": event["flops"] / job.graph.flops}),
    )


def _summarise(job, original, result, journal) -> dict:
    """Measure, and write what is left: the model, the summary and the report."""
    size = job.options.latency_batch
    before, after = latency.milliseconds_per_image([original, job.model], job.example.repeat(size, 1, 1, 1))
    journal.write({"event": "latency", "batch": size, "latency_ms_before": before, "latency_ms_after": after})
    first, last = result.history[0], result.history[-1]
    summary = {
        f"{key}_{when}": e[key]
        for key in ("accuracy", "flops", "params", "units")
        for when, e in (("before", first), ("after", last))
    }
    summary |= {"latency_ms_before": before, "latency_ms_after": after, "seconds": round(journal.elapsed(), 1)}
    machine = {"device": str(job.device), "threads": torch.get_num_threads(), "latency_batch": size, "torch": torch.__version__}
    summary |= {"settings": job.settings, "machine": machine}
    taylored.save(job.out / PRUNED, job.model, result.plan, extra={"summary": summary})
    report.write(job.out / REPORT, summary, result.history, result.plan)
    write_atomically(job.out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary
