"""What a pruning run came to: a table for the terminal and one self-contained HTML page with its pictures inline.

In: the summary (summary.json), the history that `taylored.prune` returns, and the plan. Figures are SVG; only the dots
of the score picture are pixels, since a wide network has tens of thousands of units.
"""

import html
import io
import math
import os
from pathlib import Path

from taylored._files import write_atomically
from taylored._plan import PrunePlan
from taylored._tables import text_table

BLUE, ORANGE, GREY, LIGHT, INK = "#0072B2", "#D55E00", "#8A8F98", "#DFE3E8", "#22262B"  # Okabe and Ito's blue and vermilion
ROW = 0.19  # inches per group


def rows(summary: dict) -> list[tuple[str, str, str, str]]:
    """(quantity, before, after, change) of everything that was measured before and after."""
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    table = [("accuracy", f"{before:.2%}", f"{after:.2%}", f"{100 * (after - before):+.2f} points")]
    for key, name, unit in (
        ("flops", "FLOPs per image", ""),
        ("params", "parameters", ""),
        ("units", "units", ""),
        ("latency_ms", "latency per image", " ms"),
    ):
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        old, new = (f"{v:.3g}{unit}" if unit else f"{v}" if key == "units" else short(v) for v in (before, after))
        change = f"{before / after:.2f}x as fast" if unit else f"{after / before:.1%} left"
        table.append((name, old, new, change))
    return table


def table(summary: dict) -> str:
    """The rows as text, in columns."""
    return text_table(("", "before", "after", "change"), rows(summary))


