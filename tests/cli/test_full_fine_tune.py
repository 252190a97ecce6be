"""`fastpo train` on all weights of a bfloat16 checkpoint: it learns, or it says that it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastpo.cli import main
from fastpo.recipe.recipe import load_recipe
from fastpo.run.record import Run

NOUNS = ("cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant", "pig", "bat", "rat", "eel")
VERBS = ("ran", "sat", "ate", "hid", "won", "fell")


@pytest.fixture
def half(tiny: Path, tmp_path: Path) -> Path:
    """A folder with a bfloat16 checkpoint, and pairs of 20 tokens that differ in a determiner."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    for name, nouns in (("train", NOUNS[:9]), ("held_out", NOUNS[9:])):
        rows = [
            {"prompt": "", "chosen": f"Look, this {n} {v}.", "rejected": f"Look, these {n} {v}."}
            for n in nouns
            for v in VERBS
        ]
        text = "".join(json.dumps({**row, "prompt": "Say: "}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def train(folder: Path, *words: str) -> int:
    options = {
        "model": folder / "model",
        "dataset": folder / "train.jsonl",
        "eval_dataset": folder / "held_out.jsonl",
        "output_dir": folder / "run",
        "max_steps": 40,
        "learning_rate": "1e-5",
        "lr_scheduler_type": "constant",
        "eval_on_start": "true",
        "eval_steps": 40,
        "logging_steps": 1,
        "save_strategy": "no",
        "num_samples": 0,
        "report": "false",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    flags = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    return main(["train", *flags, *words])


@pytest.mark.parametrize("bf16", ["false", "true"])
def test_minimal_pairs_are_learned_by_default(half: Path, bf16: str) -> None:
    """From ln 2 at step 0, in float32 weights, computed in float32 or in bfloat16."""
    assert train(half, "--bf16", bf16) == 0
    run = Run.read(half / "run")
    (_, before), *_, (_, after) = run.curve("eval_loss")
    assert before == torch.tensor(2.0).log().item()
    assert run.curve("loss")[0][1] == before
    assert after < before
    assert run.curve("eval_rewards/accuracies")[-1][1] == 1
    assert run.recipe["dtype"] == "float32"
    assert run.facts["reference"].startswith("log-probabilities on disk")
    weights = load_file(half / "run" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_bfloat16_weights_are_refused_before_the_data_is_read(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (half / "train.jsonl").write_text("no row\n")
    assert train(half, "--dtype", "bfloat16") == 2
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("fastpo: optim=adamw_torch_fused at learning_rate=1e-05 leaves 8")
    assert "dtype=float32" in said
    assert "optim=adamw_torch_8bit (torchao)" in said
    assert not (half / "run" / "metrics.jsonl").exists()


def test_bfloat16_weights_with_an_optimiser_that_moves_them(half: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert train(half, "--dtype", "bfloat16", "--optim", "adamw_torch_8bit") == 0
    curve = Run.read(half / "run").curve("eval_loss")
    assert curve[-1][1] < curve[0][1]


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ([], "float32"),
        (["--lora"], "auto"),
        (["--lora", "false"], "float32"),
        (["--dtype", "auto"], "float32"),
        (["--dtype", "float16"], "float16"),
        (["--random_init", "true"], "float32"),
        (["--gguf_file", "x.gguf"], "float32"),
        (["--lora", "--quantization", "nf4"], "auto"),
    ],
)
def test_auto_is_float32_where_all_weights_are_trained(
    half: Path, words: list[str], dtype: str
) -> None:
    given = ["--model", str(half / "model"), "--dataset", "x.jsonl", *words]
    assert load_recipe(None, given).model.dtype == dtype
