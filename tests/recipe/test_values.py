"""Values against annotations: what is taken as it is, what is converted, what is refused."""

from __future__ import annotations

import enum
from typing import Any, Literal

import pytest

from fastpo.domain import Auto, Count, ProperShare
from fastpo.recipe.values import Entry, RecipeError, checked


class Kind(enum.Enum):
    STEPS = "steps"
    NO = "no"


# Exact types first, integers of whole floats, numbers as they are, typed text, words, mappings.
@pytest.mark.parametrize(
    ("value", "typed", "expected", "result"),
    [
        ("1", None, int | str, "1"),
        (1, "1", int | str, 1),
        (2024, "2024", str | None, "2024"),
        (3.0, None, int, 3),
        (3, None, float, 3),
        (5e-7, None, float, 5e-7),
        (True, None, bool | str, True),
        (None, "null", float | None, None),
        ("no", None, Kind | str, "no"),
        ("auto", None, Count | str, "auto"),
        ("auto", None, Count | Auto | None, "auto"),
        ({"rank": 2}, None, Entry | None, {"rank": 2}),
        ([[0, 4]], None, list[tuple[int, int]] | None, [[0, 4]]),
        ({"a": 1}, None, dict | str | None, {"a": 1}),
        ({"a": 0.5}, None, str | dict[str, float], {"a": 0.5}),
        (["a", "b"], None, str | list[str], ["a", "b"]),
        (object, None, type | None, object),
    ],
)
def test_taken(value: object, typed: str | None, expected: Any, result: object) -> None:
    taken = checked("key", Entry(value, "f:1", typed), expected)
    assert (taken, type(taken)) == (result, type(result))


# Each: another type, text that looks like one, a word that there is not, outside the domain.
@pytest.mark.parametrize(
    ("value", "expected", "words"),
    [
        (True, int, "f:1: key = True (bool), expected an integer."),
        (1.5, int, "f:1: key = 1.5 (float), expected an integer."),
        ("3", float, "f:1: key = '3' (str), expected a number."),
        (1, bool, "f:1: key = 1 (int), expected true or false."),
        (1, str | None, "f:1: key = 1 (int), expected text or null."),
        ("step", Kind | str, "expected one of steps, no. Did you mean 'steps'?"),
        ("kep_end", Literal["keep_end", "error"], "Did you mean 'keep_end'?"),
        ([1], list[str], "expected a list."),
        ({"a": "x"}, dict[str, float], "expected a mapping."),
        (0, Count | None, "f:1: key = 0 must be at least 1"),
        (0, Count | str, "f:1: key = 0 must be at least 1"),
        ("all", Count | Auto, "f:1: key = 'all' (str), expected an integer at least 1 or auto."),
        (1, ProperShare, "f:1: key = 1 must be in [0, 1)"),
        (float("nan"), ProperShare, "must be in [0, 1)"),
    ],
)
def test_refused(value: object, expected: Any, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        checked("key", Entry(value, "f:1"), expected)
    assert words in str(error.value)


def test_secrets_are_not_shown() -> None:
    with pytest.raises(RecipeError) as error:
        checked("hub_token", Entry(["hf_abc"], "f:1"), str | None)
    assert "hf_abc" not in str(error.value)
