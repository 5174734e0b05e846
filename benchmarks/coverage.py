"""Which models can be pruned, how much of them, and how exactly: torchvision's and timm's convolutional families, and networks
of other libraries (coverage_libraries.py).

Each model, its normalisation statistics randomised, is traced (median of three times), which must leave its parameters, buffers
and outputs as they were, bit for bit. Three random plans (20, 50 and 80% of every group) are applied to copies of it, whose
outputs are compared with those of the masked model: max|compacted - masked| / max|masked|, the worst of all outputs; where that
is large, `taylored.verify` says whether the model amplifies rounding. Detectors are traced whole; as their post-processing picks
other boxes where two are equal to the last digit, what is compared is the output of every head, on fixed boxes.

Beside torchvision's and timm's, where it is installed, Torch-Pruning removes 30% of every layer but the outputs, at random;
the result must run, and is compared with the original in which what was cut is zeroed at the inputs of the layers that lost it.
Each measurement has a process of its own, and at most 300 seconds. Results are kept beside the table as JSON, and
only what is missing there is measured, or what --only names.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py --out docs/coverage.md [--only PATTERN]
"""

import argparse
import collections
import copy
import fnmatch
import json
import multiprocessing
import re
import statistics
import sys
import time
import warnings
from pathlib import Path

import coverage_libraries
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import taylored
from taylored._modules import CONVOLUTIONS

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from models import randomised

TOLERANCE = 1e-4
RATIOS = (0.2, 0.5, 0.8)
HARD_CODED = "the model does not run with fewer channels (is a channel count hard-coded?):"
TRANSFORMERS = "vit_b_16 swin_t maxvit_t mvit_v1_b swin3d_t"
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
DETECTION = """fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn
    retinanet_resnet50_fpn fcos_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large"""
VIDEO, FLOW = "r3d_18 mc3_18 r2plus1d_18 s3d", "raft_small raft_large"
TIMM = """resnet18 resnet50d seresnet50 skresnet18 ecaresnet26t resnest14d resnetaa50 resnetblur50 resnetv2_50 resnext26ts
    gcresnet33ts wide_resnet50_2 regnetx_002 regnety_002 regnetz_b16 res2net50_14w_8s res2next50 dla34 dla60x hrnet_w18_small
    vovnet39a ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53 nfnet_l0 eca_nfnet_l0 nf_resnet50 repvgg_a0 ghostnet_050
    ghostnetv2_100 ghostnetv3_050 mixnet_s hardcorenas_a mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium
    efficientnet_b0 tf_efficientnetv2_b0 efficientnet_lite0 convnext_atto convnextv2_atto mobileone_s0 fastvit_t8
    inception_next_atto inception_v4 inception_resnet_v2 legacy_xception xception41p selecsls42 tresnet_m rexnet_100 levit_128s
    levit_conv_128s densenet121 dpn48b mnasnet_small semnasnet_075 fbnetc_100 lcnet_050 tinynet_e spnasnet_100 botnet26t_256
    halonet26t lambda_resnet26t visformer_tiny edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientformer_l1
    efficientformerv2_s0 efficientvit_b0 efficientvit_m0 poolformer_s12 convmixer_768_32 repghostnet_050 repvit_m0_9 starnet_s1
    hgnet_tiny hgnetv2_b0 focalnet_tiny_srf coat_tiny tiny_vit_5m_224 vgg11_bn sequencer2d_s vit_tiny_patch16_224
    deit_tiny_patch16_224 swin_tiny_patch4_window7_224 mixer_s32_224 davit_tiny maxvit_tiny_tf_224 nextvit_small fasternet_t0
    shvit_s1 swiftformer_xs rdnet_tiny mambaout_femto nasnetalarge pnasnet5large"""


