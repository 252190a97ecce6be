"""Groups that an objective cannot take are named by source and row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.train.preflight import check_fit, doubts
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


@pytest.mark.parametrize(
    ("objective", "grade", "words"),
    [
        ("point_sigmoid", 1.5, r"in \[0, 1\], got 1\.5"),
        ("listnet", -1.0, "at least 0, got -1"),
        ({"lipo": 1, "point_sigmoid": 0.5}, 2.0, r"in \[0, 1\], got 2"),
    ],
)
def test_grades_outside_the_domain_are_named(objective, grade: float, words: str) -> None:
    groups = tiny.groups(4, 3)
    for group in groups:
        for response in group.responses:
            response.score = 0.5
    loss = PreferenceLoss(objective)
    check_fit(loss, groups)
    groups[2].responses[1].score = grade
    with pytest.raises(ValueError, match=f"tiny.jsonl, row 2: .* takes grades that are {words}"):
        check_fit(loss, groups)


def said(objective, groups, seen: int = 8) -> list[str]:
    return list(doubts(PreferenceLoss(objective), groups, seen=seen))


def test_tied_lists_are_counted() -> None:
    groups = tiny.groups(4, 3)
    assert said("lipo", groups) == []
    for response in groups[1].responses:
        response.score = 0.5
    (doubt,) = said("lipo", groups)
    assert doubt.startswith("1 of 4 rows grade all their responses alike")
    assert "tiny.jsonl, row 1: lipo finds no preference in them" in doubt
    assert said("plackett_luce", groups) == []  # it reads ranks
    for response in groups[1].responses:
        response.rank = 0
    assert len(said("plackett_luce", groups)) == 1
    assert said("point_mse", groups) == []  # it compares nothing


@pytest.mark.parametrize(
    ("objective", "label", "words"),
    [
        ("kto", True, ["no response is undesirable, all are desirable: kto"]),
        ("bco", False, ["no response is desirable, all are undesirable: bco"]),
        ("npo", True, ["no response is undesirable"]),
        ("npo", False, []),
        ("sft", False, ["no response is desirable"]),
        ("sft", True, []),
        ("kto_unlearn", False, ["no response is desirable"]),
    ],
)
def test_data_of_one_class(objective: str, label: bool, words: list[str]) -> None:
    groups = tiny.groups(4, 1)
    for group in groups:
        group.responses[0].label = label
    found = said(objective, groups)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


@pytest.mark.parametrize("objective", ["maxmin", "aot", "dr_dpo", "beta_dpo", "kto_pair"])
def test_statistics_of_one_group(objective: str) -> None:
    groups = tiny.groups(4, 2)
    assert said(objective, groups) == []
    (doubt,) = said(objective, groups, seen=1)
    assert f"{objective} takes " in doubt
    assert "from batches of one group: raise per_device_train_batch_size" in doubt
    assert said("dpo", groups, seen=1) == []


def test_one_population() -> None:
    groups = [replace(group, cohort=7) for group in tiny.groups(4, 2)]
    (doubt,) = said("maxmin", groups)
    assert doubt.startswith("all of 4 rows are of one population")
