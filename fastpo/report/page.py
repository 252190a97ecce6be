"""What a run leaves behind for people: report.html, one file that works offline.

It is drawn from the files of the run's folder, so it can be made again at any time, while the run
goes on, and by scripts that never saw `fastpo train`. `Page` has what it shows, page.html.j2 how.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastpo.report.chart import MANY, Series, chart
from fastpo.report.diagnosis import RunWarning, find_warnings
from fastpo.report.templates import fill
from fastpo.report.text import Metric, count, duration, metrics, setting, short
from fastpo.run.folder import REPORT, write_sealed
from fastpo.run.record import Run, Sample, Skipped, ends, finite, number

Table = list[tuple[str, str]]
"""(name, value) of every row."""


class Panel(NamedTuple):
    """Hold a chart of the report: (metric, label, tone) lines under a title and a reading aid."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    aid: str
    bounds: tuple[float, float] | None = None


PANELS = (
    Panel("Loss", (("loss", "train", "a"), ("eval_loss", "eval", "b")), "down is good"),
    Panel(
        "Accuracy",
        (("rewards/accuracies", "train", "a"), ("eval_rewards/accuracies", "eval", "b")),
        "share of pairs ranked right; 0.5 is chance",
        (0.0, 1.0),
    ),
    Panel(
        "Rewards",
        (("rewards/chosen", "chosen", "good"), ("rewards/rejected", "rejected", "bad")),
        "implicit rewards; chosen should not sink",
    ),
    Panel(
        "Margin",
        (("rewards/margins", "train", "a"), ("eval_rewards/margins", "eval", "b")),
        "chosen minus rejected reward",
    ),
    Panel(
        "Log-probability",
        (("logps/chosen", "chosen", "good"), ("logps/rejected", "rejected", "bad")),
        "nats a response; both sinking is a warning",
    ),
    Panel(
        "Distance from the reference",
        (("kl/chosen", "chosen", "good"), ("kl/rejected", "rejected", "bad")),
        "nats a response; kl_budget ends a run here",
    ),
    Panel("Gradient norm", (("grad_norm", "norm", "a"),), "spikes point at single rows"),
    Panel("Learning rate", (("learning_rate", "rate", "a"),), "as scheduled"),
)

# A run's counts of data, and what they are called.
_COUNTS = {
    "groups": "groups",
    "eval_groups": "groups held out",
    "responses": "responses",
    "tokens": "tokens, one prompt copy",
    "unshared_tokens": "tokens, a copy per response",
    "label_tokens": "tokens scored",
    "longest": "longest group (tokens)",
    "context": "longest prompt and response (real tokens)",
    "synthetic_context": "the same in synthetic positions",
}


class Tile(NamedTuple):
    """Hold a number that one wants to know first."""

    value: str
    name: str
    remark: str


class Figure(NamedTuple):
    """Hold a drawn panel; `keys` are the lines to tell apart, none where there is one."""

    title: str
    aid: str
    keys: list[Series]
    svg: str


@dataclass(frozen=True)
class Page:
    """Hold what the page of a run shows; all of it is text that the template escapes, but for SVG.

    Attributes:
        name: of the folder.
        objective, model, dataset, formula: of the run; empty where the folder does not say.
        tiles: the numbers at the top.
        warnings: what speaks against the run, worst first.
        logged: whether there is any metric.
        figures: the charts.
        smoothed: whether a chart has running means.
        metrics: the same in numbers.
        samples: what the model wrote.
        counts: of the data; None where nothing is known of it.
        skipped: rows that were left out.
        recipe, versions, arguments: how the run was made.
        written: date and time.
    """

    name: str
    objective: str
    model: str
    dataset: str
    formula: str
    tiles: list[Tile]
    warnings: list[RunWarning]
    logged: bool
    figures: list[Figure]
    smoothed: bool
    metrics: list[Metric]
    samples: list[Sample]
    counts: Table | None
    skipped: list[Skipped]
    recipe: Table
    versions: Table
    arguments: Table
    written: str

    @classmethod
    def of(cls, run: Run) -> Page:
        """Collect what the page of a run shows."""
        data = run.section("data")
        counts = [(label, count(data[key])) for key, label in _COUNTS.items() if key in data]
        return cls(
            name=run.folder.resolve().name,
            objective=run.objective,
            model=str(run.section("model").get("name") or run.recipe.get("model", "")),
            dataset=str(data.get("name") or run.recipe.get("dataset", "")),
            formula=str(run.section("objective").get("formula") or ""),
            tiles=_tiles(run),
            warnings=find_warnings(run),
            logged=bool(run.log),
            figures=_figures(run),
            smoothed=any(len(finite(run.curve(k))) > MANY for p in PANELS for k, *_ in p.lines),
            metrics=metrics(run),
            samples=run.samples,
            counts=counts if data or run.skipped else None,
            skipped=run.skipped,
            recipe=_table(run.recipe),
            versions=_versions(run),
            arguments=_table(run.section("arguments")),
            written=time.strftime("%Y-%m-%d %H:%M"),
        )


