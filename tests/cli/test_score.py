"""The files and tables of `fastpo score`, against transformers on one sequence at a time."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.cli import main
from fastpo.testing.three_way import assert_three_way
from tests.scoring.plain import DTYPES, ROWS, plainly, response_ids, sources


@pytest.fixture(scope="module")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights: a reference."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
    return folder


def score(tiny: Path, out: Path, *words: object) -> list[dict[str, Any]]:
    source = ["--model", tiny / "model", "--dataset", tiny / "prefs.jsonl", "--max-rows", ROWS]
    assert main([str(w) for w in ("score", *source, "--out", out, *words)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_token_rewards_are_scaled_log_ratios_that_add_up(
    tiny: Path, other: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.jsonl"
    words = ["--ref-model", other, "--beta", "0.5", "--token-rewards", tokens]
    scored = score(tiny, tmp_path / "scores.jsonl", *words)
    rows = [json.loads(line) for line in tokens.read_text().splitlines()]
    assert [(row["row"], row["response"]) for row in rows] == [
        (i, k) for i in range(ROWS) for k in range(2)
    ]
    for row in rows:
        source = sources(tiny)[row["row"]]
        name = "chosen" if row["label"] else "rejected"
        ids = response_ids(tiny, source[name])
        assert row["ids"] == ids
        assert "".join(row["tokens"]) == source[name] + "</s>"
        ours, plain, truth = (
            torch.tensor(row["rewards"]),
            *(
                0.5
                * (
                    plainly(tiny / "model", source["prompt"], ids, dtype).logps
                    - plainly(other, source["prompt"], ids, dtype).logps
                )
                for dtype in DTYPES
            ),
        )
        assert_three_way(ours, plain, truth, "rewards", terms=math.log(259))
        values = torch.tensor(row["values"])
        assert_three_way(values, ours.cumsum(0), ours.double().cumsum(0), "values")
        assert row["values"][-1] == row["reward"]
        assert scored[row["row"]]["responses"][row["response"]]["reward"] == pytest.approx(
            row["reward"], abs=1e-5
        )


def test_the_page_shows_every_token_in_its_colour(tiny: Path, other: Path, tmp_path: Path) -> None:
    words = ["--ref-model", other, "--token-rewards", tmp_path / "t.jsonl"]
    score(tiny, tmp_path / "s.jsonl", *words)
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    page = (tmp_path / "t.html").read_text()
    shades = re.findall(r"var\(--(.)\) (\d+)%.*?reward ([-+][\d.]+),", page)
    rewards = [reward for row in rows for reward in row["rewards"]]
    assert [float(shown) for _, _, shown in shades] == [round(r, 4) for r in rewards]
    assert all((tone == "a") == (r > 0) for (tone, _, _), r in zip(shades, rewards, strict=True))
    by_size = sorted(zip(map(abs, rewards), (int(s) for _, s, _ in shades), strict=True))
    assert [s for _, s in by_size] == sorted(s for _, s in by_size)
    assert by_size[-1][1] == 70
    assert "http" not in page.replace("http-equiv", "")


def test_the_summary_counts_pairs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = score(tiny, tmp_path / "scores.jsonl", "--ches", "--entanglement", "--follow-up")
    words = map(str.split, capsys.readouterr().err.splitlines())
    shown = {name: values for name, *values in filter(None, words)}
    for name in ("ches", "cosine", "chosen_rises"):
        assert shown[name] == [f"{sum(row['pair'][name] for row in rows) / ROWS:.4f}"]
    pairs = [[r["follow_up"] for r in row["responses"]] for row in rows]
    assert shown["follow_up"][2] == f"{sum(a > b for a, b in pairs) / ROWS:.4f}"


# Refused before a model is opened: by flags alone, by the rows, by the file of follow-ups.
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--token-rewards", "t.jsonl"], "name one with --ref_model"),
        (["--ches"], "has one response: drop the flag"),
        (["--follow-up", "{own}"], "`negative` must be a list of texts and not empty"),
    ],
)
def test_what_cannot_be_scored(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    own, data = tmp_path / "own.json", tmp_path / "single.jsonl"
    own.write_text('{"positive": ["Good"], "negative": []}')
    data.write_text('{"prompt": "Hi ", "completion": "there", "label": true}\n')
    words = [w.format(own=own) for w in words]
    assert main(["score", "--model", str(tiny / "model"), "--dataset", str(data), *words]) == 2
    assert message in capsys.readouterr().err
