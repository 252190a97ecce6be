"""What `fastpo data show` prints of rows before anybody trains, and what it writes for TRL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trl.data_utils import is_conversational

from fastpo.cli import main
from fastpo.data.formats import read_row
from fastpo.data.messages import assistant, user

ASKED = user("Which metal is liquid?")
ROWS = [
    {
        "prompt": ASKED["content"],
        "prompt_id": "7",
        "chosen": [ASKED, assistant("Mercury.")],
        "rejected": [ASKED, assistant("Lead.")],
        "score_chosen": 9.0,
        "score_rejected": 1.0,
    },
    {
        "context": [ASKED],
        "completions": [
            {"rank": r, "completion": [assistant(text)]}
            for r, text in ((2, "Lead."), (0, "Mercury."), (1, "Tin."))
        ],
    },
    {"prompt": "The metal is", "completion": " mercury.", "label": "up"},
]
BROKEN = '{"prompt": "torn"'


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([*lines[:2], BROKEN, lines[2]]) + "\n")
    return path


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["data", "show", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_who_says_what(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, rows, "--rows", 4)
    assert (
        "row 0, read as trl\n  prompt\n    user: Which metal is liquid?\n  chosen, rank 0" in text
    )
    assert "row 1, read as nemo" in text
    assert "responses[1], rank 0\n    assistant: Mercury." in text
    assert "row 2, field 'line': line 3 is not JSON" in text
    assert "row 3, read as trl\n  prompt\n    The metal is\n" in text
    assert text.endswith("ignored columns, which nothing here reads: prompt_id\n")


def test_border_and_scored_tokens(
    rows: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words = [rows, "--model", tiny / "model", "--chat-template", template, "--rows", 1]
    text = shown(capsys, *words)
    answer = text[text.index("chosen, ") : text.index("rejected, ")]
    scored = "".join(answer.split("\n", 1)[1].split()).replace("][", "")
    assert "[Mercury." in scored
    assert "«[" in scored  # the end of the turn is the template's own, and scored
    assert "«" in text[: text.index("Which metal is liquid?")]
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = shown(capsys, *words)
    assert "\x1b[32m" in coloured
    assert "\x1b[31m" in coloured
    assert "«" not in coloured


def test_rows_for_trl(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trl.jsonl"
    words = ["data", "show", str(rows), str(out), "--to", "trl"]
    assert main(words) == 2
    assert "row 1, field 'completions': a list of 3, and TRL takes pairs" in capsys.readouterr().err
    words += ["--list-to-pairs", "best_rest", "--overwrite"]
    assert main(words) == 2
    assert "row 2, field 'line'" in capsys.readouterr().err
    assert main([*words, "--skip-bad-rows"]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    pair = {"prompt": [ASKED], "chosen": [assistant("Mercury.")]}
    assert written == [
        pair
        | {"rejected": [assistant("Lead.")], "prompt_id": "7"}
        | {"score_chosen": 9.0, "score_rejected": 1.0},
        pair | {"rejected": [assistant("Tin.")]},
        pair | {"rejected": [assistant("Lead.")]},
        {"prompt": "The metal is", "completion": " mercury.", "label": True},
    ]
    assert [is_conversational(row) for row in written] == [True, True, True, False]


def test_rows_for_trl_say_all_that_the_rows_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Worst first, with what belongs to single responses or to the whole conversation beside them.
    listed = {
        "system": "Be brief.",
        "context": [ASKED],
        "completions": [
            {"rank": 1, "completion": [assistant("Lead.")]},
            {"rank": 0, "completion": [assistant("Mercury.")]},
        ],
        "spans": [[[0, 4, 0.5]], [[0, 7, 2.0]]],
        "token_weights": [[0.5, 1.0], [2.0, 3.0, 1.0]],
        "gold": "Hg.",
        "short_prompt": "Liquid?",
        "weight": 2.0,
        "question": "Another one?",
        "source": "school",
    }
    path, out = tmp_path / "rows.jsonl", tmp_path / "trl.jsonl"
    path.write_text(json.dumps(listed))
    assert main(["data", "show", str(path), str(out), "--to", "trl"]) == 0
    assert "ignored columns, which nothing here reads: question, source" in capsys.readouterr().err
    (written,) = map(json.loads, out.read_text().splitlines())
    assert "question" not in written  # another dialect's prompt
    assert written["source"] == "school"
    wanted = ("gold",), ("short_prompt",)
    before, after = (read_row(row, *wanted) for row in (listed, written))
    assert after.prompt == before.prompt == [{"role": "system", "content": "Be brief."}, ASKED]
    for name in ("responses", "spans", "extras", "prompts", "weight"):
        assert getattr(after, name) == getattr(before, name), name
    weights = after.per_token["token_weights"]
    assert [array.tolist() for array in weights] == [[2.0, 3.0, 1.0], [0.5, 1.0]]


def test_a_named_column_that_no_row_has(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, rows, "--columns", "{system: sytem}")
    assert text.endswith("columns={system: sytem}: no row so far has a column 'sytem'\n")


# Flags of another action are refused, and so are values that would be ignored in silence.
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "ROWS", "out.jsonl"], "is only written with --to trl"),
        (["show", "ROWS", "--rows", "0"], "--rows 0 must be at least 1"),
        (["show", "ROWS", "--skip_bad_rows"], "bad rows are shown: drop --skip_bad_rows"),
        (["show", "ROWS", "--to", "trl", "--rows", "2"], "writes all rows, unread: drop --rows"),
        (["show", "ROWS", "--columns", "prompt"], "--columns 'prompt' is no mapping"),
        (["show", "ROWS", "--columns", "{a: ["], "is no mapping"),
        (["show", "ROWS", "--columns", "{chose: x}"], "is 'chosen' meant?"),
        (["show", "ROWS", "--dialect", "alpaka"], "choose one of auto, trl"),
        (["rso", "ROWS"], "name what to write: fastpo data rso DATASET OUT"),
        (["rso", "ROWS", "out.jsonl", "--bos"], "--bos is of `fastpo data show`"),
        (["rso", "ROWS", "out.jsonl", "--rows", "5"], "--rows is of `fastpo data show`"),
    ],
)
def test_what_is_not_used_is_refused(
    rows: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [str(rows) if word == "ROWS" else word for word in words]
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err
