"""`taylored prune`: the walk-through of arXiv:1611.06440 end to end. Fit the last layer to the classes, train, rank, prune and
fine-tune in rounds, and measure what came of it. Everything it decides is an option; everything it writes lies in --out.
"""

import argparse
import copy
import json
import sys

import torch
from torch import nn

from taylored._checkpoint import save
from taylored._cli import latency, report
from taylored._cli.job import CHECKPOINT, METRICS, SUMMARY, TRAINED, accuracy, begin, cosine, fit, images, prepare
from taylored._cli.log import Log
from taylored._files import write_atomically
from taylored._planning import make_plan
from taylored._prune import PruneResult, updates
from taylored._prune import prune as prune_model

PRUNED, REPORT = "pruned.safetensors", "report.html"


def prune(options: argparse.Namespace) -> dict:
    """The whole walk-through; returns the summary that it also writes to --out."""
    job = prepare(options)
    # The budget is checked with any scores at all: whether it can be met depends on counts alone.
    even = {group.name: torch.ones(group.units) for group in job.graph.groups}
    make_plan(job.graph, even, **_planning(options))
    resumed = begin(job, (TRAINED, CHECKPOINT, PRUNED, METRICS, SUMMARY, REPORT))
    log = Log(job.out / METRICS)
    train, test = images(job)
    fit(job, train, log, resumed)
    original = copy.deepcopy(job.model)
    result = _prune(job, train, test, log)
    summary = _summarise(job, original, result, log)
    print(f"\n{report.table(summary)}\n")
    print(f"report: {job.out / REPORT}\nmodel:  {job.out / PRUNED}")
    return summary


def _planning(options) -> dict:
    names = ("target_flops", "normalize", "flops_weight", "round_to", "min_units", "max_ratio", "ignore")
    return {name: getattr(options, name) for name in names}


def _prune(job, train, test, log) -> PruneResult:
    """Rank, cut and fine-tune, at a constant learning rate until the last cut and a falling one after it."""
    s = job.settings
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])
    cutting = updates(train, s["rounds"], s["round_epochs"], 0)
    tuning = max(1, updates(train, s["rounds"], s["round_epochs"], s["final_epochs"]) - cutting)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(max(0, step - cutting) / tuning))
    return prune_model(
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
        log=lambda event: log.write(event | {"flops_left": event["flops"] / job.graph.flops}),
    )


def _summarise(job, original, result, log) -> dict:
    """Measure, and write what is left: the model, the summary and the report."""
    size = job.options.latency_batch
    before, after = latency.milliseconds_per_image([original, job.model], job.example.repeat(size, 1, 1, 1))
    log.write({"event": "latency", "batch": size, "latency_ms_before": before, "latency_ms_after": after})
    first, last = result.history[0], result.history[-1]
    summary = {
        f"{key}_{when}": e[key]
        for key in ("accuracy", "flops", "params", "units")
        for when, e in (("before", first), ("after", last))
    }
    summary |= {"latency_ms_before": before, "latency_ms_after": after, "seconds": round(log.elapsed(), 1)}
    machine = {"device": str(job.device), "threads": torch.get_num_threads(), "latency_batch": size, "torch": torch.__version__}
    summary |= {"settings": job.settings, "machine": machine}
    save(job.model, result.plan, job.out / PRUNED, extra={"summary": summary})
    report.write(summary, result.history, result.plan, job.out / REPORT)
    write_atomically(job.out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary
