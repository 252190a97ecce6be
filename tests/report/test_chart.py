"""Line charts as SVG."""

from __future__ import annotations

import math
import re

import pytest

from fastpo.report.chart import Series, chart


def test_chart_draws_finite_points_inside_the_frame() -> None:
    curve = [(1, 0.0), (2, math.nan), (3, math.inf), (4, 5.0), (5, -3.0)]
    svg = chart([Series("a", curve, "a")])
    (points,) = re.findall(r'points="([^"]*)"', svg)
    pairs = [tuple(map(float, p.split(","))) for p in points.split()]
    assert len(pairs) == 3
    assert all(0 <= x <= 320 and 0 <= y <= 176 for x, y in pairs)
    assert pairs[1][1] < pairs[0][1] < pairs[2][1]  # up is up
    assert "step 4: 5" in svg


def test_dots_mark_evaluations() -> None:
    svg = chart([Series("<b>", [(1, 1.0), (2, 2.0)], "b", dots=True)])
    assert (
        re.findall(r'<(\w+) class="([^"]*b)"', svg)
        == [("polyline", "thin b")] + [("circle", "dot b")] * 2
    )
    assert "&lt;b&gt;, step 2: 2" in svg


# A line needs two points that are numbers.
@pytest.mark.parametrize(
    "curve", [[], [(1, 2.0)], [(1, math.nan), (2, math.nan)]], ids=["empty", "one", "nan"]
)
def test_nothing_to_draw(curve: list[tuple[float, float]]) -> None:
    assert chart([Series("a", curve, "a")]) == ""


# Zero has no relative width, and others round at their own size.
@pytest.mark.parametrize("value", [0.0, 1e-7, -3.5e5, 1e12])
def test_constant_curves(value: float) -> None:
    assert "nan" not in chart([Series("a", [(0, value), (1, value)], "a")])


def test_long_curves_stay_small() -> None:
    svg = chart([Series("a", [(i, math.sin(i)) for i in range(100_000)], "a")])
    assert len(svg) < 120_000
