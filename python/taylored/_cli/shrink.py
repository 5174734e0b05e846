"""`taylored shrink`: cut a pretrained classifier without training it, and let what is left say what was removed.

In: the command's options; labels serve to measure, never to cut. Out, in --out: a smaller model for every budget, a summary, and
a page that compares each with the uncut model and with the cut alone.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from taylored._checkpoint import save
from taylored._cli import data, report
from taylored._cli.job import METRICS, SUMMARY, TRAINED, Job, begin, fit, images, predictions, prepare
from taylored._cli.log import Log, without_nan
from taylored._cli.prune import PRUNED, REPORT
from taylored._compact import compact
from taylored._files import write_atomically
from taylored._modules import count_examples
from taylored._plan import PrunePlan
from taylored._planning import make_plan
from taylored._proof import first_examples
from taylored._shrink import shrink as shrink_model
from taylored._tables import text_table

UNSETTLED = 0.9  # a held-out residual above it: the images could hardly say how to mend the layer


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The images that a model is cut and mended on, on its device, without their labels."""

    batches: data.Batches
    device: torch.device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for inputs, _ in self.batches:
            yield inputs.to(self.device)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Measures models on the test images: how many of their largest outputs are true. truth: [N], the labels, or what the uncut
    model says where there are none."""

    measure: str  # "accuracy" or "agreement"
    batches: data.Batches
    truth: torch.Tensor
    device: torch.device

    def __call__(self, model: nn.Module) -> float:
        return float((predictions(model, self.batches, self.device) == self.truth).double().mean())


def shrink(options: argparse.Namespace) -> dict:
    """Cut and mend a copy of the model for every budget; returns the summary that it also writes to --out."""
    job = prepare(options, unlabelled=True)
    if options.train_epochs and not job.source.classes:
        raise data.DataError(f"--train-epochs: the images in {options.data} have no classes to train for")
    _check(job)
    stale = (path.name for path in job.out.glob(f"{Path(PRUNED).stem}-[0-9]*.safetensors"))
    resumed = begin(job, (TRAINED, PRUNED, *stale, METRICS, SUMMARY, REPORT))
    log = Log(job.out / METRICS)
    train, test = images(job)
    if job.source.classes:
        fit(job, train, log, resumed)
    job.model.eval()
    judge = _judge(job, test)
    calibration = Calibration(train.calibration(options.examples), job.device)
    settings = job.settings | {"outputs": job.model(job.example).shape[1]}
    done = [_shrunk(job, target, calibration, judge, settings, log) for target in _targets(options)]
    summary = {
        "measure": judge.measure,
        "before": judge(job.model),
        "flops": job.graph.flops,
        "params": job.graph.params,
        "units": job.graph.units,
        "examples": len(calibration.batches.images),
        "held_out": len(judge.truth),
        "targets": [entry for entry, _ in done],
        "seconds": round(log.elapsed(), 1),
        "settings": settings,
        "machine": {"device": str(job.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    write_atomically(job.out / REPORT, page(summary, done[0][1]).encode())
    write_atomically(job.out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    print(f"\n{text_table(columns(summary), rows(summary))}\n")
    print(f"report: {job.out / REPORT}\nmodel:  {', '.join(str(job.out / entry['file']) for entry, _ in done)}")
    return summary


def _check(job: Job) -> None:
    """Every budget, with any scores at all: whether it can be met depends on counts alone."""
    even = {group.name: torch.ones(group.units) for group in job.graph.groups}
    for target in _targets(job.options):
        make_plan(
            job.graph,
            even,
            target_flops=target,
            per_flop=True,
            round_to=job.options.round_to,
            ignore=job.options.ignore,
        )


def _targets(options) -> list[float]:
    """--target-flops, then the others of --sweep."""
    return list(dict.fromkeys((options.target_flops, *sorted(options.sweep, reverse=True))))


def _judge(job: Job, test: data.Batches) -> Judge:
    if job.source.classes:
        return Judge("accuracy", test, test.images.labels, job.device)
    return Judge("agreement", test, predictions(job.model, test, job.device), job.device)


def _shrunk(job: Job, target: float, calibration: Calibration, judge: Judge, settings: dict, log: Log) -> tuple[dict, PrunePlan]:
    """Cut and mend a copy for one budget, measure it and save it."""
    options, since, residuals = job.options, time.perf_counter(), []
    # FLOPs of a round are those of the examples that `shrink` traces with.
    whole = job.graph.flops * count_examples(first_examples(next(iter(calibration))))

    def note(event):
        residuals.append(event["residuals"])
        log.write({"event": "round", "target": target} | event | {"flops_left": event["flops"] / whole})

    model = copy.deepcopy(job.model)
    plan = shrink_model(
        model,
        calibration,
        target_flops=target,
        rounds=options.rounds,
        round_to=options.round_to,
        ignore=options.ignore,
        seed=options.seed,
        log=note,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - since
    cut = copy.deepcopy(job.model)
    compact(cut, plan)
    worst = {name: max(r.get(name, -math.inf) for r in residuals) for name, _ in model.named_modules()}
    entry = {
        "target": target,
        "file": PRUNED if target == options.target_flops else f"{Path(PRUNED).stem}-{_named(target)}.safetensors",
        "flops_left": plan.flops[1] / plan.flops[0],
        "params_left": plan.params[1] / plan.params[0],
        "units": sum(plan.kept.values()),
        "cut": judge(cut),
        "mended": judge(model),
        "seconds": round(seconds, 1),
        "residuals": without_nan({name: value for name, value in worst.items() if value > -math.inf}),
    }
    save(model, plan, job.out / entry["file"], extra={"settings": settings, "result": entry})
    log.write({"event": "target"} | entry | {judge.measure: entry["mended"]})
    return entry, plan


def _named(target: float) -> str:
    """0.5 -> 0.50, and all digits where there are more than two."""
    return f"{target:.2f}" if round(target, 2) == target else f"{target:g}"


# -- figures -----------------------------------------------------------------------------------------------------------


def columns(summary: dict) -> tuple[str, ...]:
    """What the rows are of."""
    return "target", "FLOPs left", "parameters left", f"{summary['measure']} before", "cut alone", "mended", "seconds"


def rows(summary: dict) -> list[tuple[str, ...]]:
    """One line per budget, the largest first."""
    return [
        (
            _named(e["target"]),
            f"{e['flops_left']:.1%}",
            f"{e['params_left']:.1%}",
            *(f"{share:.2%}" for share in (summary["before"], e["cut"], e["mended"])),
            f"{e['seconds']:.1f}",
        )
        for e in by_size(summary)
    ]


def by_size(summary: dict) -> list[dict]:
    """What came of every budget, the largest first."""
    return sorted(summary["targets"], key=lambda e: -e["target"])


def warning(residuals: dict[str, float | None]) -> str:
    """What the residuals say of the images."""
    known = [value for value in residuals.values() if value is not None]
    above = sum(value > UNSETTLED for value in known)
    share = f"{above} of {len(known)} layers ({above / max(1, len(known)):.0%})"
    return f"{share} are above {UNSETTLED}, where the images could hardly say how to mend them" + (
        "; more of them, or more various ones, may help." if above else "."
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def page(summary: dict, plan: PrunePlan) -> str:
    """The whole HTML page; plan: that of --target-flops."""
    s, first, measure = summary["settings"], summary["targets"][0], summary["measure"]
    title = f"{s['model']} on {Path(s['data']).name}, shrunk"
    truth = "the label's" if measure == "accuracy" else "the uncut model's"
    lead = (
        f"{first['flops_left']:.0%} of the FLOPs, {measure} {summary['before']:.2%} before, {first['cut']:.2%} after the cut "
        f"alone, {first['mended']:.2%} mended. Cut and mended on {summary['examples']} images without labels, without training; "
        f"measured on {summary['held_out']} others: the share whose largest output is {truth}."
    )
    pictures = [
        (
            f"{measure.capitalize()} against FLOPs",
            "Blue: cut and mended; orange: the same cut alone, without mending.",
            tradeoff(summary),
        ),
        (
            "What mending could not restore",
            "Of every layer that lost inputs: the error of its outputs on images that the fit did not see, as a share of the "
            "error without mending; the largest of all rounds. Close to 0 the other inputs say what the lost ones said; close to "
            f"1 or above it the images could not settle it. {warning(first['residuals'])}",
            unsettled(first["residuals"]),
        ),
        (
            "Units per group",
            "A group is a set of channels that can stand in for each other; it is called after its first layer.",
            report.widths(plan),
        ),
    ]
    table = report.html_table(columns(summary), rows(summary), "log")
    return report.document(title, lead, f"{table}\n{report.figures(pictures)}", s)


def tradeoff(summary: dict) -> str:
    """The measure after the cut alone and after mending, from all of the FLOPs on the left to the least on the right."""
    figure, axes = report.canvas(7.2, 3.4)
    x = [100.0, *(100 * e["flops_left"] for e in by_size(summary))]
    for key, label, color in (("cut", "cut alone", report.ORANGE), ("mended", "mended", report.BLUE)):
        y = [100 * share for share in (summary["before"], *(e[key] for e in by_size(summary)))]
        axes.plot(x, y, "-o", color=color, markersize=5, linewidth=1.6, clip_on=False, label=label)
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs left, % of the original")
    axes.set_ylabel(f"{summary['measure']}, %")
    axes.grid(axis="y", color=report.LIGHT, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return report.svg(figure, f"{summary['measure']} against FLOPs, of the cut alone and mended")


def unsettled(residuals: dict[str, float | None]) -> str:
    """The held-out residual of every layer, the network's first at the top; orange above UNSETTLED."""
    known = {name: value for name, value in residuals.items() if value is not None}
    figure, axes = report.canvas(7.2, 0.9 + report.ROW * len(known))
    colors = [report.ORANGE if value > UNSETTLED else report.BLUE for value in known.values()]
    axes.barh(range(len(known)), list(known.values()), height=0.74, color=colors)
    axes.axvline(1, color=report.INK, linewidth=0.8)
    axes.set_xlim(0, max(1.05, *known.values()) if known else 1.05)
    report.label_rows(axes, list(known))
    axes.set_xlabel("held-out error, as a share of that without mending")
    return report.svg(figure, "residual of the mending, per layer")
