"""Bars of one shape of a record: `python -m bench.plot [bench/results/cpu-2-cores/head.json]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

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
    """The figure of `shape`, by default the first one of the record."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the record's figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("record", type=Path, nargs="?", help="this device's by default")
    parser.add_argument("--shape", metavar="N,D,V", help="the record's first by default")
    parser.add_argument("--out", type=Path, help="docs/figures/head-DEVICE.png by default")
    options = parser.parse_args(arguments)
    shape = [int(size) for size in options.shape.split(",")] if options.shape else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = options.record or RESULTS / device_slug(device) / "head.json"
    data = json.loads(record.read_text(encoding="utf-8"))
    out = options.out or Path("docs/figures") / f"head-{data['environment']['slug']}.png"
    figure = draw(data, shape)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    plt.close(figure)
    print(out)


if __name__ == "__main__":
    main()
