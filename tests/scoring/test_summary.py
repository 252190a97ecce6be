"""Means and right pairs of rows that are written by hand."""

from __future__ import annotations

from fastpo.scoring.preferences import ScoredGroup, ScoredResponse
from fastpo.scoring.summary import Summary


def response(logps: float, **more: float) -> ScoredResponse:
    return ScoredResponse(2, logps, logps / 2, **more)  # type: ignore[arg-type]


def test_means_and_pairs() -> None:
    summary = Summary()
    ranked = [response(-1.0, rank=0), response(-3.0, rank=1), response(-2.0, rank=1)]
    summary.add(ScoredGroup("f", 0, ranked, {"ches": -0.5}))
    labelled = [response(-4.0, label=True), response(-2.0, label=False)]
    summary.add(ScoredGroup("f", 1, labelled, {"ches": 0.25}))
    summary.add(ScoredGroup("f", 2, [response(-6.0, label=False)]))
    responses, pairs = summary.tables()
    # Of the three pairs that the data judges (the tie of ranks 1 and 1 is none) two are right.
    assert responses == [
        ("", "chosen", "rejected", "pairs right"),
        ("logps", "-2.5000", "-3.2500", "0.6667"),
        ("mean_logps", "-1.2500", "-1.6250", "0.6667"),
        ("tokens", "2.0000", "2.0000", "-"),
    ]
    assert pairs == [("ches", "-0.1250")]


def test_without_a_judgement_no_pair_is_counted() -> None:
    summary = Summary()
    summary.add(ScoredGroup("f", 0, [response(-1.0), response(-2.0)]))
    (table,) = summary.tables()
    assert table[1] == ("logps", "-1.0000", "-2.0000", "-")
