"""Which models can be pruned, how much of them, and how exactly: torchvision's CNNs of every kind and timm's convolutional
families. Each model, its normalisation statistics randomised, is traced; three random plans are applied to copies of it and
compared with masking, max|compacted - masked| over max|masked| of all outputs. Beside it, where it is installed,
Torch-Pruning 1.6.1 prunes 30% of every layer but the outputs of the same model, which then runs. Each model is measured in a
process of its own; results are kept in FILE.json, and only what is missing there is measured.

    python benchmarks/coverage.py [--out docs/coverage.md] [--only PATTERN]
"""

import argparse
import collections
import copy
import fnmatch
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import taylored

TOLERANCE = 1e-4
DETECTORS = "fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn " \
    "retinanet_resnet50_fpn fcos_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large"  # fmt: skip
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
TIMM = """
    resnet18 resnet50d seresnet50 skresnet18 ecaresnet26t resnest14d resnetaa50 resnetblur50 resnetv2_50 resnext26ts
    gcresnet33ts wide_resnet50_2 regnetx_002 regnety_002 regnetz_b16 res2net50_14w_8s res2next50 dla34 dla60x
    hrnet_w18_small vovnet39a ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53 nfnet_l0 eca_nfnet_l0 nf_resnet50
    repvgg_a0 ghostnet_050 ghostnetv2_100 ghostnetv3_050 mixnet_s hardcorenas_a mobilenetv3_small_050
    mobilenetv4_conv_small mobilenetv4_hybrid_medium efficientnet_b0 tf_efficientnetv2_b0 efficientnet_lite0
    convnext_atto convnextv2_atto mobileone_s0 fastvit_t8 inception_next_atto inception_v4 inception_resnet_v2
    legacy_xception xception41p selecsls42 tresnet_m rexnet_100 levit_128s levit_conv_128s densenet121 dpn48b
    mnasnet_small semnasnet_075 fbnetc_100 lcnet_050 tinynet_e spnasnet_100 botnet26t_256 halonet26t lambda_resnet26t
    visformer_tiny edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientformer_l1 efficientformerv2_s0
    efficientvit_b0 efficientvit_m0 poolformer_s12 convmixer_768_32 repghostnet_050 repvit_m0_9 starnet_s1 hgnet_tiny
    hgnetv2_b0 focalnet_tiny_srf tiny_vit_5m_224 vgg11_bn sequencer2d_s vit_tiny_patch16_224 deit_tiny_patch16_224
    swin_tiny_patch4_window7_224 mixer_s32_224 davit_tiny maxvit_tiny_tf_224 nextvit_small
"""


def names():
    from torchvision import models

    skipped = ("vit", "swin", "maxvit", "regnet_y_128gf")  # transformers, but for one of each; 2.6 GB
    plain = [n for n in models.list_models(module=models) if not n.startswith(skipped)]
    video = ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"]
    found = [*plain, "vit_b_16", "swin_t", "maxvit_t", *SEGMENTATION.split(), *DETECTORS.split(), *video, "mvit_v1_b", "swin3d_t"]
    return [f"torchvision {n}" for n in (*found, "raft_small", "raft_large")] + [f"timm {n}" for n in TIMM.split()]


