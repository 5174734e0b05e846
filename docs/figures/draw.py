"""Draw the pictures of README.md and docs/ into this folder: `python docs/figures/draw.py`.

results.svg, criteria.svg and oracle.svg show measured.json, in which each figure stands with the command that measured it;
units.svg and flow.svg show what the words mean. Needs matplotlib. Equal input gives equal files.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
INK, GREY, BLUE, ORANGE, PALE = "#222222", "#9aa0a6", "#1f6feb", "#d9730d", "#eef1f5"
plt.rcParams |= {
    "svg.hashsalt": "taylored",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


def save(figure, name):
    figure.savefig(HERE / name, facecolor="white", bbox_inches="tight", pad_inches=0.08, metadata={"Date": None})
    plt.close(figure)


def bars(axes, title, labels, values, texts, colours):
    axes.barh(range(len(values)), values, color=colours, height=0.62)
    axes.set_yticks(range(len(values)), labels)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlim(0, max(values) * 1.28)
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.text(value + max(values) * 0.02, i, text, va="center")


def results(measured):
    """Before and after on photographs; the cut beside a peer's; criteria beside the oracle."""
    figure, axes = plt.subplots(2, 3, figsize=(9.4, 4.4), gridspec_kw={"height_ratios": (1, 2)}, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    photographs, pair = measured["photographs"], ("before", "after")
    for ax, title, key, form in (
        (axes[0, 0], "test accuracy", "accuracy_percent", "{:.2f}%"),
        (axes[0, 1], "FLOPs per image", "mflops", "{:.0f} M"),
        (axes[0, 2], "time per image, batch 8", "ms_per_image_batch_8", "{:.1f} ms"),
    ):
        values = photographs[key]
        bars(ax, title, pair, values, [form.format(v) for v in values], [GREY, BLUE])
    resnet = measured["resnet50"]
    labels, values = ["taylored", "Torch-Pruning"] * 2, [*resnet["cut_ms"].values(), *resnet["trace_ms"].values()]
    labels = [f"{name}, {what}" for name, what in zip(labels, ("cut", "cut", "graph", "graph"), strict=True)]
    bars(axes[1, 0], "ResNet-50: time", labels, values, [f"{v:g} ms" for v in values], [BLUE, GREY] * 2)
    rows = measured["oracle"]["rows"]
    values = [row["float32"] for row in rows]
    labels = [row["model"].split(",")[0] for row in rows]
    bars(axes[1, 1], "oracle: speed over brute force", labels, values, [f"{v:.1f}x" for v in values], [BLUE] * 4)
    chosen = ("Taylor, batch", "Taylor", "OBD", "act. s.d.", "weight L2", "random")
    names, rho = measured["criteria"]["names"], measured["criteria"]["photographs, EfficientNet-Lite0"]["per group"]
    values = [rho[names.index(name)] for name in chosen]
    colours = [BLUE, BLUE, *[GREY] * 4]
    bars(axes[1, 2], "rho with the oracle, per group", chosen, values, [f"{v:.2f}" for v in values], colours)
    save(figure, "results.svg")


def criteria(measured):
    names = measured["criteria"]["names"]
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.9), sharey=True, layout="constrained")
    for ax, data in zip(axes, ("CIFAR-10, VGG16-BN", "photographs, EfficientNet-Lite0"), strict=True):
        for offset, kind, colour in ((-0.2, "per group", BLUE), (0.2, "all units, L2", ORANGE)):
            values = measured["criteria"][data][kind]
            ax.barh([i + offset for i in range(len(names))], values, height=0.38, color=colour, label=kind)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlim(-0.1, 1)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_title(data)
        ax.set_xlabel("Spearman's rho with the oracle")
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, loc="lower right")
    save(figure, "criteria.svg")


def oracle(measured):
    rows = measured["oracle"]["rows"]
    figure, ax = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    kinds = (
        ("flops_allow", "what the FLOPs allow", GREY),
        ("float32", "replay, float32", BLUE),
        ("bfloat16", "replay, bfloat16", ORANGE),
    )
    for n, (key, label, colour) in enumerate(kinds):
        ax.barh(
            [i + (n - 1) * 0.26 for i in range(len(rows))], [row[key] for row in rows], height=0.25, color=colour, label=label
        )
        for i, row in enumerate(rows):
            ax.text(row[key] + 0.1, i + (n - 1) * 0.26, f"{row[key]:g}x", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [row["model"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("times as fast as the whole model once per unit, one thread")
    ax.legend(frameon=False, loc="lower right")
    save(figure, "oracle.svg")


def box(ax, x, y, width, height, text, colour=PALE, edge=GREY, size=9):
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", facecolor=colour, edgecolor=edge)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(ax, start, end, colour=INK, bend=0.0):
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour, linewidth=1, connectionstyle=style)
    )


def canvas(width, height):
    figure, ax = plt.subplots(figsize=(width, height))
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, ax


def stripes(ax, x, y, colours, width=0.34, height=0.2, vertical=True):
    for i, colour in enumerate(colours):
        corner = (x, y - i * height) if vertical else (x + i * height, y)
        size = (width, height) if vertical else (height, width)
        ax.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="white", linewidth=1))


