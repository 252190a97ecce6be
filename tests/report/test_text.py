"""Numbers and settings as text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastpo.report.text import Metric, count, duration, metrics, setting, short
from fastpo.run.record import Run
from tests.report.runs import write_run


# One value of each range that is written in its own way.
@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.693147, "0.6931"), (12345, "12.3k"), (1.2358e9, "1.24B"), (5e-6, "5e-6"),
     (math.nan, "-")],
)  # fmt: skip
def test_short(value: float, text: str) -> None:
    assert short(value) == text


# Either side of a minute, ten minutes and an hour.
@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.4, "7 s"), (65, "1:05 min"), (599, "9:59 min"), (720, "12 min"), (11220, "3 h 07")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_settings_read_as_yaml() -> None:
    value = {"a": [1, 2.50], "b": {}, "c": None, "d": True, "e": "x", "f": []}
    assert setting(value) == "a: 1, 2.5, b: {}, c: null, d: true, e: x, f: []"
    assert [count(each) for each in (12345, 1.0, True, "7", None, math.inf)] == [
        "12,345", "1", "-", "-", "-", "-"
    ]  # fmt: skip


def test_metrics_that_both_sides_log(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 1.0, "grad_norm": 1.0}, {"step": 2, "loss": 0.5, "eval_loss": 0.25}]
    run = Run.read(write_run(tmp_path / "r", log))
    assert metrics(run) == [Metric("loss", "1", "0.5", "0.25")]
