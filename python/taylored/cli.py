"""The command: `taylored prune` takes a classifier and a folder of images, and leaves a smaller one and a report.

It is the walk-through of arXiv:1611.06440 end to end: fit the last layer to the classes, train, rank, prune and
fine-tune in rounds, and measure what came of it. Everything it decides is an option; everything it writes lies in --out.
"""

import argparse
import copy
import ctypes
import dataclasses
import importlib.util
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import taylored
from taylored import data, latency, report, zoo
from taylored.checkpoint import CheckpointError, read
from taylored.files import write_atomically
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
    """Run the command; returns its exit status: 0, 2 for what the options can mend, 1 for the disk, 130 when interrupted."""
    options = parser().parse_args(arguments)
    _keep_freed_memory()
    try:
        prune(options)
    except (*ERRORS, OutError) as error:
        print(f"taylored: {_one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a file that vanished: it says which
        print(f"taylored: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntaylored: interrupted; the same command with --resume goes on from the last round", file=sys.stderr)
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
        help="before pruning (default: 20 without weights, all layers; 3 for a new last layer, that alone; else 0)",
    )
    group.add_argument(
        "--train-lr",
        "--head-lr",
        dest="train_lr",
        type=_number(float, 0),
        default=2e-3,
        metavar="X",
        help="AdamW's learning rate before pruning, falling to 0.01 of itself",
    )
    group.add_argument(
        "--lr",
        type=_number(float, 0),
        metavar="X",
        help="the same from the first round on, falling after the last (default: 1e-4 with weights, else 3e-4)",
    )
    group.add_argument("--weight-decay", type=_number(float, 0), default=1e-4, metavar="X", help=" ")
    group.add_argument(
        "--batch-norm",
        choices=("frozen", "train"),
        help="from the first round on: use the statistics there are, or each batch's (default: frozen with weights, else train)",
    )
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


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is known before the first image is decoded."""

    options: argparse.Namespace
    out: Path
    device: torch.device
    source: data.Source
    network: zoo.Network
    graph: taylored.ChannelGraph
    settings: dict  # what determines the result

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def example(self) -> torch.Tensor:
        return torch.zeros(1, self.network.channels, self.network.image_size, self.network.image_size, device=self.device)


def prune(options: argparse.Namespace) -> dict:
    """The whole walk-through; returns the summary that it also writes to --out."""
    job = _prepare(options)
    resumed = options.resume and _matches(job)
    if not resumed:
        for name in (TRAINED, CHECKPOINT, PRUNED, METRICS, SUMMARY, REPORT):
            (job.out / name).unlink(missing_ok=True)
    journal = Journal(job.out / METRICS)
    s = job.settings
    train, test = job.source.load(s["image_size"], job.network.channels, s["mean"], s["std"], s["batch_size"], options.workers)
    if resumed:
        taylored.load(job.out / TRAINED, job.model)
    else:
        _train(job, train, journal)
        taylored.save(job.out / TRAINED, job.model, PrunePlan.of(job.graph, {}), extra={"settings": s})
    original = copy.deepcopy(job.model)
    result = _prune(job, train, test, journal)
    summary = _summarise(job, original, result, journal)
    print(f"\n{report.table(summary)}\n")
    print(f"report: {job.out / REPORT}\nmodel:  {job.out / PRUNED}")
    return summary


def _prepare(options) -> Job:
    """Build, trace and check: whatever can be wrong with the options is found here."""
    if not importlib.util.find_spec("matplotlib"):  # noticed now, not after hours of training
        raise OutError(f"{REPORT} needs matplotlib: pip install 'taylored[cli]'")
    out = _folder(options.out)
    device = _device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    source = data.find(options.data)
    network = zoo.build(
        options.model,
        options.weights,
        len(source.classes),
        channels=source.channels,
        image_size=options.image_size or source.image_size,
    )
    for note in network.notes:
        print(note)
    # Convolutions are fastest in this layout: twice as fast as in the other, where they are depthwise and on a CPU.
    network.model.to(device, memory_format=torch.channels_last)
    job = Job(options, out, device, source, network, None, _settings(options, source, network))
    graph = taylored.trace(network.model, job.example)
    print(graph)
    # The budget is checked with any scores at all: whether it can be met depends on counts alone.
    even = {group.name: torch.ones(group.units) for group in graph.groups}
    make_plan(graph, even, **_planning(options))
    return dataclasses.replace(job, graph=graph)


def _planning(options) -> dict:
    names = ("target_flops", "normalize", "flops_weight", "round_to", "min_units", "max_ratio", "ignore")
    return {name: getattr(options, name) for name in names}


def _settings(options, source, network) -> dict:
    """The options with their defaults filled in."""
    pixels = data.DIGITS if source.name == "digits" else data.IMAGENET
    scratch = options.weights == "none"
    filled = {
        "image_size": network.image_size,
        "mean": options.mean or network.mean or pixels[0],
        "std": options.std or network.std or pixels[1],
    }
    if options.lr is None:
        filled["lr"] = 3e-4 if scratch else 1e-4
    if options.batch_norm is None:
        filled["batch_norm"] = "train" if scratch else "frozen"
    if options.train_epochs is None:
        filled["train_epochs"] = 20 if scratch else 3 if network.new_head else 0
    settings = {name: value for name, value in vars(options).items() if name not in FREE} | filled
    return json.loads(json.dumps({**settings, "classes": source.classes}))  # tuples become lists, as in the files


def _matches(job) -> bool:
    """Whether --out holds a run that can be gone on with; one with other settings is an error."""
    path = job.out / TRAINED
    if not path.exists():
        print(f"nothing to resume in {job.out}: starting anew")
        return False
    there = read(path)[2]["extra"]["settings"]
    if differ := sorted(k for k in there.keys() | job.settings.keys() if there.get(k) != job.settings.get(k)):
        k = differ[0]
        raise OutError(
            f"--resume: the run in {job.out} has other settings ({', '.join(differ)}): {k} is {there.get(k)!r} there "
            f"and {job.settings.get(k)!r} here; give the same options, or another --out"
        )
    return True


def _train(job, batches, journal) -> None:
    """Before pruning: everything where there are no weights, the new last layer alone where there are."""
    s, model, head = job.settings, job.model, job.network.new_head
    scratch = s["weights"] == "none"
    trained = model if scratch or not head else model.get_submodule(head)
    lr = s["train_lr"] if scratch or head else s["lr"]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=s["weight_decay"])
    steps = max(1, s["train_epochs"] * len(batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / steps))
    wanted = {p: p.requires_grad for p in model.parameters()}
    for p in wanted:
        p.requires_grad_(trained is model)
    trained.requires_grad_(True)
    # With frozen convolutions batch norm must not move either.
    model.train(trained is model)
    for epoch in range(1, s["train_epochs"] + 1):
        since, total = time.perf_counter(), 0.0
        for inputs, labels in tqdm(batches, desc=f"train {epoch}/{s['train_epochs']}", leave=False, disable=None):
            loss = nn.functional.cross_entropy(model(inputs.to(job.device)), labels.to(job.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"training epoch {epoch}: the loss is {total}; try a lower learning rate than {lr}")
        journal.write(
            {"event": "train_epoch", "epoch": epoch, "loss": total / len(batches), "seconds": time.perf_counter() - since}
        )
    for p, was in wanted.items():
        p.requires_grad_(was)


def _cosine(share: float) -> float:
    """A learning-rate factor: from 1 down to 0.01 as `share` goes from 0 to 1."""
    return 0.505 + 0.495 * math.cos(math.pi * min(share, 1.0))


def _prune(job, train, test, journal) -> taylored.PruneResult:
    """Rank, cut and fine-tune, at a constant learning rate until the last cut and a falling one after it."""
    s = job.settings
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])
    cutting = updates(train, s["rounds"], s["round_epochs"], 0)
    tuning = max(1, updates(train, s["rounds"], s["round_epochs"], s["final_epochs"]) - cutting)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(max(0, step - cutting) / tuning))
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


@torch.inference_mode()
def accuracy(model: nn.Module, batches, device: torch.device) -> float:
    """The share of images whose largest output is their label's."""
    right = count = 0
    for inputs, labels in batches:
        right += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
        count += len(labels)
    return right / count


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