class Heads(nn.Module):
    """A detector up to what its heads say of every anchor: what follows picks the best boxes, and picks differently where
    two are equal to the last digit."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, *images):
        said = []
        parts = [m for m in self.detector.modules() if type(m).__name__.endswith(("Head", "Predictor", "KeypointRCNNHeads"))]
        handles = [m.register_forward_hook(lambda _m, _args, output: said.append(output)) for m in parts]
        try:
            boxes = self.detector(list(images))
        finally:
            for handle in handles:
                handle.remove()
        return said or boxes


def build(source, name):
    """(model, example inputs)."""
    torch.manual_seed(0)
    if source == "timm":
        import timm

        model = timm.create_model(name)
        size = model.default_cfg.get("fixed_input_size") and model.default_cfg["input_size"][-1]
        size = size or (256 if name.startswith(("botnet", "halonet", "lambda", "mobilevit", "maxvit", "davit", "swin")) else 224)
        return model, torch.randn(2, 3, size, size)
    from torchvision import models

    if name in DETECTORS.split():
        model = models.get_model(name, weights=None, weights_backbone=None)
        return model, [torch.rand(3, 160, 160), torch.rand(3, 160, 160)]
    if name.startswith("raft"):
        return models.get_model(name, weights=None), (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    if name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d"):
        return models.get_model(name, weights=None), torch.randn(2, 3, 16, 64, 64)
    if name in ("mvit_v1_b", "swin3d_t"):
        return models.get_model(name, weights=None), torch.randn(1, 3, 16, 224, 224)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"weights_backbone": None} if name in SEGMENTATION.split() else {}
    size = 299 if name == "inception_v3" else 128 if name in SEGMENTATION.split() else 224
    return models.get_model(name, weights=None, **options), torch.randn(2, 3, size, size)


def randomise(model):
    """Statistics and scales as training leaves them; layer scales of 1e-6 would hide their branch."""
    for module in model.modules():
        for key, low, high in (("weight", 0.8, 1.2), ("bias", -0.1, 0.1), ("running_mean", -0.1, 0.1), ("running_var", 0.8, 1.2)):
            value = getattr(module, key, None)
            if "Norm" in type(module).__name__ and isinstance(value, torch.Tensor) and value.is_floating_point():
                nn.init.uniform_(value, low, high)
    for name, parameter in model.named_parameters():
        if re.search("layer_scale|gamma|skipinit", name):
            nn.init.uniform_(parameter, 0.5, 1.5)


def outputs(model, inputs):
    with torch.no_grad():
        result = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [t.double() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def measure(source, name) -> dict:
    warnings.simplefilter("ignore")
    model, inputs = build(source, name)
    randomise(model.eval())
    if name in DETECTORS.split():
        model, inputs = Heads(model).eval(), tuple(inputs)
    example = inputs if isinstance(inputs, tuple) else inputs[:1]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        graph = taylored.trace(model, example)
        times.append(time.perf_counter() - start)
        if times[-1] > 10:
            break
    errors = []
    for seed, ratio in enumerate((0.3, 0.5, 0.9)):
        plan = taylored.random_plan(graph, ratio, seed)
        with taylored.masked(model, graph, plan):
            expected = outputs(model, inputs)
        pruned = copy.deepcopy(model)
        taylored.compact(pruned, plan)
        found = outputs(pruned, inputs)
        if [t.shape for t in found] != [t.shape for t in expected]:
            raise AssertionError(f"shapes differ: {[t.shape for t in found]} and {[t.shape for t in expected]}")
        errors.append(
            max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, expected) if b.numel())
        )
    reasons = collections.Counter()
    for layer in graph.layers.values():
        if layer.is_convolution:
            for c in layer.filters:
                if (reason := graph.frozen.get(int(c), layer.unlabelled if c < 0 else None)) is not None:
                    reasons[re.sub(r" in '.*?'| '.*?'", "", reason)] += 1
    share = graph.prunable_filters / max(graph.filters, 1)
    row = {"units": graph.units, "filters": int(graph.filters), "share": float(share), "seconds": statistics.median(times)}
    return row | {"error": max(errors), "reasons": reasons.most_common(2), "peer": peer(source, name)}


def peer(source, name) -> str:
    try:
        import torch_pruning as tp
    except ImportError:
        return "-"
    model, inputs = build(source, name)
    try:
        before = outputs(model.eval(), inputs)
        importance = tp.importance.RandomImportance()
        widths = {t.shape[1] for t in before if t.ndim > 1}
        ignored = [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", None)) in widths]
        tp.pruner.BasePruner(model, inputs, importance, pruning_ratio=0.3, ignored_layers=ignored).step()
        after = outputs(model, inputs)
    except Exception as error:  # whatever it is, it is the finding
        return f"fails: {type(error).__name__}"
    return "runs" if [t.shape for t in before] == [t.shape for t in after] else "outputs change shape"


def table(results) -> str:
    ok = [r for r in results.values() if "error" in r]
    shares = [r["share"] for r in ok if r["filters"]]
    exact = sum(r["error"] <= TOLERANCE for r in ok)
    lines = [
        "# Coverage",
        "",
        f"{len(results)} models: {len(ok)} trace and compact, {exact} of them exactly (to {TOLERANCE:g}); of the median model "
        f"{statistics.median(shares):.1%} of the convolutions' filters can be removed, "
        f"of {sum(s >= 0.9 for s in shares)} models at least 90%. "
        f"Tracing takes {max(r['seconds'] for r in ok):.2f} s at most.",
        "",
        "Made by `python benchmarks/coverage.py`, which says how (one thread of a 2-core AMD EPYC, "
        f"torch {torch.__version__.split('+')[0]}). Error: the worst of three random plans. "
        "Torch-Pruning 1.6.1: whether the model runs after it pruned 30% of every layer but the outputs; whether what is "
        "left is right was not looked at.",
        "",
        "| model | units | prunable | trace, s | error | Torch-Pruning | most filters that stay, stay because |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        if "error" in r:
            why = "; ".join(f"{reason} ({count})" for reason, count in r["reasons"])
            cells = [r["units"], f"{r['share']:.1%}", f"{r['seconds']:.2f}", f"{r['error']:.0e}", r["peer"], why]
        else:
            cells = ["", "", "", r["failure"], r.get("peer", "-"), ""]
        lines.append("| " + " | ".join([name, *map(str, cells)]) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="docs/coverage.md")
    parser.add_argument("--only", default="*")
    parser.add_argument("--one", nargs=2)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(measure(*options.one)))
        return
    kept = Path(options.out).with_suffix(".json")
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in fnmatch.filter(names(), options.only):
        if name in results and options.only == "*":
            continue
        command = [sys.executable, __file__, "--one", *name.split()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            last = (done.stderr.strip().splitlines() or ["killed"])[-1]
            results[name] = json.loads(line[7:]) if line else {"failure": last[:160]}
        except subprocess.TimeoutExpired:
            results[name] = {"failure": "not done after 300 s"}
        print(name, {k: v for k, v in results[name].items() if k != "reasons"}, flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(results, indent=1))
    ordered = {name: results[name] for name in names() if name in results}
    Path(options.out).write_text(table(ordered))


if __name__ == "__main__":
    main()