def _table(values: Mapping[str, object]) -> Table:
    return [(str(key), setting(value)) for key, value in values.items()]


def _panels(run: Run) -> list[Panel]:
    """Return the fixed panels and one for each logged entropy, speed and memory."""
    panels = list(PANELS)
    aids = {
        "entropy": "nats a token; collapse shows here",
        "second": "speed of training",
        "memory": "peak so far",
    }
    for key in run.names():
        words = key.replace("/", "_").split("_")
        word = next((w for w in aids if w in words), None)
        # The closing line of a run repeats its speed as train_...: one point, no curve.
        if word and words[0] not in ("eval", "train"):
            title = " ".join(words).capitalize().replace("gib", "(GiB)")
            panels.append(Panel(title, ((key, "train", "a"),), aids[word]))
    return panels


def _figures(run: Run) -> list[Figure]:
    """Draw every panel that has a curve."""
    figures = []
    for panel in _panels(run):
        lines = [
            Series(label, run.curve(key), tone, dots=key.startswith("eval_"))
            for key, label, tone in panel.lines
        ]
        if svg := chart(lines, bounds=panel.bounds):
            shown = [line for line in lines if finite(line.curve)]
            keys = shown if len(shown) > 1 else []
            figures.append(Figure(panel.title, panel.aid, keys, svg))
    return figures


def _tiles(run: Run) -> list[Tile]:
    """Return what one wants to know first."""
    tiles = []
    for key, name in (
        ("rewards/accuracies", "accuracy"),
        ("rewards/margins", "margin"),
        ("loss", "loss"),
    ):
        curve = run.curve(key)
        if finite(curve):
            first, last = ends(curve)
            evaluated = finite(run.curve(f"eval_{key}"))
            remark = f"eval {evaluated[-1][1]:.3g}" if evaluated else f"from {first:.3g}"
            tiles.append(Tile(f"{last:.3g}", name, remark))
    data = run.section("data")
    shared, unshared = number(data.get("tokens")), number(data.get("unshared_tokens"))
    if shared < unshared:
        tiles.append(Tile(f"{1 - shared / unshared:.0%}", "tokens saved", "by one prompt copy"))
    for key in run.names():
        if "tokens_per_second" in key and not key.startswith(("eval_", "train_")):
            tiles.append(Tile(short(ends(run.curve(key))[1]), "tokens / s", "while training"))
            break
    memory = [k for k in run.names() if "memory" in k and not k.startswith("eval_")]
    if memory and finite(run.curve(memory[0])):
        peak = max(v for _, v in finite(run.curve(memory[0])))
        tiles.append(Tile(f"{peak:.3g}", "GiB of memory", "at the peak"))
    seconds = number(run.facts.get("seconds"))
    if math.isfinite(seconds):
        tiles.append(Tile(duration(seconds), "of training", f"{run.steps} steps"))
    return tiles


def _versions(run: Run) -> Table:
    """Return sizes of the model, what the run did, and what it ran on."""
    model, stamp = run.section("model"), run.section("environment")
    rows = {
        label: count(model[key])
        for key, label in (("parameters", "parameters"), ("trainable", "trained parameters"))
        if key in model
    }
    rows |= {key: run.facts[key] for key in ("reference", "schedule") if key in run.facts}
    versions = stamp.get("versions")
    rows |= versions if isinstance(versions, dict) else {}
    rows |= {key: stamp[key] for key in ("python", "system", "devices") if key in stamp}
    return _table(rows)


def write_report(output_dir: str | Path) -> Path:
    """Write report.html into a run's folder from the files that lie there.

    Reads metrics.jsonl (else the log history in trainer_state.json), run.json, recipe.yaml,
    samples.jsonl and skipped.jsonl; any of them may be missing.

    Returns:
        The report's path.

    Raises:
        ValueError: `output_dir` is no folder, or holds a file of that name that this tool did not
            write, or that was edited.
        PackageError: jinja2 is not installed.
    """
    run = Run.read(output_dir)
    path = run.folder / REPORT
    write_sealed(path, fill("page.html.j2", page=Page.of(run)))
    return path