class Journal:
    """metrics.jsonl: one line per event, on disk as soon as it happens, and a shorter one on the terminal."""

    def __init__(self, path: Path):
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []  # without a torn last line
        write_atomically(path, "".join(f"{line}\n" for line in whole).encode())
        earlier = json.loads(whole[-1])["elapsed"] if whole else 0.0  # of the run that is resumed
        self.since = time.perf_counter() - earlier
        self.path = path

    def elapsed(self) -> float:
        """Seconds that the run has taken, without the time between an interruption and --resume."""
        return time.perf_counter() - self.since

    def write(self, event: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(event | {"elapsed": round(self.elapsed(), 3)}) + "\n")
        if event["event"] != "latency":
            print(_line(event), flush=True)


def _line(event) -> str:
    number = event.get("round", event.get("epoch", ""))
    words = [f"{event['event'].replace('_', ' ')} {number}".ljust(14)]
    if "flops" in event:
        words += [f"{event['flops_left']:6.1%} of the FLOPs", f"{event['units']:6d} units"]
    if event.get("loss") is not None:
        words.append(f"loss {event['loss']:.4f}")
    if "accuracy" in event:
        words.append(f"accuracy {event['accuracy']:.2%}")
    return "  ".join([*words, f"{event['seconds']:.1f} s"])


def _folder(name: str) -> Path:
    """--out, made if need be, and proven to be writable."""
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ".probe", b"")
        (out / ".probe").unlink()
    except OSError as error:
        raise OutError(f"--out {name} cannot be written to: {error.strerror or error}") from error
    return out


def _device(name: str) -> torch.device:
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise zoo.ModelError("--device cuda: torch sees no CUDA device; expected 'cpu' or 'auto'")
    return torch.device("cuda" if found and name != "cpu" else "cpu")
