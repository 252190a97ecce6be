"""Draw the figure of a record: `python -m bench.plot [bench/results/cpu-2-cores/head.json]`.

Bars of one shape of `head.json`; lines over the number of groups of `losses.json`; measured and
planned memory of the cases of `long_context.json`; tokens a second of those of `step.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter

from bench.contenders import OURS
from bench.harness import RESULTS, device_slug

PANELS = {
    ("logps", "frozen"): "log-probs, forward + backward\nfrozen head",
    ("logps", "trained"): "log-probs, forward + backward\ntrained head",
    ("dpo", "frozen"): "DPO step over the head\nfrozen head",
    ("dpo", "trained"): "DPO step over the head\ntrained head",
}
# Okabe-Ito blue against grey: told apart in every form of colour blindness and in print.
BLUE, GREY, INK = "#0072B2", "#B8BEC6", "#24292F"


def _panel(axes: plt.Axes, case: dict, title: str) -> None:
    timed = {n: c for n, c in case["contenders"].items() if "seconds" in c}
    peers = sorted((n for n in timed if n != OURS), key=lambda n: timed[n]["times_ours"]["median"])
    names = [OURS, *peers]
    medians = [timed[n]["seconds"]["median"] for n in names]
    spread = [
        [timed[n]["seconds"]["median"] - timed[n]["seconds"]["q25"] for n in names],
        [timed[n]["seconds"]["q75"] - timed[n]["seconds"]["median"] for n in names],
    ]
    colours = [BLUE, *[GREY] * len(peers)]
    axes.barh(names, medians, xerr=spread, color=colours, error_kw={"ecolor": INK, "lw": 0.8})
    for row, name in enumerate(names):
        label = f"{timed[name]['times_ours']['median']:.1f}x" if row else "1x"
        if "peak_extra_bytes" in timed[name]:
            label += f"   {timed[name]['peak_extra_bytes'] / 2**20:.0f} MiB"
        end = timed[name]["seconds"]["q75"]
        axes.annotate(label, (end, row), (5, 0), textcoords="offset points", va="center", size=8)
    limit = case["limit"]["seconds"]["median"]
    axes.axvline(limit, color=INK, lw=0.8, ls=":")
    axes.set_title(title, size=9, loc="left", color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(timed[n]["seconds"]["q75"] for n in names) * 1.42)
    axes.tick_params(labelsize=8, length=0, axis="y")
    axes.tick_params(labelsize=8, axis="x")
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw(data: dict, shape: list[int] | None = None) -> plt.Figure:
    """Draw the figure of `shape`, by default the first one of the record."""
    shape = shape or data["cases"][0]["key"]["shape"]
    found = {
        (c["key"]["task"], c["key"]["mode"]): c
        for c in data["cases"]
        if c["key"]["shape"] == shape and (c["key"]["task"], c["key"]["mode"]) in PANELS
    }
    plt.rcParams["svg.fonttype"] = "none"
    figure, grid = plt.subplots(2, 2, figsize=(8.6, 5.2), layout="constrained")
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        if panel not in found:
            axes.axis("off")
            continue
        _panel(axes, found[panel], PANELS[panel])
    for axes in grid[1]:
        axes.set_xlabel("seconds", size=8)
    first, stamp = next(iter(found.values())), data["environment"]
    (n, d, v), versions = shape, [f"{k} {stamp[k]}" for k in ("torch", "trl", "liger-kernel")]
    figure.supxlabel(
        f"N {n} label tokens, D {d}, V {v}, {first['key']['dtype']}; {stamp['device']}, "
        f"{stamp['threads']} threads; {', '.join(versions)}; {first['date']}.\n"
        f"Median and quartiles of {data['method']['rounds']} interleaved rounds; x: time next to "
        "fastpo's in the same round; MiB: peak beyond the inputs,\ngradients included. Dotted: the "
        "matrix products that no method can do without, as bare torch.mm.",
        size=7.5,
        color=INK,
    )
    return figure


def draw_losses(data: dict) -> plt.Figure:
    """Draw microseconds over the number of groups, a panel for every objective and K >= 2.

    A record with a single number of groups everywhere gets points.
    """
    panels: dict[str, list[dict]] = {}
    for case in data["cases"]:
        title = f"{case['key']['objective']}, K = {case['key']['candidates']}"
        panels.setdefault(title, []).append(case)
    longer = {title: cases for title, cases in panels.items() if len(cases) > 1}
    panels = longer or panels
    colours = {"fused": BLUE, "eager": GREY, "torch.compile": INK}
    plt.rcParams["svg.fonttype"] = "none"
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.9 * columns, 2.3 * rows + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, cases) in zip(grid.flat, panels.items(), strict=False):
        for who, colour in colours.items():
            timed = [
                (case["key"]["groups"], 1e6 * case["contenders"][who]["seconds"]["median"])
                for case in cases
                if "seconds" in case["contenders"].get(who, {})
            ]
            if timed:
                line = zip(*sorted(timed), strict=True)
                axes.loglog(*line, "o-", color=colour, lw=1.5, ms=3, label=who)
        axes.set_title(title, size=9, loc="left", color=INK)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=8)
    stamp = data["environment"]
    figure.supylabel("microseconds, loss and gradient", size=8)
    figure.supxlabel(
        f"groups; {stamp['device']}, {stamp['threads']} threads; torch {stamp['torch']}; "
        f"{data['cases'][0]['date']}; median of {data['method']['rounds']} interleaved rounds",
        size=7.5,
        color=INK,
    )
    return figure


def draw_contexts(data: dict) -> plt.Figure:
    """Draw the peak of a step, measured and planned, a pair of bars for every case that fits."""
    cases = [case for case in data["cases"] if case["fits"]]
    names = []
    for case in cases:
        key = case["key"]
        levers = [name for name in ("mlp_tile", "offload") if key.get(name)]
        what = f"{key['context'] // 1024}K, K = {key['candidates']}, {key['method']}"
        names.append(f"{what}\n{' + '.join(levers) or 'no lever'}")
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(cases) + 1.1), layout="constrained")
    parts = (("measured", "peak_extra_bytes", BLUE), ("planned", "predicted_extra_bytes", GREY))
    for offset, (label, part, colour) in zip((-0.2, 0.2), parts, strict=True):
        places = [row + offset for row in range(len(cases))]
        sizes = [case[part] / 2**30 for case in cases]
        axes.barh(places, sizes, 0.38, color=colour, label=label)
    axes.set_yticks(range(len(cases)), names, size=8)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    stamp = data["environment"]
    axes.set_xlabel(
        f"peak of a step in GiB; {stamp['device']}, {stamp['threads']} threads; torch "
        f"{stamp['torch']}; {cases[0]['date']}",
        size=7.5,
        color=INK,
    )
    return figure


def draw_steps(data: dict) -> plt.Figure:
    """Draw distinct tokens a second of all contenders that have a speed, a panel for every case."""
    cases = data["cases"]
    size = (7.2, 0.9 * len(cases) + 0.9)
    figure, grid = plt.subplots(len(cases), 1, figsize=size, layout="constrained", squeeze=False)
    for axes, case in zip(grid.flat, cases, strict=True):
        timed = {n: c for n, c in case["contenders"].items() if "seconds" in c}
        speeds = [c["tokens_per_second"] for c in timed.values()]
        axes.barh(list(timed), speeds, color=[BLUE if n == OURS else GREY for n in timed])
        for row, contender in enumerate(timed.values()):
            label = ""
            if row and "times_ours" in contender:
                label = f"{contender['times_ours']['median']:.1f}x the time"
            if "peak_extra_bytes" in contender:
                label += f"   {contender['peak_extra_bytes'] / 2**20:.0f} MiB"
            place = (speeds[row], row)
            axes.annotate(label, place, (5, 0), textcoords="offset points", va="center", size=7)
        key = case["key"]
        title = f"prompt {key['prompt']}, responses {key['candidates']} x {key['response']}"
        axes.set_title(title, size=8, loc="left", color=INK)
        axes.set_xlim(0, max(speeds) * 1.3)
        axes.invert_yaxis()
        axes.tick_params(labelsize=7, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    stamp = data["environment"]
    grid[-1, 0].set_xlabel(
        f"distinct tokens/s; {stamp['device']}, {stamp['threads']} threads; torch "
        f"{stamp['torch']}, trl {stamp['trl']}; {cases[0]['date']}",
        size=7.5,
        color=INK,
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the record's figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("record", type=Path, nargs="?", help="a file, or `losses`: this device's")
    parser.add_argument("--shape", metavar="N,D,V", help="the record's first by default")
    parser.add_argument("--out", type=Path, help="docs/figures/RECORD-DEVICE.png by default")
    options = parser.parse_args(arguments)
    shape = [int(size) for size in options.shape.split(",")] if options.shape else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = options.record or Path("head")
    if not record.suffix:
        record = RESULTS / device_slug(device) / f"{record}.json"
    data = json.loads(record.read_text(encoding="utf-8"))
    out = options.out or Path("docs/figures") / f"{record.stem}-{data['environment']['slug']}.png"
    if "context" in data["cases"][0]["key"]:
        figure = draw_contexts(data)
    elif "prompt" in data["cases"][0]["key"]:
        figure = draw_steps(data)
    elif "objective" in data["cases"][0]["key"]:
        figure = draw_losses(data)
    else:
        figure = draw(data, shape)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    plt.close(figure)
    print(out)


if __name__ == "__main__":
    main()
