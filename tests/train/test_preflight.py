"""What is judged before the first step: groups, the run, shared prompts."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.self_check import SelfCheck
from fastpo.train.preflight import check_fit, doubts, refuse_unsupported
from tests.train import tiny

EXTRAS = ("mismatched", "gold", "ref_response", "context_chosen")


@pytest.mark.parametrize(
    ("objective", "candidates", "change", "message"),
    [
        ("dpo", 3, {}, "row 0: dpo compares pairs, but the row has 3 responses: .*list_to_pairs"),
        ("lipo", 1, {}, "row 0: lipo compares lists, but the row has a single response"),
        ("odpo", 2, {"score": None}, "row 2: odpo needs a grade of every response"),
        ("modpo", 2, {"margin": None}, "row 2: modpo needs a `margin` column"),
        ("maxmin", 2, {"population": None}, "row 2: maxmin needs a `group` column"),
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
    groups = [replace(group, population=7) for group in tiny.groups(4, 2)]
    (doubt,) = said("maxmin", groups)
    assert doubt.startswith("all of 4 rows are of one population")


def test_sharded_run_refuses_a_copy(trainer: Any) -> None:
    made = trainer()
    made.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"reference='copy'.*reference='store'"):
        refuse_unsupported(made, keeps_model=True)


def failing(reason: str) -> Any:
    return lambda *_, **__: SelfCheck(False, reason, 1.0, 0.1, 0.0, 0.1)


def test_self_check_falls_back_to_padded_rows(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastpo.train.preflight"):
        made = trainer(self_check=True, max_steps=1)
        made.train()
    assert made.data_collator.share_prompt
    assert "self-check: shared and padded log-probs differ by" in caplog.text
    monkeypatch.setattr("fastpo.train.preflight.self_check", failing("they differ by 1"))
    made = trainer(self_check=True, max_steps=1)
    made.train()
    assert not made.data_collator.share_prompt
    with pytest.raises(ValueError, match=r"share_prompt=true.*they differ by 1"):
        trainer(self_check=True, share_prompt=True).train()


def test_sharing_says_how_batches_were_packed(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logged(**options: Any) -> tuple[set[float], str]:
        made = trainer(**options)
        made.train()
        found = {r["sharing"] for r in made.state.log_history if "sharing" in r}
        return found, made.sharing_reason

    assert min(logged()[0]) > 1.1
    assert logged(share_prompt=False) == ({1.0}, "share_prompt is false")
    monkeypatch.setattr("fastpo.train.preflight.self_check", failing("they differ by 1"))
    assert logged(self_check=True) == ({1.0}, "they differ by 1")


def test_check_is_once_and_can_be_asked_for_early(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(self_check=True, max_steps=1)
    made.check()
    monkeypatch.setattr("fastpo.train.preflight.self_check", None)
    made.train()


def test_self_check_stops_at_another_head(trainer: Any) -> None:
    """A head that rescales its input behind our back."""
    made = trainer(self_check=True, reference="copy")
    made.model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    with pytest.raises(RuntimeError, match="fused head differs from the model's own logits"):
        made.train()


def test_model_that_cannot_share(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(
        "fastpo.train.preflight.can_share_prompt", lambda model: (False, "has recurrent state")
    )
    made = trainer(max_steps=1)
    assert not made.data_collator.share_prompt
    assert "has recurrent state" in caplog.text
    made.train()
    with pytest.raises(ValueError, match=r"share_prompt=true.*recurrent state.*share_prompt=auto"):
        trainer(share_prompt="true")
