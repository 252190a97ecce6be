"""Groups that an objective cannot take are named by source and row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastpo.data.fit import check_fit
from fastpo.loss import PreferenceLoss
from tests.train import tiny

EXTRAS = ("mismatched", "gold", "ref_response", "context_chosen")


@pytest.mark.parametrize(
    ("objective", "candidates", "change", "message"),
    [
        ("dpo", 3, {}, "row 0: dpo compares pairs, but the row has 3 responses: .*list_to_pairs"),
        ("lipo", 1, {}, "row 0: lipo compares lists, but the row has a single response"),
        ("odpo", 2, {"score": None}, "row 2: odpo needs a grade of every response"),
        ("modpo", 2, {"margin": None}, "row 2: modpo needs a `margin` column"),
        ("maxmin", 2, {"cohort": None}, "row 2: maxmin needs a `group` column"),
        ("kto", 1, {"extras": {}}, "row 2: kto needs a 'mismatched' response"),
        ("mdpo", 2, {"extras": {}}, "row 2: mdpo needs .* row, from a `context_prompt` column"),
        ({"dpo": 1.0, "lipo": 1.0}, 2, {"score": None}, r"row 2: dpo \+ lipo needs a grade"),
    ],
)
def test_misfits_are_named(objective, candidates: int, change: dict, message: str) -> None:
    groups = tiny.groups(4, candidates, extras=EXTRAS)
    loss = PreferenceLoss(objective)
    if change:
        check_fit(loss, groups)
        if "score" in change:
            groups[2].responses[1].score = None
        else:
            groups[2] = replace(groups[2], **change)
    with pytest.raises(ValueError, match=f"tiny.jsonl, {message}"):
        check_fit(loss, groups)


def test_the_first_misfit_is_the_one_named() -> None:
    groups = tiny.groups(3, 2)
    check_fit(PreferenceLoss("dpo"), iter(groups))
    with pytest.raises(ValueError, match="row 0: dpo compares pairs"):
        check_fit(PreferenceLoss("dpo"), iter([*groups, *tiny.groups(1, 1)]))
