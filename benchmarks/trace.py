"""Time to trace each of torchvision's classification CNNs, and what came out: filters prunable, units, groups."""

import time

import torch
from torchvision import models

import taylored


def main():
    names = [n for n in models.list_models(module=models) if not n.startswith(("vit", "swin", "maxvit"))]
    print(f"{'model':20} {'seconds':>8} {'prunable':>9} {'units':>8} {'groups':>7}")
    slowest = ("", 0.0)
    for name in names:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, **options).eval()
        x = torch.zeros(1, 3, *((299, 299) if name == "inception_v3" else (224, 224)))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            graph = taylored.trace(model, x)
            times.append(time.perf_counter() - start)
        median = sorted(times)[1]
        slowest = max(slowest, (name, median), key=lambda s: s[1])
        share = graph.prunable_filters / graph.filters
        print(f"{name:20} {median:8.2f} {share:9.1%} {graph.units:8} {len(graph.groups):7}", flush=True)
    print(f"slowest: {slowest[0]}, {slowest[1]:.2f} s")


if __name__ == "__main__":
    main()