def names():
    from torchvision import models

    attention = ("vit", "swin", "maxvit", "regnet_y_128gf")  # one of each is listed below; regnet_y_128gf has 2.6 GB
    found = [n for n in models.list_models(module=models) if not n.startswith(attention)]
    found += " ".join((SEGMENTATION, DETECTION, VIDEO, FLOW, TRANSFORMERS)).split()
    return [f"torchvision {n}" for n in found] + [f"timm {n}" for n in TIMM.split()] + coverage_libraries.names()


class Heads(nn.Module):
    """What the heads of a detector say, those for regions of interest on fixed boxes."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        maps = self.detector.backbone(images)
        if not hasattr(self.detector, "rpn"):
            return self.detector.head(list(maps.values()))
        said, heads = [self.detector.rpn.head(list(maps.values()))], self.detector.roi_heads
        boxes = [images.new_tensor([[8.0, 8.0, 120.0, 90.0], [0.0, 30.0, 60.0, 150.0]])] * len(images)
        for kind in ("box", "mask", "keypoint"):
            if (pool := getattr(heads, f"{kind}_roi_pool", None)) is not None:
                regions = pool(maps, boxes, [tuple(images.shape[-2:])] * len(images))
                said.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(regions)))
        return said


def build(source, name):
    """The model, its inputs, and a module that gives the outputs to compare."""
    torch.manual_seed(0)
    if source in coverage_libraries.NETS:
        model, inputs = coverage_libraries.build(source, name)
        return model, inputs, model
    x = torch.randn(4, 3, 160, 160)
    if source == "timm":
        import timm

        model = timm.create_model(name)
        x = torch.randn(4, 3, *model.default_cfg["input_size"][1:]) if model.default_cfg.get("fixed_input_size") else x
        x = torch.randn(4, 3, 256, 256) if name.startswith(("halonet", "mobilevit", "davit")) else x
        return model, x, model
    from torchvision import models

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"weights_backbone": None} if name in f"{SEGMENTATION} {DETECTION}".split() else {}
    options |= {"min_size": 160, "max_size": 160} if name in DETECTION.split() and "ssd" not in name else {}
    model = models.get_model(name, weights=None, **options)
    if name in DETECTION.split():
        size = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 160)
        return model, torch.rand(4, 3, size, size), Heads(model)
    if name in FLOW.split():
        return model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)), model
    sizes = {"inception_v3": (299, 299), **dict.fromkeys(("vit_b_16", "swin_t", "maxvit_t"), (224, 224))}
    sizes |= dict.fromkeys(("s3d", "mvit_v1_b", "swin3d_t"), (16, 224, 224))
    sizes |= dict.fromkeys(("r3d_18", "mc3_18", "r2plus1d_18"), (8, 64, 64))
    x = torch.randn(1 if len(sizes.get(name, ())) == 3 else 4, 3, *sizes.get(name, (160, 160)))
    return model, x, model


class Unpacked(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)


def prepared(source, name):
    warnings.simplefilter("ignore")
    model, inputs, speaker = build(source, name)
    randomised(Unpacked(speaker).eval(), inputs)
    inputs = inputs if isinstance(inputs, tuple) else inputs[:2]
    example = ([inputs[0]],) if isinstance(speaker, Heads) else inputs
    return model, example, speaker, inputs


def outputs(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.double() for t in tree_leaves(Unpacked(model)(inputs)) if isinstance(t, torch.Tensor)]


def difference(found, expected) -> float:
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True))


def measure(source, name) -> dict:
    model, example, speaker, inputs = prepared(source, name)
    state, said, times = copy.deepcopy(model.state_dict()), outputs(speaker, inputs), []
    for _ in range(3):
        start = time.perf_counter()
        graph = taylored.trace(model, example)
        times.append(time.perf_counter() - start)
    pairs = [*zip(state.values(), model.state_dict().values(), strict=True), *zip(said, outputs(speaker, inputs), strict=True)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), "the trace changed the model"
    errors, verdict = [], ""
    for seed, ratio in enumerate(RATIOS):
        plan = taylored.random_plan(graph, ratio, seed)
        with taylored.masked(model, graph, plan):
            expected = outputs(speaker, inputs)
        pruned, pruned_speaker = copy.deepcopy((model, speaker))
        taylored.compact(pruned, plan)
        errors.append(difference(outputs(pruned_speaker, inputs), expected))
        if errors[-1] > TOLERANCE:
            found = taylored.verify(model, plan, example)
            verdict = found.unproven or f"{found.difference:.0e} in {found.dtype}"
    reasons = collections.Counter()
    for layer in graph.layers.values():
        if layer.is_convolution:
            without = "its only filter" if len(layer.filters) == 1 else layer.unlabelled
            found = (graph.frozen.get(int(c), without if c < 0 else None) for c in layer.filters)
            reasons.update(
                re.sub(r" \(\S*:\d+\)|\S*/|,? in ('.*?'|the model's own forward)| '.*?'|: taylored.*", "", r)
                for r in found
                if r is not None
            )
    row = {"units": graph.units, "filters": graph.filters, "prunable": int(graph.prunable_filters)}
    row |= {"seconds": statistics.median(times), "error": max(errors), "reasons": reasons.most_common(2)}
    row |= {"verdict": verdict} if verdict else {}
    return row | ({"version": coverage_libraries.version(source)} if source in coverage_libraries.NETS else {})


def peer(source, name) -> dict:
    try:
        import torch_pruning as tp
    except ImportError:
        return {}
    _, _, model, inputs = prepared(source, name)
    original, alive = copy.deepcopy(model), {}
    expected = outputs(model, inputs)
    layers = {m: n for n, m in model.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))}
    widths = {t.shape[d] for t in expected for d in (1, -1) if t.ndim > 1}
    ignored = [m for m in layers if getattr(m, "out_features", getattr(m, "out_channels", None)) in widths]
    try:
        importance = tp.importance.RandomImportance()
        pruner = tp.pruner.BasePruner(Unpacked(model), {"inputs": inputs}, importance, pruning_ratio=0.3, ignored_layers=ignored)
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                layer = dependency.target.module
                if layer in layers and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                    size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
                    left = alive.setdefault(layers[layer], list(range(size)))
                    alive[layers[layer]] = [c for i, c in enumerate(left) if i not in set(indices)]
            group.prune()
        found = outputs(model, inputs)
    except Exception as error:  # whatever it is, it is the finding
        return {"peer": f"fails: {type(error).__name__}"}
    for layer, left in alive.items():
        original.get_submodule(layer).register_forward_pre_hook(zeroing(left))
    return {"peer": "runs", "peer_error": difference(found, outputs(original, inputs))}


def zeroing(left):
    def hook(module, args):
        x = args[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0)
        kept = torch.zeros_like(x)
        kept[left] = x[left]
        return kept.movedim(0, -1 if isinstance(module, nn.Linear) else 1)

    return hook


def apart(kind, name) -> dict:
    """The result of one measurement in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(globals()[kind], name.split(" ", 1)).get(300)
        except multiprocessing.TimeoutError:
            return {kind: "fails: not done in 300 s"}
        except Exception as error:  # whatever it is, it is the finding
            return {kind: f"fails: {type(error).__name__}: {error}"[:300]}


