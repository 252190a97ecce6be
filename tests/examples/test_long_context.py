"""The script that runs LOGO and LongPO, on a model of random weights."""

from __future__ import annotations

from pathlib import Path

import json_person
import long_context as example
import pytest
from demo import Record

from fastpo.data.messages import message_text
from tests.examples.test_families import ROOT, model  # noqa: F401  (a fixture)


def test_documents_hold_what_is_asked_for() -> None:
    rows = example.documents("train", 6)
    assert rows == example.documents("train", 6)
    for row in rows:
        (message,) = row["prompt"]
        chunks = [message["content"][start:stop] for start, stop in row["chunk_spans"]]
        assert len(chunks) == example.PAGES
        right, half, wrong = (message_text(r[0]) for r in row["responses"])
        codes = [str(code) for code in row["right_codes"]]
        assert [sum(code in text for code in codes) for text in (right, half, wrong)] == [2, 1, 0]
        assert all(sum(code in chunk for chunk in chunks) == 1 for code in codes)
        short = message_text(row["short_prompt"][0])
        assert [chunk in short for chunk in chunks].count(True) == 2
        assert all(code in short for code in codes)
        assert message["content"].count("The code of") == 3 + 1  # one in the form of the answer


def test_held_out_documents_share_no_city() -> None:
    pages = example.pages()
    for side, count in example.DOCUMENTS.items():
        assert len(pages[side]) >= example.PAGES * count
    assert not set(json_person.CITIES["train"].split()) & set(json_person.CITIES["eval"].split())


def test_codes_are_counted() -> None:
    rows = [{"right_codes": [1234, 5678]}, {"right_codes": [1111, 2222]}]
    found = example.found_in(["1234 and 5678", "2222 and 2222"], rows)
    assert (found.codes, found.both) == (0.75, 0.5)


def test_both_recipes_and_the_section(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)  # the recipe's paths start there
    example.write_data(tmp_path, {"train": 2, "eval": 2})
    flags = ["--model", str(model), "--use_cpu", "true", "--disable_tqdm", "true"]
    flags += ["--max_steps", "2", "--eval_steps", "2", "--learning_rate", "1e-3"]
    flags += ["--save_strategy", "no"]
    record = Record(tmp_path / "record.json")
    record.run("before", "", lambda: {"codes": 0.25, "both": 0.0})
    for name in example.RUNS:
        record.run(name, "", lambda name=name: example.train(name, tmp_path, flags))
        record.run(f"after {name}", "", lambda: {"codes": 0.5, "both": 0.5})
    logo, longpo = (record.phases[name]["result"] for name in example.RUNS)
    assert logo["data"]["synthetic_context"] == 8192 > logo["data"]["context"]
    assert "synthetic_context" not in longpo["data"]
    for run in (logo, longpo):
        assert run["steps"] == 2
        assert run["after"]["eval_loss"] < run["before"]["eval_loss"]
    page = tmp_path / "page.md"
    page.write_text("# Runs\n\nOthers.\n")
    for _ in range(2):  # the second replaces the first
        example.write_section(page, example.section(record))
    text = page.read_text()
    assert text.startswith("# Runs\n\nOthers.\n\n<!-- long -->\n")
    assert text.count("| LOGO |") == text.count("| LongPO |") == 1
    assert "0.25 -> 0.50 | 0.00 -> 0.50" in text
