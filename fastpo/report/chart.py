"""Line charts as inline SVG: no script, no font, no network; the page's style colours them."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from fastpo.report.text import short
from fastpo.run.record import Curve, finite


class Series(NamedTuple):
    """Hold one line of a chart; `tone` is a colour of the style sheet, dots mark evaluations."""

    label: str
    curve: Curve
    tone: str
    dots: bool = False


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 176, 40, 8, 8, 22
MANY = 60  # above this many points the line is smoothed and the raw values stay as a shadow


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers that span [low, high]."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick(value: float) -> str:
    """Return a number that fits left of the axis."""
    text = short(value)
    return text if len(text) < 7 else f"{value:.1e}".replace("e-0", "e-")


def _smooth(curve: Curve) -> Curve:
    """Average exponentially over about a twentieth of the run, without a bias to its start."""
    keep = 1 - min(1.0, 20 / len(curve))
    total = weight = 0.0
    out: Curve = []
    for step, value in curve:
        total, weight = keep * total + value, keep * weight + 1
        out.append((step, total / weight))
    return out


def _thin(curve: Curve, most: int = 300) -> Curve:
    """Return at most `most` points: means over equal runs of neighbours."""
    size = math.ceil(len(curve) / most)
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(p[len(p) // 2][0], statistics.fmean(v for _, v in p)) for p in parts]


def chart(series: Sequence[Series], *, bounds: tuple[float, float] | None = None) -> str:
    """Draw lines as inline SVG, coloured by the page's style sheet; "" without two points."""
    drawn = [s._replace(curve=_thin(finite(s.curve))) for s in series if finite(s.curve)]
    if not any(len(s.curve) > 1 for s in drawn):
        return ""
    steps = [s for line in drawn for s, _ in line.curve]
    values = [v for line in drawn for _, v in line.curve]
    low, high = bounds or (min(values), max(values))
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    ticks = _ticks(low, high)
    low, high = min(ticks[0], low), max(ticks[-1], high)
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def points(curve: Curve) -> str:
        return " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in curve)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in ticks:
        kind = "zero" if tick == 0 and low < 0 < high else "grid"
        parts.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text class="tick" text-anchor="end" x="{LEFT - 6}" '
            f'y="{y(tick) + 3.5:.1f}">{_tick(tick)}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text class="tick" text-anchor="{anchor}" x="{x(step):.1f}" y="{HEIGHT - 6}">'
            f"{'step ' if anchor == 'start' else ''}{step:.0f}</text>"
        )
    for line in drawn:
        curve, dots = line.curve, line.dots or len(line.curve) == 1
        if len(curve) > MANY and not dots:
            parts.append(f'<polyline class="raw {line.tone}" points="{points(curve)}"/>')
            curve = _smooth(curve)
        kind = "thin" if dots else "line"
        parts.append(f'<polyline class="{kind} {line.tone}" points="{points(curve)}"/>')
        # Without dots wide invisible marks carry the numbers to whoever points at the line.
        mark, radius = (f"dot {line.tone}", 3.2) if dots else ("hit", 6)
        parts += [
            f'<circle class="{mark}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="{radius}"><title>'
            f"{html.escape(line.label)}, step {s:.0f}: {short(v)}</title></circle>"
            for s, v in curve
        ]
    parts.append("</svg>")
    return "".join(parts)
