"""A classifier and its images, made ready: what every command does before its own work.

The options are checked, the model is built, given its weights and traced, and its last layer (or, without weights, all of
it) is trained. In: the command's options. Out: a `Job`, and in --out the trained model and the log.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from taylored._checkpoint import difference, load, read, save
from taylored._cli import data, zoo
from taylored._cli.log import Log
from taylored._files import write_atomically
from taylored._graph.tracing import trace
from taylored._graph.values import ChannelGraph
from taylored._plan import PrunePlan

TRAINED, CHECKPOINT, METRICS, SUMMARY = "trained.safetensors", "checkpoint.safetensors", "metrics.jsonl", "summary.json"
# Options that do not change the result: a run may be resumed with others.
FREE = {"command", "out", "resume", "workers", "threads", "device", "latency_batch", "criteria"}


class OutError(ValueError):
    """--out cannot be used as asked."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is known before the first image is decoded."""

    options: argparse.Namespace
    out: Path
    device: torch.device
    source: data.Source
    network: zoo.Network
    example: torch.Tensor
    graph: ChannelGraph
    settings: dict  # what determines the result

    @property
    def model(self) -> nn.Module:
        return self.network.model


def prepare(options: argparse.Namespace, unlabelled: bool = False) -> Job:
    """Build, trace and check: whatever can be wrong with the options is found here. unlabelled: --data may have no classes; the
    model keeps its own then."""
    if not importlib.util.find_spec("matplotlib"):  # noticed now, not after hours of training
        raise OutError("the report needs matplotlib: pip install 'taylored[cli]'")
    out = _folder(options.out)
    device = _device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    source = data.find(options.data, unlabelled)
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
    network.model.to(device).to(memory_format=torch.channels_last)
    example = torch.zeros(1, network.channels, network.image_size, network.image_size, device=device)
    graph = trace(network.model, example)
    print(graph)
    return Job(options, out, device, source, network, example, graph, _settings(options, source, network))


def _settings(options, source, network) -> dict:
    """The options with their defaults filled in."""
    pixels = data.DIGITS if source.name == "digits" else data.IMAGENET
    scratch = options.weights == "none"
    filled = {
        "image_size": network.image_size,
        "channels": network.channels,
        "mean": options.mean or network.mean or pixels[0],
        "std": options.std or network.std or pixels[1],
    }
    defaults = {
        "lr": 3e-4 if scratch else 1e-4,
        "batch_norm": "train" if scratch else "frozen",
        "train_epochs": 0 if not source.classes else 20 if scratch else 3 if network.new_head else 0,
    }
    filled |= {name: value for name, value in defaults.items() if name in options and getattr(options, name) is None}
    settings = {name: value for name, value in vars(options).items() if name not in FREE} | filled
    return json.loads(json.dumps({**settings, "classes": source.classes}))  # tuples become lists, as in the files


def begin(job: Job, files: Iterable[str]) -> bool:
    """Whether the run is resumed. If not, the files of an earlier one are deleted from --out."""
    resumed = job.options.resume and _matches(job)
    if not resumed:
        if (job.out / SUMMARY).exists():
            print(f"{job.out} holds an earlier run: it is replaced")
        for name in files:
            (job.out / name).unlink(missing_ok=True)
    return resumed


def images(job: Job) -> tuple[data.Batches, data.Batches]:
    """Loaders of the train and the test split."""
    s = job.settings
    return job.source.load(s["image_size"], job.network.channels, s["mean"], s["std"], s["batch_size"], job.options.workers)


def fit(job: Job, batches: data.Batches, log: Log, resumed: bool) -> None:
    """Train the model and save it, or take it from --out."""
    if resumed:
        load(job.model, job.out / TRAINED)
    else:
        _train(job, batches, log)
        save(job.model, PrunePlan.of(job.graph, {}), job.out / TRAINED, extra={"settings": job.settings})


def _matches(job) -> bool:
    """Whether --out holds a run that can be gone on with; one with other settings is an error."""
    path = job.out / TRAINED
    if not path.exists():
        print(f"nothing to resume in {job.out}: starting anew")
        return False
    if other := difference(read(path)[2]["extra"]["settings"], job.settings):
        raise OutError(f"--resume: the run in {job.out} has other settings {other}; give the same options, or another --out")
    return True


def _train(job, batches, log) -> None:
    """Before pruning: everything where there are no weights, the new last layer alone where there are."""
    s, model, head = job.settings, job.model, job.network.new_head
    scratch = s["weights"] == "none"
    trained = model if scratch or not head else model.get_submodule(head)
    lr = s["train_lr"] if scratch or head else s["lr"]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=s["weight_decay"])
    steps = max(1, s["train_epochs"] * len(batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step / steps))
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
        log.write({"event": "train_epoch", "epoch": epoch, "loss": total / len(batches), "seconds": time.perf_counter() - since})
    for p, was in wanted.items():
        p.requires_grad_(was)


def cosine(share: float) -> float:
    """A learning-rate factor: from 1 down to 0.01 as `share` goes from 0 to 1."""
    return 0.505 + 0.495 * math.cos(math.pi * min(share, 1.0))


@torch.inference_mode()
def predictions(model: nn.Module, batches, device: torch.device) -> torch.Tensor:
    """[N] on the CPU: the class of every image's largest output."""
    return torch.cat([model(inputs.to(device)).argmax(1).cpu() for inputs, _ in batches])


@torch.inference_mode()
def accuracy(model: nn.Module, batches, device: torch.device) -> float:
    """The share of images whose largest output is their label's."""
    right = count = 0
    for inputs, labels in batches:
        right += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
        count += len(labels)
    return right / count


def _folder(name: str) -> Path:
    """--out, made if need be, and proven to be writable."""
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ".probe", b"")
        (out / ".probe").unlink(missing_ok=True)  # several processes may be at it
    except OSError as error:
        raise OutError(f"--out {name} cannot be written to: {error.strerror or error}") from error
    return out


def _device(name: str) -> torch.device:
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise zoo.ModelError("--device cuda: torch sees no CUDA device; expected 'cpu' or 'auto'")
    return torch.device("cuda" if found and name != "cpu" else "cpu")
