"""Numbers and settings in the words of a page, a card and a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from fastpo.run.record import Run, ends, finite, number


def short(value: float) -> str:
    """Return a number in at most seven characters."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 1e9:
        return f"{value / 1e9:.3g}B"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    if abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


def count(value: object) -> str:
    """Return a whole number with its thousands apart; "-" for anything else."""
    return f"{number(value):,.0f}" if math.isfinite(number(value)) else "-"


def duration(seconds: float) -> str:
    """Return a time as one would say it: `7 s`, `1:05 min`, `12 min`, `3 h 07`."""
    hours, below = divmod(round(seconds), 3600)
    minutes, secs = divmod(below, 60)
    if hours:
        return f"{hours} h {minutes:02d}"
    if minutes:
        return f"{minutes} min" if minutes > 9 else f"{minutes}:{secs:02d} min"
    return f"{secs} s"


def setting(value: object) -> str:
    """Return a configuration value as YAML would write it on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {setting(v)}" for k, v in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "[]"
    return str(value)


class Metric(NamedTuple):
    """Hold a logged number as text: means of the first and last fifth, and the last evaluation."""

    name: str
    first: str
    last: str
    evaluated: str


def metrics(run: Run) -> list[Metric]:
    """Return the metrics that both training and evaluation log."""
    rows = []
    for key in run.names():
        if key.startswith(("loss", "rewards/", "logps/")):
            evaluated = finite(run.curve(f"eval_{key}"))
            values = (*ends(run.curve(key)), evaluated[-1][1] if evaluated else math.nan)
            rows.append(Metric(key, *map(short, values)))
    return rows