def short(number: float) -> str:
    """3 significant digits and the SI letter: 4830000 -> 4.83 M."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{f'{number / size:#.3g}'.rstrip('.')} {letter}"
    return f"{number:.3g}"


def write(summary: dict, history: list[dict], plan: PrunePlan, path: str | os.PathLike) -> None:
    """Write the page, atomically."""
    pictures = [
        (
            "Accuracy against FLOPs",
            "Each dot is the test accuracy at the end of a round, each ring that of a fine-tuning epoch.",
            tradeoff(history),
        ),
        (
            "Units per group",
            "A group is a set of channels that can stand in for each other; it is called after its first layer.",
            widths(plan),
        ),
    ]
    if any(event["event"] == "round" for event in history):
        pictures.append(
            (
                "Scores before the first cut",
                "One dot per unit: its Taylor score in the first round, divided by the group's L2 norm. Blue units stayed; "
                "orange ones were removed in this or a later round, on scores measured then.",
                scores(history, plan),
            )
        )
    write_atomically(Path(path), page(summary, history, pictures).encode())


def tradeoff(history: list[dict]) -> str:
    """Accuracy along the rounds, from all of the FLOPs on the left to the budget on the right."""
    figure, axes = canvas(7.2, 3.4)
    full = history[0]["flops"]
    rounds = [(100 * e["flops"] / full, 100 * e["accuracy"]) for e in history if e["event"] in ("start", "round")]
    tuned = [(100 * e["flops"] / full, 100 * e["accuracy"]) for e in history if e["event"] == "final_epoch"]
    axes.plot(*zip(*rounds, strict=True), "-o", color=BLUE, markersize=5, linewidth=1.6, zorder=3, clip_on=False)
    _mark(axes, rounds[0], f"original {rounds[0][1]:.2f}%", BLUE, "left")
    if tuned:
        axes.plot(*zip(*tuned, strict=True), "o", markerfacecolor="white", color=ORANGE, markersize=5, zorder=4, clip_on=False)
        axes.plot(*tuned[-1], "o", color=ORANGE, markersize=7, zorder=5, clip_on=False)
    last, color = (tuned[-1], ORANGE) if tuned else (rounds[-1], BLUE)
    _mark(axes, last, f"{'fine-tuned' if tuned else 'pruned'} {last[1]:.2f}%", color, "right")
    low, high = (edge(y for _, y in rounds + tuned) for edge in (min, max))
    span = max(high - low, 1.0)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.set_ylim(low - 0.15 * span, high + 0.25 * span)
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs left, % of the original")
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    return svg(figure, "accuracy against FLOPs along the rounds")


def _mark(axes, point, text, color, side):
    """A label above a point; `side` is where the point lies in the picture."""
    style = {"color": color, "fontsize": 9.5, "ha": side, "va": "bottom"}
    axes.annotate(text, point, xytext=(0, 9), textcoords="offset points", **style)


def widths(plan: PrunePlan) -> str:
    """Units of every group, before (light) and after (blue)."""
    names = list(plan.units)
    figure, axes = canvas(7.2, 0.9 + ROW * len(names))
    before, after = [plan.units[n] for n in names], [plan.kept[n] for n in names]
    place = range(len(names))
    axes.barh(place, before, height=0.74, color=LIGHT)
    axes.barh(place, after, height=0.74, color=BLUE)
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        axes.annotate(f"{a} of {b}", (b, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, max(before, default=1) * 1.14)
    label_rows(axes, names)
    axes.set_xlabel("units: kept (blue) and removed (grey)")
    return svg(figure, "units per group before and after")


def scores(history: list[dict], plan: PrunePlan) -> str:
    """The first round's scores of every group, one dot per unit, on a logarithmic scale, coloured by their fate."""
    from matplotlib.ticker import LogLocator, NullFormatter

    first = next(e for e in history if e["event"] == "round")["scores"]
    names = [n for n in plan.units if n in first]
    figure, axes = canvas(7.2, 1.0 + 1.6 * ROW * len(names))
    norms = {n: math.sqrt(sum(v * v for v in first[n])) or 1.0 for n in names}
    positive = sorted(v / norms[n] for n in names for v in first[n] if v > 0)
    floor = max(positive[len(positive) // 200], positive[-1] * 1e-6) if positive else 1e-6  # the rest piles up at the left edge
    size = 6 if max(len(first[n]) for n in names) <= 256 else 4
    for fate, color in ((True, BLUE), (False, ORANGE)):
        x, y = [], []
        for i, name in enumerate(names):
            removed = set(plan.removed[name].tolist()) if name in plan.removed else set()
            for unit, value in enumerate(first[name]):
                if (unit not in removed) == fate:
                    x.append(max(value / norms[name], floor))
                    y.append(i + 0.7 * (unit * 0.618034 % 1 - 0.5))  # spread within the row, the same in every run
        axes.plot(x, y, ".", color=color, markersize=size, alpha=0.65, markeredgewidth=0, rasterized=True)
        axes.plot([], [], "o", color=color, markersize=5, label="kept" if fate else "removed")
    axes.set_xscale("log")
    decades = math.log10(positive[-1] / floor) if positive else 0
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.hlines([i + 0.5 for i in range(len(names) - 1)], 0, 1, transform=axes.get_yaxis_transform(), color=LIGHT, linewidth=0.6)
    label_rows(axes, names)
    axes.grid(axis="x", color=LIGHT, linewidth=0.8)
    axes.set_xlabel("score / L2 norm of the group")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    return svg(figure, "scores of every group before the first cut")


def label_rows(axes, names):
    """One row per group, the network's first layer at the top."""
    shown = [n if len(n) <= 40 else f"...{n[-37:]}" for n in names]
    axes.set_yticks(range(len(names)), shown, fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def canvas(width, height, rows=1, columns=1):
    """A figure of so many inches and its axes, an array of them if there are several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.subplots(rows, columns)
    for each in figure.axes:
        each.set_facecolor("none")
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(GREY)
        each.tick_params(colors=INK, labelsize=9)
        each.set_axisbelow(True)
    return figure, axes


def svg(figure, label) -> str:
    """The figure as an <svg> element that can stand in a page beside others."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Every figure needs ids of its own: the page holds several.
    with rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22262B; background: #fff; }
body { max-width: 820px; margin: 40px auto; padding: 0 20px; }
h1 { font-size: 28px; margin: 0; }
h2 { font-size: 19px; margin: 44px 0 4px; }
p { margin: 0 0 12px; color: #555B64; }
table { border-collapse: collapse; width: 100%; margin: 24px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid #DFE3E8; }
th { font-weight: 500; color: #555B64; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.totals td:nth-child(3) { font-weight: 600; }
.log, dl { font-size: 14px; }
figure { margin: 0; }
svg { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; margin-top: 44px; }
"""


def page(summary: dict, history: list[dict], pictures) -> str:
    """The whole HTML page; pictures: (title, caption, svg)."""
    settings = summary["settings"]
    title = f"{settings['model']} on {Path(settings['data']).name}, tailored"
    left = summary["flops_after"] / summary["flops_before"]
    change = 100 * (summary["accuracy_after"] - summary["accuracy_before"])
    lead = f"{left:.0%} of the FLOPs, {change:+.2f} points of accuracy, in {duration(summary['seconds'])}."
    totals = html_table(("", "before", "after", "change"), rows(summary), "totals")
    log = html_table(("", "FLOPs", "parameters", "units", "loss", "accuracy", "seconds"), [_round(e) for e in history], "log")
    return document(title, lead, f"{totals}\n{figures(pictures)}\n<h2>Rounds</h2>\n{log}", settings)


def figures(pictures) -> str:
    """(title, caption, svg), one below the other."""
    return "\n".join(f"<h2>{html.escape(t)}</h2>\n<p>{html.escape(c)}</p>\n<figure>{svg}</figure>" for t, c, svg in pictures)


def document(title: str, lead: str, body: str, settings: dict) -> str:
    """A page that needs no other file. body is HTML; the rest is text."""
    terms = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in settings.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(lead)}</p>
{body}
<details><summary>Settings</summary><dl>{terms}</dl></details>
</body></html>
"""


def duration(seconds: float) -> str:
    """90 -> 1 min 30 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _round(event):
    name = {"start": "original", "round": f"round {event.get('round')}", "final_epoch": f"fine-tuning epoch {event.get('epoch')}"}
    loss = "" if event["loss"] is None else f"{event['loss']:.4f}"
    numbers = (
        short(event["flops"]),
        short(event["params"]),
        str(event["units"]),
        loss,
        f"{event['accuracy']:.2%}",
        f"{event['seconds']:.1f}",
    )
    return name[event["event"]], *numbers


def html_table(header, lines, kind) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
