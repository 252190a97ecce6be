"""Manager decisions to K-way lists, from a table of the package's form."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import listwise_proposals as listwise
import pytest

from fastpo.data.formats import read_row


def task_row(name: str, proposals: dict[int, str], accepted: int, variant: str = "swe_manager"):
    game = {
        "all_formal_proposals": [{"id": i, "content": text} for i, text in proposals.items()],
        "correct_proposal": {"id": accepted},
    }
    return {
        "question_id": name,
        "variant": variant,
        "title": f"Title of {name}",
        "description": "Steps\r\nto follow ",
        "manager_data": repr({"game": game}) if variant == "swe_manager" else "",
    }


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        task_row("two", {0: "first " * 20_000, 1: "second"}, accepted=1),
        task_row("coding", {}, 0, variant="ic_swe"),
        task_row("three", {0: "a\r\nb", 2: "c", 5: "d"}, accepted=2),
        task_row("short", {0: "x", 1: "y", 2: "z"}, accepted=0),
    ]
    return write_table(tmp_path / "tasks.csv", rows)


def test_a_decision_is_a_list_with_one_accepted_proposal(table: Path) -> None:
    rows = listwise.decisions(table)
    assert [row["task"] for row in rows] == ["two", "three", "short"]
    row = rows[1]
    text = row["prompt"][0]["content"]
    assert (
        "# Title of three\n\nSteps\nto follow\n\n# Proposal 0\n\na\nb\n\n# Proposal 2\n\nc" in text
    )
    assert [r[0]["content"] for r in row["responses"]] == ["Proposal 0", "Proposal 2", "Proposal 5"]
    assert row["scores"] == [0.0, 1.0, 0.0]


def test_the_engine_reads_the_accepted_first_and_ties_the_others(table: Path) -> None:
    example = read_row(listwise.decisions(table)[1])
    assert example.responses[0] == [{"role": "assistant", "content": "Proposal 2"}]
    assert example.ranks == [0, 1, 1]
    assert example.labels == [True, False, False]


def test_longest_lists_fit_the_budget(table: Path) -> None:
    def size(row: dict[str, Any]) -> int:
        return len(row["prompt"][0]["content"])

    rows = listwise.decisions(table)
    chosen = listwise.longest_lists(rows, size, groups=2, max_prompt_tokens=1000)
    assert [row["task"] for row in chosen] == ["short", "three"]
    with pytest.raises(ValueError, match=r"2 of 3 prompts have at most 1000 tokens, 3 groups"):
        listwise.longest_lists(rows, size, groups=3, max_prompt_tokens=1000)


def test_an_accepted_proposal_that_is_missing_is_named(tmp_path: Path) -> None:
    table = write_table(tmp_path / "tasks.csv", [task_row("odd", {0: "a", 1: "b"}, accepted=7)])
    with pytest.raises(ValueError, match=r"odd: accepted proposal 7 is not one of \[0, 1\]"):
        listwise.decisions(table)


def test_rows_survive_the_file(tmp_path: Path, table: Path) -> None:
    from fastpo.data.rows import load_rows

    rows = listwise.decisions(table)
    path = tmp_path / "deep" / "rows.jsonl"
    listwise.write_rows(path, rows)
    loaded = load_rows(str(path))
    assert [loaded[i]["scores"] for i in range(len(rows))] == [row["scores"] for row in rows]
