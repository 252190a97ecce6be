"""A small sample of `python -m tests.fuzz`, the same in every run."""

from __future__ import annotations

from tests.fuzz import FAULTS, fuzz, table


def test_a_sample_of_the_fuzz_has_no_faults() -> None:
    outcomes = list(fuzz(recipes=40, files=15, seed=1, seconds=60))
    faults = [o for o in outcomes if o.result in FAULTS]
    assert not faults, f"{faults}\n{table(outcomes)}"
    assert {o.result for o in outcomes} == {"refused", "used"}
