"""Rank the units by every criterion, and the criteria by how well they agree with the oracle: `taylored rank`.

The comparison of arXiv:1611.06440, section 3.1, on the user's model and images. In: the command's options. Out, in --out:
the scores of all criteria and of the oracle, a summary, and a page with the table and its pictures.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import distributed, nn

from taylored._cli import data, report
from taylored._cli.job import CHECKPOINT, METRICS, SUMMARY, TRAINED, Job, accuracy, begin, fit, images, prepare
from taylored._cli.log import Log, without_nan
from taylored._files import write_atomically
from taylored._graph.values import ChannelGraph
from taylored._masking import masked
from taylored._modules import in_mode
from taylored._oracle.measure import oracle
from taylored._planning import make_plan
from taylored._tables import text_table
from taylored.criteria import CRITERIA, Scores, spearman

SCORES, PAGE = "scores.safetensors", "rank.html"
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of all units, removed in the order of each criterion
COLUMNS = ("criterion", "per group", "all units", "all units, L2", "forward", "backward", "seconds")


@dataclasses.dataclass(frozen=True)
class Judged:
    """The images that everything is measured on, on the model's device."""

    batches: data.Batches
    device: torch.device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for inputs, labels in self.batches:
            yield inputs.to(self.device), labels.to(self.device)


