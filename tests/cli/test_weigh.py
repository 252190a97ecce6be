"""`fastpo weigh`: what two scorers say of every token, stopped and gone on with, and into a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import fastpo.reference.live
from fastpo.model.opening import open_model
from fastpo.testing.three_way import assert_three_way
from tests.cli.test_cli import lines, run
from tests.scoring.plain import by_hand


def test_stopped_runs_go_on_and_other_arguments_cost_nothing(
    capsys, tiny: Path, worse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "weighted.jsonl"
    words = ["--dataset", tiny / "prefs.jsonl", "--positive", tiny / "model", "--negative", worse]
    words += ["--rule", "tis", "--out", out]
    # Stopped after a batch of the second scorer.
    calls: list[int] = []
    target_hidden = fastpo.reference.live.target_hidden

    def dying(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return target_hidden(*args)

    monkeypatch.setattr(fastpo.reference.live, "target_hidden", dying)
    assert run(capsys, "weigh", *words)[0] == 130
    assert not out.exists()
    assert run(capsys, "weigh", *words)[0] == 0
    assert len(calls) == 4 + 2  # the first scorer's two batches are not run again
    first = lines(out)
    words += ["--rule-args", '{"k": 2.0}']
    status, _, err = run(capsys, "weigh", *words)
    assert (status, "is there already" in err, lines(out)) == (2, True, first)
    status, _, err = run(capsys, "weigh", *words, "--overwrite")
    assert status == 0, err
    assert len(calls) == 6
    for a, b in zip(first, lines(out), strict=True):
        (x, _), (y, _) = a["token_weights"], b["token_weights"]
        assert y == pytest.approx([2 * w for w in x], abs=2e-6)  # six decimals, doubled


def test_contrastive_prompts_into_a_run(capsys, tiny: Path, tmp_path: Path) -> None:
    """T-REG from one model after two prompts, on a list that is not sorted, then trained on."""
    rows = [
        {
            "prompt": row["prompt"],
            "better_prompt": "Be right. " + row["prompt"],
            "worse_prompt": "Be wrong. " + row["prompt"],
            "responses": [row["rejected"], row["chosen"]],
            "scores": [0, 1],
        }
        for row in lines(tiny / "prefs.jsonl")
    ]
    data, out = tmp_path / "rows.jsonl", tmp_path / "weighted.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", data, "--rule", "treg", "--positive", tiny / "model", "--out", out]
    prompts = ["--positive-prompt", "better_prompt", "--negative-prompt", "worse_prompt"]
    status, _, err = run(capsys, "weigh", *words, *prompts)
    assert status == 0, err
    weighted = lines(out)
    model = tiny / "model"
    pair = {**rows[0], "chosen": rows[0]["responses"][1], "rejected": rows[0]["responses"][0]}
    plain, truth = (
        by_hand("treg", model, model, pair, dtype) for dtype in (torch.float32, torch.float64)
    )
    for ours, a, b in zip(weighted[0]["token_rewards"], plain[::-1], truth[::-1], strict=True):
        assert_three_way(torch.tensor(ours), a, b, "rewards", terms=0.5e-6 / 2 / 1.2e-7)
    recipe = ["--model", model, "--dataset", out, "--objective", "treg", "--max_steps", 2]
    small = ["--num_samples", 0, "--use_cpu", "true", "--output_dir", tmp_path / "run"]
    status, _, err = run(capsys, "train", *recipe, *small, "--dtype", "float32")
    assert status == 0, err
    recipe[3], small[-1] = data, tmp_path / "no"
    status, _, err = run(capsys, "train", *recipe, *small, "--dtype", "float32")
    assert status == 2
    assert "row 0: treg needs a `token_rewards` column" in err


def test_base_is_the_adapter_switched_off(
    capsys, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = open_model(str(tiny / "model"), lora={"r": 2, "init_lora_weights": False})
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "adapter")
    common = ["--dataset", tiny / "prefs.jsonl", "--rule", "treg", "--max-rows", 2]
    found = []
    for negative in ("base", tiny / "model"):
        out = tmp_path / f"{len(found)}.jsonl"
        words = ["--positive", tmp_path / "adapter", "--negative", negative, "--out", out]
        status, _, err = run(capsys, "weigh", *common, *words)
        assert status == 0, err
        found.append([row["token_rewards"] for row in lines(out)])
    assert found[0] == found[1]
    assert any(reward for row in found[0] for response in row for reward in response)


# In the order of the command: the rule, its arguments, the two scorers, and the prompts they read.
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "tsi"], "invalid choice: 'tsi'"),
        (["--rule", "tis"], "both scorers are the same model after the same prompt"),
        (["--rule", "tis", "--rule-args", "mu"], "--rule_args 'mu' is no JSON such as"),
        (["--rule", "tis", "--negative", "base"], "has no adapter to switch off; name a model"),
        (["--rule", "tis", "--negative-prompt", "text"], "a column that ends with '_prompt'"),
        (["--rule", "tis", "--negative-prompt", "x_prompt"], "row 0, field 'x_prompt': missing"),
        (["--rule", "critical", "--negative-prompt", "x_prompt"], "two models after one prompt"),
    ],
)
def test_wrong_words(capsys, tiny: Path, tmp_path: Path, words: list, message: str) -> None:
    out = tmp_path / "out.jsonl"
    common = ["--dataset", tiny / "prefs.jsonl", "--positive", tiny / "model", "--out", out]
    status, _, err = run(capsys, "weigh", *common, *words)
    assert status == 2
    assert message in err
    assert not out.exists()


def test_data_is_not_written_over(capsys, tiny: Path, worse: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny / "prefs.jsonl", data)
    words = ["--rule", "tis", "--positive", tiny / "model", "--negative", worse]
    status, _, err = run(capsys, "weigh", *words, "--dataset", data, "--out", data)
    assert (status, "is read itself: name another" in err) == (2, True)
    has = [{**row, "token_weights": [[], []]} for row in lines(data)]
    data.write_text("".join(json.dumps(row) + "\n" for row in has))
    status, _, err = run(capsys, "weigh", *words, "--dataset", data, "--out", tmp_path / "o.jsonl")
    assert status == 2
    assert "the rows have a column 'token_weights' already" in err