def units():
    """A residual block: which channels are one unit."""
    figure, ax = canvas(9.4, 4.3)
    trunk, inner = [BLUE, *["#c8d9f5"] * 3], ["#f5dfc8", ORANGE, *["#f5dfc8"] * 2]
    for x, name, colours, under in (
        (0.3, "stem", trunk, "filters"),
        (2.9, "conv1", inner, "filters"),
        (5.2, "conv2", trunk, "filters"),
    ):
        box(ax, x, 2.05, 1.2, 1.05, "", PALE)
        ax.text(x + 0.32, 2.9, name, ha="center", va="center", fontsize=10)
        stripes(ax, x + 0.72, 2.78, colours)
        ax.text(x + 0.32, 2.3, under, ha="center", fontsize=9, color="#5f6368")
    ax.add_patch(plt.Circle((7.25, 2.57), 0.17, facecolor="white", edgecolor=INK))
    ax.text(7.25, 2.56, "+", ha="center", va="center", fontsize=12)
    box(ax, 8.05, 2.05, 1.1, 1.05, "head", PALE)
    arrow(ax, (1.5, 2.57), (2.9, 2.57))
    arrow(ax, (4.1, 2.57), (5.2, 2.57))
    arrow(ax, (6.4, 2.57), (7.08, 2.57))
    arrow(ax, (7.42, 2.57), (8.05, 2.57))
    ax.plot([2.1, 2.1, 7.25], [2.57, 3.6, 3.6], color=INK, linewidth=1)
    arrow(ax, (7.25, 3.6), (7.25, 2.75))
    ax.text(4.7, 3.72, "residual sum: stem's and conv2's channels meet, they are the same units", ha="center", fontsize=10)
    ax.add_patch(Rectangle((0.3, 1.32), 0.2, 0.2, facecolor=BLUE))
    ax.text(
        0.6,
        1.42,
        "a unit of the trunk: one filter of stem and one of conv2; its consumers are conv1 and head",
        va="center",
        fontsize=10,
    )
    ax.add_patch(Rectangle((0.3, 0.92), 0.2, 0.2, facecolor=ORANGE))
    ax.text(0.6, 1.02, "a unit of conv1: one filter; its consumer is conv2", va="center", fontsize=10)
    ax.text(
        0.3,
        0.45,
        "To remove a unit is to zero it where its consumers read it (bars of its colour).",
        fontsize=10,
    )
    for x in (2.72, 7.87):
        ax.plot([x, x], [2.42, 2.72], color=BLUE, linewidth=3)
    ax.plot([5.02, 5.02], [2.42, 2.72], color=ORANGE, linewidth=3)
    save(figure, "units.svg")


def flow():
    """What goes in, what comes out, and who makes it."""
    figure, ax = canvas(9.4, 3.9)
    steps = (
        (0.15, "trace", "model,\nexample inputs", "ChannelGraph"),
        (2.5, "TaylorScorer\nor oracle", "batches,\nloss", "scores"),
        (4.85, "make_plan", "budget", "PrunePlan"),
        (7.2, "compact", "model, optimizer,\naverages", "all of them,\nsmaller, in place"),
    )
    for x, name, given, made in steps:
        box(ax, x, 1.75, 1.6, 0.8, name, "#dfe9fb", BLUE)
        ax.text(x + 0.8, 3.35, given, ha="center", va="center", fontsize=10)
        arrow(ax, (x + 0.8, 3.08), (x + 0.8, 2.58))
        ax.text(x + 0.8, 0.95, made, ha="center", va="center", fontsize=10, weight="bold")
        arrow(ax, (x + 0.8, 1.72), (x + 0.8, 1.2))
    for x in (1.75, 4.1, 6.45):
        arrow(ax, (x, 1.0), (x + 0.72, 1.85))
    arrow(ax, (7.1, 0.55), (0.95, 0.55), GREY)
    ax.text(4.1, 0.3, "train on; another round traces the smaller model", ha="center", fontsize=10, color="#5f6368")
    save(figure, "flow.svg")


if __name__ == "__main__":
    measured = json.loads((HERE / "measured.json").read_text())
    results(measured)
    criteria(measured)
    oracle(measured)
    units()
    flow()
