"""Options of data are checked."""

from __future__ import annotations

import pytest

from fastpo.data.options import DataOptions


# One value outside the domain of each checked field.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "keep"}, "truncation='keep'"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore'"),
        ({"list_to_pairs": "all"}, "list_to_pairs='all'"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"seed": "x"}, "seed='x' must be an integer at least 0"),
        ({"token_weights": "{ld: 0.5}"}, "token_weights='{ld: 0.5}' must be a mapping"),
        ({"position_synthesis": {"length": 8}}, "must be PositionSynthesis or null"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)
