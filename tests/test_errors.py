"""The nearest name, and how it is asked for."""

from __future__ import annotations

import pytest

from fastpo.errors import did_you_mean, nearest, similar

NAMES = ["grokadamw", "adamw_torch", "chosen_spans", "chosen", "max_length", "sgd"]


# A misspelling, names cut short (of two the nearer), case and hyphens, no name, nothing similar.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_lenght", ["max_length"]),
        ("adamw", ["adamw_torch"]),
        ("chose", ["chosen"]),
        ("MAX-LENGTH", ["max_length"]),
        (3, []),
        ("zzz", []),
    ],
)
def test_similar(name: object, expected: list[str]) -> None:
    assert similar(name, NAMES) == expected


def test_the_question_and_what_stands_for_it() -> None:
    assert did_you_mean("sgdd", NAMES) == "did you mean 'sgd'?"
    assert did_you_mean("zzz", NAMES, "choose") == "choose"
    assert nearest("sgdd", NAMES) == " Did you mean 'sgd'?"
    assert nearest("zzz", NAMES) == ""
    assert len(similar("zzz", NAMES, count=3, cutoff=0)) == 3