def facts(results) -> str:
    ok = [r for r in results.values() if "error" in r]
    exact = sum(r["error"] <= TOLERANCE for r in ok)
    shares, times = [r["prunable"] / r["filters"] for r in ok if r["filters"]], [r["seconds"] for r in ok]
    idle = sum(not r["units"] for r in ok)
    long = [f"{name} {r['seconds']:.1f}" for name, r in results.items() if r.get("seconds", 0) > 1]
    return (
        f"{len(results)} models: {len(ok)} trace and compact, {exact} of them exactly (to {TOLERANCE:g}; {idle} of these have "
        f"nothing to remove). Of the median model {statistics.median(shares):.1%} of the convolutions' filters can be removed; "
        f"of {sum(s >= 0.9 for s in shares)} models at least 90%. A trace takes {statistics.median(times):.2f} s in the median. "
        f"More than one second take {', '.join(long) or 'none'}."
    )


def rows(results, peer: bool) -> list[str]:
    columns = ["model", "units", "prunable", "trace, s", "error", *(["Torch-Pruning"] if peer else [])]
    lines = [f"| {' | '.join(columns)} | most filters that stay, stay because |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | " + ("--- | " if peer else "") + "--- |")
    for name, r in results.items():
        cells = ["", "", "", r.get("measure", "")]
        if "error" in r:
            cells = [r["units"], f"{r['prunable'] / max(r['filters'], 1):.1%}", f"{r['seconds']:.2f}", f"{r['error']:.0e}"]
        if peer:
            cells.append(r.get("peer", "") + (f", {r['peer_error']:.0e}" if "peer_error" in r else ""))
        shorter = ((reason.replace(HARD_CODED, "hard-coded count:"), count) for reason, count in r.get("reasons", ()))
        why = "; ".join([*([r["verdict"]] if "verdict" in r else []), *(f"{reason} ({count})" for reason, count in shorter)])
        lines.append("| " + " | ".join([name, *map(str, cells), why]) + " |")
    return lines