def rank(options: argparse.Namespace) -> dict | None:
    """The whole comparison; returns the summary that it also writes to --out, or None in all processes but the first.

    Under torchrun the oracle's units are shared among the processes; the first one does everything else."""
    with _processes() as number, contextlib.redirect_stdout(sys.stdout if number == 0 else None):
        job = prepare(options)
        resumed = number == 0 and begin(job, (TRAINED, *_checkpoints(job.out), METRICS, SUMMARY, SCORES, PAGE))
        train, test = images(job)
        if number == 0:
            log = Log(job.out / METRICS)
            fit(job, train, log, resumed)
        _share(job.model)
        torch.manual_seed(options.seed)  # the same images and units in every process, and when resumed
        judged = Judged(train.sample(options.examples), job.device)
        chosen = {g.name: torch.randperm(g.units)[: options.units].sort().values for g in job.graph.groups}
        since = time.perf_counter()
        change = oracle(
            job.model,
            job.graph,
            judged,
            nn.functional.cross_entropy,
            mode="loss",
            units=chosen,
            precision=options.precision,
            memory=options.memory,
            checkpoint=job.out / CHECKPOINT,
            progress=sys.stderr.isatty() or options.precision != "float32",  # which it reports on
        )
        seconds = time.perf_counter() - since
    if number:
        return None
    log.write({"event": "oracle", "seconds": seconds})
    scores = {"oracle-abs": {name: c.abs() for name, c in change.items()}, "oracle-loss": change}
    times = dict.fromkeys(scores, seconds)
    for name in CRITERIA if "all" in options.criteria else options.criteria:
        if name not in scores:
            torch.manual_seed(options.seed)
            since = time.perf_counter()
            scores[name] = CRITERIA[name](job.model, job.graph, judged, nn.functional.cross_entropy)
            times[name] = time.perf_counter() - since
            log.write({"event": name, "seconds": times[name]})
    summary = _summarise(job, scores, times, judged, accuracy(job.model.eval(), test, job.device), log)
    tensors = {f"{criterion}/{group}": s for criterion, found in scores.items() for group, s in found.items()}
    write_atomically(job.out / SCORES, serialize(tensors))
    write_atomically(job.out / PAGE, page(summary, scores).encode())
    write_atomically(job.out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    print(f"\n{table(summary)}\n\nreport: {job.out / PAGE}\nscores: {job.out / SCORES}")
    return summary


@contextlib.contextmanager
def _processes():
    """The rank of this process among those that torchrun started, 0 where it is alone. They talk through gloo, whatever the
    device: all they exchange is the weights, once, and one number per unit."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # the others wait while the first one trains
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def _share(model) -> None:
    """Give all processes the weights of the first."""
    if distributed.is_initialized():
        for tensor in model.state_dict().values():
            copy = tensor.cpu().contiguous()
            distributed.broadcast(copy, 0)
            tensor.copy_(copy)


def _checkpoints(out: Path) -> list[str]:
    """The oracle's, of every process."""
    return [path.name for path in out.glob(f"{CHECKPOINT}*")]


# -- figures -----------------------------------------------------------------------------------------------------------


def _summarise(job: Job, scores: dict[str, Scores], times, judged, test_accuracy, log) -> dict:
    truth = scores["oracle-abs"]
    measured = int(sum((~s.isnan()).sum() for s in truth.values()))
    classes = len(job.source.classes)
    criteria = {}
    for name, found in scores.items():
        forward, backward = CRITERIA[name].passes(measured, classes)
        entry = dataclasses.asdict(spearman(found, truth)) | {"forward": forward, "backward": backward, "seconds": times[name]}
        # The oracle is the loss itself: between its groups there is nothing to make comparable.
        entry["curve"] = curve(job.model, job.graph, found, judged, "none" if name.startswith("oracle") else "l2")
        criteria[name] = entry
    summary = {
        "examples": len(judged.batches.images),
        "units": job.graph.units,
        "measured": measured,
        "groups": [g.name for g in job.graph.groups],
        "accuracy": test_accuracy,
        "loss": mean_loss(job.model, judged),
        "criteria": criteria,
        "seconds": round(log.elapsed(), 1),
        "settings": job.settings | {"criteria": list(scores)},
        "machine": {"device": str(job.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    return without_nan(summary)


def curve(model: nn.Module, graph: ChannelGraph, scores: Scores, batches, normalize: str) -> list[tuple[int, float]]:
    """(units removed, mean loss), without fine-tuning, in the order of the scores; normalize: as for `make_plan`. Empty if some
    units have no score; ends where the groups that have scores can spare no more."""
    if any(bool(s.isnan().any()) for s in scores.values()):
        return []
    most = sum(len(s) - 1 for s in scores.values())
    points = []
    for count in (round(share * graph.units) for share in SHARES):
        if 0 < count <= most:
            plan = make_plan(graph, scores, remove_units=count, normalize=normalize, flops_weight=0.0)
            with masked(model, graph, plan):
                points.append((count, mean_loss(model, batches)))
    return points


@torch.inference_mode()
def mean_loss(model: nn.Module, batches) -> float:
    """Cross-entropy over all examples, in eval mode."""
    total, examples = 0.0, 0
    with in_mode(model, training=False):
        for inputs, labels in batches:
            total += float(nn.functional.cross_entropy(model(inputs), labels, reduction="sum"))
            examples += len(labels)
    return total / examples


def ranking(summary: dict) -> list[str]:
    """The criteria, best first: by their agreement with the oracle over all units, each group divided by its L2 norm."""
    rhos = {name: e["all_units_l2"] for name, e in summary["criteria"].items() if name != "oracle-abs"}
    return sorted(rhos, key=lambda name: -math.inf if rhos[name] is None else rhos[name], reverse=True)


def rows(summary: dict) -> list[tuple[str, ...]]:
    """One line per criterion, below COLUMNS."""
    lines = []
    for name in ranking(summary):
        e = summary["criteria"][name]
        rhos = ("-" if e[key] is None else f"{e[key]:.2f}" for key in ("per_group", "all_units", "all_units_l2"))
        lines.append((name, *rhos, str(e["forward"]), str(e["backward"]), f"{e['seconds']:.2f}"))
    return lines


def table(summary: dict) -> str:
    """The rows as text, in columns."""
    return f"  {legend(summary)}\n{text_table(COLUMNS, rows(summary))}"


def legend(summary: dict) -> str:
    measured = "all" if summary["measured"] == summary["units"] else f"{summary['measured']} of"
    units = f"{measured} {summary['units']} units, {summary['examples']} images"
    return f"Spearman's rho with oracle-abs, {units}; cost in passes over them"


# -- the page ----------------------------------------------------------------------------------------------------------


def page(summary: dict, scores: dict[str, Scores]) -> str:
    """The whole HTML page."""
    s, best = summary["settings"], ranking(summary)[0]
    title = f"{s['model']} on {Path(s['data']).name}: criteria against the oracle"
    lead = f"{legend(summary)}. Accuracy on the test images {summary['accuracy']:.2%}. Best: {best}."
    pictures = [
        (
            "Each criterion against the oracle",
            "One dot per unit: its place when all are sorted by the criterion (each group divided by its L2 norm), and by the "
            "oracle. The darker, the nearer to the input. On the diagonal the two agree.",
            scatter(summary, scores),
        ),
        (
            "Correlation per group",
            "Spearman's rho within each group; a group is called after its first layer. Empty: no correlation to speak of.",
            heat(summary),
        ),
        (
            "Loss against units removed",
            "Mean loss on the same images when the lowest units of all groups are zeroed, without fine-tuning. Blue needs a "
            "backward pass, orange a forward pass, grey nothing but the weights; black is the oracle.",
            losses(summary),
        ),
    ]
    body = f"{report.html_table(COLUMNS, rows(summary), 'log')}\n{report.figures(pictures)}"
    return report.document(title, lead, body, s)


def scatter(summary: dict, scores: dict[str, Scores]) -> str:
    """A small picture for each criterion, best first."""
    from scipy.stats import rankdata

    names, truth = ranking(summary), scores["oracle-abs"]
    depth = {name: i / max(1, len(summary["groups"]) - 1) for i, name in enumerate(summary["groups"])}
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure, _ = report.canvas(7.2, 2.0 * lines, lines, columns)
    for i, each in enumerate(figure.axes):
        each.set_axis_off() if i >= len(names) else each.set_title(_titled(summary, names[i]), fontsize=8, color=report.INK)
        each.set_xticks([]), each.set_yticks([])
        each.set_aspect("equal")
    for name, each in zip(names, figure.axes, strict=False):
        x: list[float] = []
        y: list[float] = []
        color: list[float] = []
        for group, s in scores[name].items():
            there = ~(s.isnan() | truth[group].isnan())
            norm = s.nan_to_num(nan=0).norm()
            x += (s[there] / norm if norm > 0 else s[there]).tolist()
            y += truth[group][there].tolist()
            color += [depth[group]] * int(there.sum())
        size = max(1.0, min(9.0, 3000 / max(1, len(x))))
        each.scatter(
            rankdata(x), rankdata(y), size, color, cmap="viridis", vmin=0, vmax=1, alpha=0.7, linewidths=0, rasterized=True
        )
    figure.supxlabel("place by the criterion", fontsize=9, color=report.INK)
    figure.supylabel("place by the oracle", fontsize=9, color=report.INK)
    return report.svg(figure, "each criterion against the oracle")


def _titled(summary, name) -> str:
    rho = summary["criteria"][name]["all_units_l2"]
    return name if rho is None else f"{name}  {rho:.2f}"


def heat(summary: dict) -> str:
    """Spearman's rho: a row per group, a column per criterion, best first."""
    names, groups = ranking(summary), summary["groups"]
    rho = [[summary["criteria"][n]["groups"].get(g, math.nan) for n in names] for g in groups]
    figure, axes = report.canvas(7.2, 1.6 + report.ROW * len(groups))
    axes.imshow(rho, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="left", fontsize=7.5)
    axes.xaxis.tick_top()
    for i, line in enumerate(rho):
        for j, value in enumerate(line):
            if not math.isnan(value):
                ink = "white" if abs(value) > 0.6 else report.INK
                axes.text(j, i, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=6, color=ink)
    report.label_rows(axes, groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return report.svg(figure, "rank correlation with the oracle, per group and criterion")


def losses(summary: dict) -> str:
    """The fine-tune-free curves."""
    figure, axes = report.canvas(7.2, 4.2)
    styles = {color: iter(("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)))) for color in FAMILIES}
    for name in ("oracle-abs", *ranking(summary)):
        e = summary["criteria"][name]
        if e["curve"]:
            color = next(color for color, has in FAMILIES.items() if has(name, e))
            points = [(0, summary["loss"]), *e["curve"]]
            x, y = [100 * count / summary["units"] for count, _ in points], [loss for _, loss in points]
            axes.plot(x, y, linestyle=next(styles[color]), color=color, linewidth=1.4, label=name)
    axes.set_yscale("log")
    axes.set_xlim(0)
    axes.set_xlabel("units removed, % of all")
    axes.set_ylabel("mean loss")
    axes.grid(axis="y", color=report.LIGHT, linewidth=0.8)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7.5, handlelength=3)
    return report.svg(figure, "loss against units removed, by criterion")


# Colour of a curve: by what the criterion asks for.
FAMILIES = {
    report.INK: lambda name, e: name.startswith("oracle"),
    "#CC79A7": lambda name, e: name == "random",
    report.BLUE: lambda name, e: e["backward"] > 0,
    report.ORANGE: lambda name, e: e["forward"] > 0,
    report.GREY: lambda name, e: True,
}
