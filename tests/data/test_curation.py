"""Rejection sampling and curricula over scored lists."""

from __future__ import annotations

import numpy as np
import pytest

from fastpo.data.curation import curriculum, rejection_sample, sampled
from fastpo.data.formats import read_row


class Scripted:
    """A generator whose next draws are known."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self) -> float:
        return self.draws.pop(0)


def test_a_candidate_is_accepted_with_the_papers_probability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """exp((r - M) / beta), M over what is left: 1.0 has e^-2 beside 2.0, then 1 when alone."""
    beta, chance = 0.5, np.exp(-2.0)
    for first, expected in ((chance - 1e-9, [0, 1]), (chance + 1e-9, [1, 0])):
        scripted = Scripted(first, 0.999, 0.999)
        monkeypatch.setattr(np.random, "default_rng", lambda seed, s=scripted: s)
        assert rejection_sample([1.0, 2.0], 2, beta=beta) == expected


def test_limits_of_beta_and_count() -> None:
    rewards = [0.3, 2.0, -1.0, 2.0, 1.0]
    assert rejection_sample(rewards, 4, beta=0.0) == [1, 3, 4, 0]
    assert sorted(rejection_sample(rewards, 9)) == [0, 1, 2, 3, 4]
    assert rejection_sample(rewards, 0) == []
    assert rejection_sample(rewards, 3, beta=float("inf")) == [0, 1, 2]  # every chance is 1
    assert rejection_sample(rewards, 2, seed=5) == rejection_sample(rewards, 2, seed=5)
    for bad in ({"rewards": [float("nan")], "count": 1}, {"rewards": [1.0], "count": -1}):
        with pytest.raises(ValueError, match="must"):
            rejection_sample(**bad)
    with pytest.raises(ValueError, match="beta=-1"):
        rejection_sample([1.0], 1, beta=-1)


def test_sampled_rows_are_rows() -> None:
    row = {"prompt": "p ", "responses": ["a", "b", "c"], "scores": [0.1, 0.5, 0.9], "weight": 2.0}
    kept = sampled(row, 2, beta=0.0)
    assert kept["responses"] == ["c", "b"]
    assert read_row(kept).scores == [0.9, 0.5]
    assert kept["weight"] == 2.0


def test_stages_go_from_wide_gaps_to_narrow_ones() -> None:
    rows = [
        {"prompt": "p ", "responses": ["a", "b", "c", "d"], "scores": [0.4, 0.9, 0.9, 0.1]},
        {"prompt": "q ", "responses": ["e", "f"], "scores": [1.0, 0.0]},
        {"prompt": "r ", "responses": ["g", "h"], "scores": [1.0, 1.0]},
    ]
    stages = curriculum(rows)
    assert [[(r["chosen"], r["rejected"]) for r in stage] for stage in stages] == [
        [("c", "d"), ("e", "f")],
        [("c", "a")],
    ]
    gaps = [r["score_chosen"] - r["score_rejected"] for stage in stages for r in stage[:1]]
    assert gaps == sorted(gaps, reverse=True)
    assert read_row(stages[0][0]).scores == [0.9, 0.1]