def table(results) -> str:
    others = {name: r for name, r in results.items() if name.split()[0] in coverage_libraries.NETS}
    ours = {name: r for name, r in results.items() if name not in others}
    peers = [r for r in ours.values() if "peer" in r]
    ran, same = sum(r["peer"] == "runs" for r in peers), sum(r.get("peer_error", 1) <= TOLERANCE for r in peers)
    versions = dict.fromkeys(r["version"] for r in others.values() if "version" in r)
    lines = [
        "# Which models can be pruned",
        "",
        f"{facts(ours)} Counts that are hard-coded are found one after the other. "
        f"Torch-Pruning 1.6.1 was tried on {len(peers)}: {ran} run, {same} of them exactly.",
        "",
        f"Made by `python benchmarks/coverage.py`, which says how (one CPU thread, torch {torch.__version__.split('+')[0]}). "
        "Error: the worst of three random plans. Torch-Pruning: whether the model runs with 30% of every layer but the "
        "outputs gone, and how far it is from the original with the same channels zeroed. The times are of an earlier run, on a "
        "quieter machine, than errors and reasons. [Other libraries](#other-libraries).",
        "",
        *rows(ours, peer=True),
        "",
        "## Other libraries",
        "",
        f"{facts(others)} Why: a model that looks at its data is computed for real (HDemucs), one whose forward asks in which "
        "mode it is runs in both (EfficientNet, DAF3D), and counts that are hard-coded are found one after the other.",
        "",
        f"Small configurations with random weights ({', '.join(versions)}), which `benchmarks/coverage_libraries.py` lists; "
        "measured and put here by the same command, beside other work on the same machine.",
        "",
        *rows(others, peer=False),
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--only")
    parser.add_argument("--without-peer", action="store_true", help="keep what is known of Torch-Pruning")
    options = parser.parse_args()
    kept = Path(options.out).with_suffix(".json")
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in fnmatch.filter(names(), options.only or "*"):
        if options.only or name not in results:
            if other := name.split()[0] in coverage_libraries.NETS:
                coverage_libraries.load(name.split()[0])  # once for all its networks
            old = {k: v for k, v in results.get(name, {}).items() if k.startswith("peer")}
            results[name] = apart("measure", name) | (old if options.without_peer or other else apart("peer", name))
            print(name, results[name], flush=True)
            kept.write_text(json.dumps(results, indent=1))
    Path(options.out).write_text(table({name: results[name] for name in names() if name in results}))


if __name__ == "__main__":
    main()
