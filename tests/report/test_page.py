"""The page of a run: whole, safe, and there for whatever a folder holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastpo.optional import PackageError
from fastpo.report import templates
from fastpo.report.card import write_model_card
from fastpo.report.page import Page as Shown
from fastpo.report.page import write_report
from fastpo.run.record import Run
from fastpo.train.metrics import read_metrics
from tests.report.runs import HOSTILE, Page, healthy, write_run


def test_page_is_balanced_self_contained_and_has_every_curve(tmp_path: Path) -> None:
    log = healthy(100) + [
        {"step": s, "eval_loss": 0.6 - s / 1000, "eval_rewards/accuracies": 0.7} for s in (50, 100)
    ]
    folder = write_run(tmp_path / "night-run", log, run={"status": "finished", "seconds": 61})
    text = write_report(folder).read_text()
    page = Page(text)
    for title in ("Loss", "Accuracy", "Rewards", "Margin", "Log-probability", "Gradient norm",
                  "Learning rate", "Tokens per second", "Peak memory (GiB)"):  # fmt: skip
        assert f"<b>{title}</b>" in text
    assert page.tags.count("svg") == 9
    # One line each, one more where there are chosen and rejected or train and eval.
    assert len(re.findall(r'<polyline class="line', text)) == 11
    assert "Nothing in the numbers speaks against this run." in text
    assert "night-run: dpo" in page.text
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [v for k, v in page.attributes if k in ("src", "href") or k.startswith("on")]
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text


def test_hostile_text_stays_text_in_every_place(tmp_path: Path) -> None:
    def hostile(place: str) -> str:
        return f"{place} {HOSTILE}"

    folder = write_run(
        tmp_path / "<b>&",
        [*healthy(8), *({"step": s, f"entropy_{HOSTILE}": s, "loss": s} for s in (9, 10))],
        samples=[
            {"when": when, "step": 0, "row": 1, "source": "s", "prompt": hostile("prompt"),
             "response": hostile(when), "chosen": hostile("chosen")}
            for when in ("before", "after")
        ],
        skipped=[{"source": hostile("source"), "row": hostile("row"), "field": hostile("field"),
                  "reason": hostile("reason")}],
        run={"model": {"name": hostile("model")}, "data": {"name": hostile("data")},
             "objective": {"name": hostile("objective"), "formula": hostile("formula")},
             "sharing": {"on": False, "reason": hostile("sharing")}, "status": hostile("status"),
             "reference": hostile("reference"), "schedule": hostile("schedule"),
             "arguments": {hostile("argument"): hostile("value")}, "error": hostile("error"),
             "environment": {"versions": {hostile("package"): hostile("version")},
                             "devices": [hostile("device")]}},
        recipe=json.dumps({hostile("key"): {"inner": hostile("setting")}}),
    )  # fmt: skip
    page = Page(write_report(folder).read_text())
    assert not {"script", "img"} & set(page.tags)
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    text = "".join(page.text)
    for place in ("prompt", "before", "after", "chosen", "source", "row", "field", "reason",
                  "model", "data", "objective", "formula", "sharing", "status", "reference",
                  "schedule", "argument", "value", "error", "package", "version", "device", "key",
                  "setting"):  # fmt: skip
        assert hostile(place) in text, place
    assert "<b>&" in text
    assert "Entropy <script>" in text


def test_blanks_of_a_response_are_kept_and_none_are_added(tmp_path: Path) -> None:
    """The style sheet shows them as they are."""
    sample = {"prompt": "  p\n", "before": "\n\ta  b ", "after": "", "chosen": " c"}
    folder = write_run(tmp_path / "r", [], samples=[sample])
    shown = re.findall(r'<div class="text">(.*?)</div>', write_report(folder).read_text(), re.S)
    assert shown == ["\n\ta  b ", "<i>empty</i>", " c"]
    assert '<div class="tag">prompt 1</div>  p\n</div>' in write_report(folder).read_text()


# Each file alone, and none: a page needs no other.
@pytest.mark.parametrize("kept", [(), ("metrics.jsonl",), ("run.json",), ("samples.jsonl",)])
def test_partial_data_gives_a_report_and_a_card(tmp_path: Path, kept: tuple[str, ...]) -> None:
    folder = write_run(
        tmp_path / "r",
        healthy(8),
        run={"status": "interrupted", "data": {"groups": 3}},
        samples=[{"prompt": "p", "before": "b"}],
        recipe="model: m\n",
    )
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    Page(write_report(folder).read_text())
    assert write_model_card(folder).read_text().startswith("---\n")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        write_report(tmp_path / "none")


# Every file that is read, with whatever a crash, another program or a joker may leave in it: other
# types, other types inside, bytes that are no text, numbers without end, no value at all.
@pytest.mark.parametrize("name", ["run.json", "trainer_state.json", "recipe.yaml", "metrics.jsonl"])
@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{", '{"data": 3, "objective": "x", "sharing": [], "seconds": "long"}',
     '{"log_history": 3}', '{"log_history": [3, {"step": "x"}]}', "\x00\xff", "[" * 1100,
     '{"objective": {"name": {"dpo": "x"}}}', '{"objective": {"dpo": "x"}}', "a: 2026-99-99",
     '{"step": 1e400, "loss": 1}', '{"step": 1, "loss": 1' + "0" * 400 + "}", "? [a]\n: 1"],
)  # fmt: skip
def test_broken_files_give_a_report(tmp_path: Path, name: str, text: str) -> None:
    folder = write_run(tmp_path / "r", healthy(2), run={"status": "finished"}, recipe="model: m\n")
    (folder / name).write_bytes(text.encode("latin-1"))
    Page(write_report(folder).read_text())
    write_model_card(folder)
    assert isinstance(read_metrics(folder), list)


def test_a_section_that_is_none_is_left_out(tmp_path: Path) -> None:
    facts = {
        "data": {"groups": "x", "tokens": None},
        "model": 3,
        "seconds": "long",
        "arguments": [],
    }
    page = Shown.of(Run.read(write_run(tmp_path / "r", [], run=facts)))
    assert page.counts == [("groups", "-"), ("tokens, one prompt copy", "-")]
    assert (page.model, page.tiles, page.arguments) == ("", [], [])


def test_jinja_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    monkeypatch.setattr(templates, "_environment", templates._environment.__wrapped__)
    with pytest.raises(PackageError, match=r"^a report needs jinja2 .*: pip install jinja2$"):
        write_report(write_run(tmp_path / "r", []))
