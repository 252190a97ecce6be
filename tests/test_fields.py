"""Help of fields from a docstring's `Args:`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from fastpo.fields import documented, summary


def test_a_field_has_the_text_of_its_argument() -> None:
    @documented
    @dataclass
    class Options:
        """Say something.

        Args:
            rate: how fast, as in
                `x: 3`.
            none: unset.

        Raises:
            ValueError: never.
        """

        rate: float = 1.0
        none: int | None = None
        other: int = 0

    said = {f.name: f.metadata.get("help") for f in fields(Options)}
    assert said == {"rate": "how fast, as in `x: 3`.", "none": "unset.", "other": None}


def test_an_argument_that_is_no_field_is_refused() -> None:
    @dataclass
    class Options:
        """Say something.

        Args:
            rat: how fast.
        """

        rate: float = 1.0

    with pytest.raises(KeyError, match="rat"):
        documented(Options)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one. Two.", "one"),
        ("a .jsonl file, e.g.: x; more", "a .jsonl file, e.g.: x"),
        ("such as {ld: 0.5}; the table", "such as {ld: 0.5}"),
    ],
)
def test_the_first_sentence(text: str, first: str) -> None:
    assert summary(text) == first
