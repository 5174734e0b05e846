"""The oracle by replay against brute force (the whole model once per unit, same batch, inference mode), beside what the FLOPs
alone allow: those of brute force over those of the replay. A fixed sample of units, the same share of every group, is
measured; what any run needs once (export, two passes over the data) is subtracted. Losses are compared with brute force's
first. Random weights, random images.

    python benchmarks/oracle.py [--share 0.03] [--batch 8] [MODEL ...]
"""

import argparse
import time

import torch
import torchvision
from timer import Table, side_by_side
from torch import nn

import taylored
from taylored._masking import zeroed
from taylored._oracle.exact import Replay
from taylored._torch_compat import computes_in_bfloat16


def vgg16_bn_32():
    """VGG16-BN as it is used for 32x32 images: its last map is 1x1, and one linear layer follows."""
    model = torchvision.models.vgg16_bn(weights=None)
    return nn.Sequential(model.features, nn.Flatten(), nn.Linear(512, 10))


MODELS = {
    "vgg16": (lambda: torchvision.models.vgg16(weights=None), 224),
    "vgg16_bn (32x32)": (vgg16_bn_32, 32),
    "resnet50": (lambda: torchvision.models.resnet50(weights=None), 224),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), 224),
}


def compare(name, share, batch, precision):
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    count = batch * 8 if size == 32 else batch
    x, y = torch.randn(count, 3, size, size), torch.randint(0, 10, (count,))
    with torch.no_grad():  # statistics of these images, so that signals neither die nor explode
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.train().momentum = 1.0
        model(x)
        model.eval()
    graph = taylored.trace(model, x[:1])
    loss_fn = nn.CrossEntropyLoss()
    sample = {g.name: torch.linspace(0, g.units - 1, max(1, round(share * g.units))).long() for g in graph.groups}
    units = sum(map(len, sample.values()))

    def replay(units):
        options = {"mode": "loss", "units": units, "precision": precision, "progress": False}
        return taylored.oracle(model, graph, [(x, y)], loss_fn, **options)

    @torch.inference_mode()
    def brute_force():
        return loss_fn(model(x), y)

    found = replay(sample)
    if precision == "float32":
        base = float(brute_force())
        for group in graph.groups[:: max(1, len(graph.groups) // 4)]:
            unit = sample[group.name][:1]
            with zeroed(model, graph, {group.name: unit}):
                loss = float(brute_force())
            assert abs(float(found[group.name][unit]) + base - loss) <= 1e-5 * loss, (group, loss)
    contenders = {"once": lambda: replay({}), "sample": lambda: replay(sample), "forward": brute_force}
    times = side_by_side(contenders, seconds=20, rounds=(3, 5))
    bound = Replay(model, graph, x).bound(sample)
    return units, times["forward"], (times["sample"] - times["once"]) / units, bound


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--share", type=float, default=0.03)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    table = Table(f"one unit on {options.batch} images (32x32: {8 * options.batch})", "replay")
    if not computes_in_bfloat16(torch.device("cpu")):
        print("bfloat16 is not timed: this processor has no arithmetic for it, and the oracle takes float32 instead")
    for name in options.models:
        units, forward, replay, bound = compare(name, options.share, options.batch, "float32")
        times = {"replay": replay, "brute force": forward}
        if computes_in_bfloat16(torch.device("cpu")):
            *_, times["replay, bfloat16"], _ = compare(name, options.share, options.batch, "bfloat16")
        table.row(name, times)
        reached = f"FLOPs allow {bound:.2f}x: {forward / replay:.2f}x is {forward / replay / bound:.0%} of that"
        print(f"{'':{table.width}}a fixed sample of {units} units, from every group; {reached}", flush=True)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"({time.perf_counter() - start:.0f} s)")
