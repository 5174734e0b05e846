"""`taylored export`: write what was pruned for other runtimes."""

import argparse
from pathlib import Path

import torch

from taylored._checkpoint import load, read
from taylored._cli import zoo
from taylored._errors import CheckpointError
from taylored._export import export as export_model


def export(options: argparse.Namespace) -> None:
    """Build, load, write, and say what was written."""
    extra = read(options.pruned)[2]["extra"]
    settings = extra.get("summary", extra).get("settings", {})
    name = options.model or settings.get("model")
    classes = options.classes or settings.get("outputs") or len(settings.get("classes", ())) or None
    if not name:
        raise CheckpointError(f"{options.pruned} does not say what model it was pruned from: give --model")
    size, channels = options.image_size or settings.get("image_size"), settings.get("channels", 3)
    network = zoo.build(name, "none", classes, channels=channels, image_size=size)
    load(network.model, options.pruned)
    example = torch.randn(options.batch or 2, network.channels, network.image_size, network.image_size)
    difference = export_model(network.model, example, options.out, any_batch=options.batch is None)
    shape = "x".join(map(str, (options.batch or "any", *example.shape[1:])))
    checked = f"outputs within {difference:.1g} of the largest" if difference is not None else "not run: onnxruntime is missing"
    print(f"{options.out}: images {shape}, {Path(options.out).stat().st_size / 1e6:.2f} MB; {checked}")
