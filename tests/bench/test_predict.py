"""The predictions follow from the schedules that run, and meet the goals that arithmetic can."""

from __future__ import annotations

import pytest

from bench import predict
from bench.predict import GOAL_SHAPE, GOALS, SHAPES, cases, filled, late, product
from fastpo.head.types import chunks


def test_products_take_whole_tiles_in_whole_waves():
    assert filled(8192, 8192) == pytest.approx(2048 / (16 * 132))
    assert product(8192, 8192, 8192) == pytest.approx(2 * 8192**3 / 790e12)
    assert product(261, 128256, 4096) > 1.15 * product(256, 128256, 4096)  # tiles of 64: 320 rows
    # One row reads all of W.
    assert product(1, 128256, 4096) > 2 * 128256 * 4096 / 4.3e12
    assert product(8192, 4096, 128, add=True) > 1.5 * product(8192, 4096, 128)  # bound by bytes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_prediction_beats_the_bare_products(shape):
    for case in cases(*shape):
        assert 0.5 < case.fraction < 1, case


def test_goals_that_arithmetic_says_can_be_met_are():
    found = {case.name: 1e3 * case.seconds for case in cases(*GOAL_SHAPE)}
    assert {name for name, goal in GOALS.items() if found[name] > goal} == {"late"}
    # What would meet it too.
    assert 1e3 * late(*GOAL_SHAPE, 256, fused=None).seconds < GOALS["late"]
    assert 1e3 * late(*GOAL_SHAPE, 256, fused=0.88).seconds < GOALS["late"]


def test_a_late_pass_is_counted_slab_by_slab(monkeypatch):
    """Every element of C, dH and dW is formed as often as the schedule forms it."""
    n, d, v = 8192, 8192, 128256
    made: list[tuple[int, int, int, bool]] = []
    monkeypatch.setattr(predict, "product", lambda *a, add=False: made.append((*a, add)) or 0.0)
    rows, columns = map(int, late(n, d, v, 256).block.split(" x "))
    hidden = [m for m in made if m[1] == d and m[0] == rows]
    slices = len(list(chunks(v, columns)))
    assert len(hidden) == slices * (n // rows)
    assert sum(not add for *_, add in hidden) == n // rows
    weight = [m for m in made if m[2] == rows]
    assert sum(m[0] for m in weight) == v * (n // rows)
