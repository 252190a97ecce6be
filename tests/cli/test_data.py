"""Scored lists to samples and stages on disk, and from there into training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpo.cli import main
from fastpo.data.curation import rejection_sample

SCORES = [[0.9, 0.4, 0.2, 0.7], [0.1, 0.9, 0.9, 0.3], [0.5, 0.2]]


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    path = tmp_path / "lists.jsonl"
    rows = [
        {"prompt": f"Q{i} ", "responses": [f"{i}{k}" for k in range(len(s))], "scores": s}
        for i, s in enumerate(SCORES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rso_keeps_what_the_sampler_accepts_with_a_seed_a_row(lists: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "kept.jsonl"
    assert main(["data", "rso", str(lists), str(out), "--count", "2", "--seed", "5"]) == 0
    for i, row in enumerate(read(out)):
        kept = rejection_sample(SCORES[i], 2, seed=[5, i])
        assert row["responses"] == [f"{i}{k}" for k in kept]
    best = tmp_path / "best.jsonl"
    assert main(["data", "rso", str(lists), str(best), "--count", "2", "--beta", "0"]) == 0
    assert [row["responses"] for row in read(best)] == [["00", "03"], ["11", "12"], ["20", "21"]]


def test_stages_go_to_a_folder(lists: Path, tmp_path: Path) -> None:
    assert main(["data", "curriculum", str(lists), str(tmp_path / "stages")]) == 0
    stages = [read(path) for path in sorted((tmp_path / "stages").iterdir())]
    assert [[(r["chosen"], r["rejected"]) for r in stage] for stage in stages] == [
        [("00", "02"), ("12", "10"), ("20", "21")],
        [("00", "01"), ("12", "13")],
        [("00", "03")],
    ]


def test_a_broken_line_is_a_bad_row(
    lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = lists.read_text().splitlines(keepends=True)
    lists.write_text(first + '{"prompt": "tor\n' + '{"prompt": "p"}\n' + "".join(rest))
    out = tmp_path / "best.jsonl"
    words = ["data", "rso", str(lists), str(out), "--count", "2", "--beta", "0"]
    assert main(words) == 2
    assert "lists.jsonl, row 1, field 'line': line 2 is not JSON" in capsys.readouterr().err
    assert main([*words, "--skip-bad-rows"]) == 0
    assert [row["responses"] for row in read(out)] == [["00", "03"], ["11", "12"], ["20", "21"]]
    assert all(row.keys() == {"prompt", "responses", "scores"} for row in read(out))
    assert "2 of 5 rows were skipped" in capsys.readouterr().err
    lists.write_text("[]\n")
    assert main([*words, "--skip-bad-rows", "--overwrite"]) == 2
    assert "no usable row; 1 of 1 rows were skipped" in capsys.readouterr().err


# A row that is no list, and a list that gives no pair: each stops before a file appears.
@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ["rso"], "row 0, field 'responses, sc"),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 1.0]},
            ["curriculum"],
            "no list has two answers of different score",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict, words: list[str], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    action, *flags = words
    out = tmp_path / "out"
    assert main(["data", action, str(tmp_path / "rows.jsonl"), str(out), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
