"""Further prompts and references from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.testing.three_way import assert_three_way
from tests.cli.test_cli import lines, run
from tests.data.test_tokenised import longpo

ROOT = Path(__file__).resolve().parents[2]


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tiny: Path, tmp_path: Path) -> Path:
    """The preferences of `tiny` with a document before each prompt."""
    short = lines(tiny / "prefs.jsonl")
    return written(
        tmp_path / "rows.jsonl",
        [
            {**row, "short_prompt": row["prompt"], "prompt": "0 1 2. " + row["prompt"]}
            for row in short
        ],
    )


def steps(folder: Path) -> list[dict]:
    return [line for line in lines(folder / "metrics.jsonl") if "loss" in line]


# The authors' rows come as text and as token ids; both must reach the same recipe.
@pytest.mark.parametrize("form", ["text", "token ids"])
def test_longpo_recipe_trains(capsys, tiny: Path, tmp_path: Path, rows: Path, form: str) -> None:
    if form == "token ids":
        written(rows, [longpo(), longpo(1)])
    recipe = ROOT / "examples" / "long_context_longpo.yaml"
    words = ["--model", tiny / "model", "--dataset", rows, "--output_dir", tmp_path / "run"]
    small = ["--dtype", "float32", "--max_steps", 2, "--logging_steps", 1, "--num_samples", 0]
    status, _, err = run(capsys, "train", recipe, *words, *small, "--use_cpu", "true")
    assert status == 0, err
    assert len(steps(tmp_path / "run")) == 2
    assert list((tmp_path / "run" / "reference").glob("shard-*"))


def test_score_after_the_short_prompt(capsys, tiny: Path, tmp_path: Path, rows: Path) -> None:
    """The reward of a model with itself is what the document changes: against plain logits."""
    model, out = tiny / "model", tmp_path / "out.jsonl"
    words = ["--model", model, "--ref-model", model, "--dataset", rows, "--out", out, "--beta", 1]
    status, _, err = run(capsys, "score", *words, "--reference-prompt", "short_prompt")
    assert status == 0, err
    tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def by_hand(dtype: torch.dtype) -> torch.Tensor:
        """[8, 2 candidates, 2 prompts] log-probs."""
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

        def log_prob(prompt: str, response: str) -> torch.Tensor:
            ids = torch.tensor(tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id])
            logps = plain(ids[None]).logits[0, :-1].log_softmax(-1)
            return logps.gather(1, ids[1:, None])[len(tokenizer(prompt)["input_ids"]) - 1 :].sum()

        each = [
            log_prob(row[prompt], row[response])
            for row in lines(rows)
            for response in ("chosen", "rejected")
            for prompt in ("prompt", "short_prompt")
        ]
        return torch.stack(each).reshape(8, 2, 2)

    ours = torch.tensor([[r["reward"] for r in line["responses"]] for line in lines(out)])
    plain, truth = by_hand(torch.float32), by_hand(torch.float64)
    plain, reward = (logps[..., 0] - logps[..., 1] for logps in (plain, truth))
    assert_three_way(ours, plain, reward, "reward", terms=truth.abs().max().item())
    assert (ours != 0).all()


def test_two_references(capsys, tiny: Path, tmp_path: Path) -> None:
    data = written(
        tmp_path / "lists.jsonl",
        [
            {"prompt": f"{i}? ", "responses": ["yes.", "maybe.", "go away"], "ranks": [0, 0, 1]}
            for i in range(4)
        ],
    )
    words = ["train", "--model", tiny / "model", "--dataset", data, "--objective", "d2o"]
    words += ["--output_dir", tmp_path / "run", "--max_steps", 1, "--logging_steps", 1]
    words += ["--num_samples", 0, "--use_cpu", "true"]
    status, _, err = run(capsys, *words)
    assert status == 2
    assert "give the second one as ref_model2" in err
    status, _, err = run(capsys, *words, "--ref_model2", tiny / "model")
    assert status == 0, err
    # All three models are one: every log-ratio is zero.
    assert steps(tmp_path / "run")[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["reference"].endswith(f", and {tiny / 'model'}")
    status, _, err = run(capsys, *words, "--ref_model2", "./nowhere", "--overwrite")
    assert status == 2
    assert "ref_model2: " in err
