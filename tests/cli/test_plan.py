"""`fastpo plan`, and the long-context recipes that its output goes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastpo.cli import main
from fastpo.cli.plan import job_of
from fastpo.model.random_init import PRESETS
from fastpo.planner.memory import GIB, plan
from fastpo.recipe.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = {
    "dpo_70b_one_gpu.yaml": ("llama-3-70b", ["--host-gib", "128"]),
    "listwise_long.yaml": ("llama-3-8b", ["--k", "8"]),
    "long_context_logo.yaml": ("llama-3-8b", []),
    "long_context_longpo.yaml": ("llama-3-8b", []),
}
"""Shape, and the flags of `fastpo plan` in the documents."""

STEP = ["--model", "llama-3-8b", "--context", "4096"]
PROMPT = "2 + 2 = ?" * 9
PAIR = {"prompt": PROMPT, "chosen": " 4", "rejected": " 5"}
LIST = {"prompt": PROMPT, "responses": [" 4", " 5", " 6"]}
ROWS: dict[str, dict] = {
    "dpo_70b_one_gpu.yaml": PAIR,
    "listwise_long.yaml": {**LIST, "scores": [3, 2, 1]},
    "long_context_logo.yaml": {**LIST, "chunk_spans": [[0, 30], [30, 70]]},
    "long_context_longpo.yaml": {**PAIR, "short_prompt": "2 + 2 = ?"},
}


def test_the_documents_show_a_full_fine_tune(capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES.parent / "docs" / "long-context.md").read_text()
    words = "plan --model llama-3-8b --method full --context 8192 --gpu h200"
    assert f"`fastpo {words}`" in text
    assert main(words.split()) == 0
    assert capsys.readouterr().out in text


def test_a_step_that_does_not_fit_gets_advice(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "llama-3-70b", "--context", "65536", "--method", "qlora"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "does not fit; the cheapest that makes it fit:\n  mlp_tile: auto\n  offload" in said
    assert any(line.split() == ["logits", "never"] for line in said.splitlines())
    assert main([*words, "--mlp-tile", "auto", "--offload-activations", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"]
    assert facts["switches"] == []
    assert facts["peak_bytes"] < 78 * GIB < facts["host_peak_bytes"]
    assert facts["job"]["reference"] == "adapter"


def test_a_context_beyond_the_positions_is_warned_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def planned(name: str, context: int) -> tuple[str, dict[str, Any]]:
        words = ["plan", "--model", name, "--context", str(context)]
        assert main(words) == 0
        text = capsys.readouterr().out
        assert main([*words, "--json"]) == 0
        return text, json.loads(capsys.readouterr().out)

    text, facts = planned("qwen2.5-0.5b", 32768)
    assert "warning" not in text
    assert (facts["positions"], facts["warning"]) == (32768, None)
    text, facts = planned("qwen2.5-0.5b", 32769)
    assert text.endswith(f"\nwarning: {facts['warning']}\n")
    assert "a context of 32769 tokens, qwen2 was made for 32768: lower it (max_length), or" in text
    scaled = PRESETS["qwen2.5-0.5b"] | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(scaled))
    assert planned(str(tmp_path / "config.json"), 131072)[1]["warning"] is None
    assert "made for 131072" in planned(str(tmp_path / "config.json"), 131073)[1]["warning"]


def test_all_weights_are_planned_in_float32(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By flags and by a recipe; bfloat16 weights come with an optimiser that moves them."""

    def job(*words: str) -> tuple[str, ...]:
        assert main(["plan", "--context", "4096", "--json", *words]) == 0
        fields = json.loads(capsys.readouterr().out)["job"]
        return fields["method"], fields["weights"], fields["optim"]

    by_flags = ("--model", "llama-3-8b")
    assert job(*by_flags)[:2] == ("lora", "bfloat16")
    assert job(*by_flags, "--method", "full")[:2] == ("full", "float32")
    half = job(*by_flags, "--method", "full", "--weights", "bfloat16")
    assert half == ("full", "bfloat16", "adamw_torch_8bit")
    path = tmp_path / "r.yaml"
    recipe = {"model": "llama-3-8b", "dataset": "x.jsonl"}
    for more, weights in (({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16")):
        path.write_text(yaml.safe_dump(recipe | more))
        assert job("--recipe", str(path))[:2] == ("full", weights)
    path.write_text(yaml.safe_dump(recipe))
    assert job("--recipe", str(path), "--method", "lora")[:2] == ("lora", "bfloat16")
    path.write_text(yaml.safe_dump(recipe | {"lora": True}))
    assert job("--recipe", str(path))[:2] == ("lora", "bfloat16")
    assert job("--recipe", str(path), "--method", "full")[:2] == ("full", "float32")


# Each row ends at another line of `resolve_kind`: what is there is taken, in its order.
@pytest.mark.parametrize(
    ("keys", "reference"),
    [
        ({"lora": True}, "adapter"),
        ({"lora": True, "ref_model": "an/other"}, "copy"),
        ({"lora": True, "reference_store": "stored"}, "store"),
        ({"lora": True, "reference_store": "stored", "objective": "tdpo1"}, "adapter"),
        ({}, "store"),
        ({"ref_model": "an/other"}, "copy"),
        ({"streaming": True, "max_steps": 9}, "copy"),
    ],
)
def test_the_reference_is_the_one_that_training_takes(
    keys: dict[str, Any], reference: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    base = {"model": "llama-3-8b", "dataset": "x.jsonl", "max_length": 4096}
    path.write_text(yaml.safe_dump(base | keys))
    recipe = load_recipe(path)
    assert job_of(recipe).reference == job_of(recipe, {"reference": "auto"}).reference == reference


# One row for each refusal: of the command, of the card, of a value, of the job and of the model.
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model and --context are needed"),
        (["--model", "llama-3-8b", "--context", "4096", "--gpu", "h10"], "h10 is not one of h100"),
        (["--model", "llama-3-8b", "--context", "4096", "--mlp-tile", "x"], "--mlp_tile x is nei"),
        (["--model", "llama-3-8b", "--context", "100"], "has no room for a response of 512"),
        (["--model", "./nowhere", "--context", "4096"], "no folder './nowhere'"),
        (["--model", "x", "--recipe", "y.yaml"], "drop the other flag"),
        (["--recipe", "y.yaml", "--context", "0"], "--context 0 must be at least 1"),
        ([*STEP, "--groups", "0"], "--groups 0 must be at least 1"),
        ([*STEP, "--k", "-2"], "--k -2 must be at least 1"),
        ([*STEP, "--rank", "0"], "--rank 0 must be at least 1"),
        ([*STEP, "--host_gib", "-1"], "--host_gib -1.0 must be at least 0"),
        ([*STEP, "--optim", "adam_torch"], "no optimiser of the Trainer's. Did you mean 'adamw_"),
        ([*STEP, "--method", "full", "--rank", "8"], "--rank 8 is of an adapter, and all weights"),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


# Every recipe whose plan the documents print.
@pytest.mark.parametrize("name", RECIPES)
def test_the_documents_show_what_the_planner_says(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The blocks of docs/long-context.md are these commands' output, on the recipe's true shape."""
    recipe = yaml.safe_load((EXAMPLES / name).read_text())
    path = tmp_path / name
    shape, words = RECIPES[name]
    path.write_text(yaml.safe_dump({**recipe, "model": shape}))
    assert main(["plan", "--recipe", str(path), *words]) == 0
    said = capsys.readouterr().out
    assert "\nfits; " in said
    assert said in (EXAMPLES.parent / "docs" / "long-context.md").read_text()


# The same recipes: what is planned for must also run.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_on_a_tiny_shape(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random weights; the host memory is told before anything is loaded."""
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65536,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text(8 * (json.dumps(ROWS[name]) + "\n"))
    flags = {
        "model": tmp_path / "config.json",
        "dataset": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "run",
        "dtype": "float32",
        "num_samples": 0,
        "disable_tqdm": "true",
        "use_cpu": "true",
        "report": "false",
    }
    if "logo" in name:
        flags |= {"max_steps": 1, "gradient_accumulation_steps": 8}
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    assert main(["train", str(EXAMPLES / name), *words, "--random-init"]) == 0
    said = capsys.readouterr().out
    if "70b" in name:
        assert said.startswith("needs      3.1 GiB of host memory at max_length=65536")
    assert ("spread over 65,536 positions" in said) is ("logo" in name)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(torch.tensor(json.loads(line).get("loss", 0.0)).isfinite() for line in lines)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_the_folder_of_an_adapter_is_planned_as_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "smollm2-135m"}')
    said = []
    for model in (tmp_path, "smollm2-135m"):
        assert main(["plan", "--model", str(model), "--context", "1024"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_recipe_becomes_a_job(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = (EXAMPLES / "dpo_70b_one_gpu.yaml").read_text()
    path.write_text(text.replace("meta-llama/Llama-3.3-70B-Instruct", "llama-3-70b"))
    flags = ["--lora.target_modules", "q_proj", "v_proj", "--objective", "tdpo1"]
    job = job_of(load_recipe(path, [*flags, "--reference", "adapter"]))
    assert (job.method, job.rank, job.targets) == ("qlora", 16, ("q_proj", "v_proj"))
    assert (job.reference, job.divergence, job.offload) == ("adapter", True, True)
    assert plan(job).host["optimiser"] > 0
    assert not job.embeddings
    assert job_of(load_recipe(path, ["--resize_embeddings"])).embeddings
    path.write_text(
        text.replace("max_length: 65536\n", "").replace(
            "meta-llama/Llama-3.3-70B-I", "llama-3-70b #"
        )
    )
    with pytest.raises(ValueError, match="how long is a row"):
        job_of(load_recipe(path))


# A card with plenty of memory has the largest default, one of 23 GiB the share of its size.
@pytest.mark.parametrize(("gpu", "mib"), [("h200", 1024), ("rtx4090", 471)])
def test_the_default_workspace_is_the_cards(
    gpu: str, mib: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By flags and by a recipe; one that the recipe names stays."""
    path = tmp_path / "r.yaml"
    text = (EXAMPLES / "long_context_logo.yaml").read_text()
    recipe = {**yaml.safe_load(text), "model": "llama-3-8b"}
    ways = [["--model", "llama-3-8b", "--context", "4096"], ["--recipe", str(path)]]
    planned = []
    for words, more in ((ways[0], {}), (ways[1], {}), (ways[1], {"workspace_mib": 300})):
        path.write_text(yaml.safe_dump(recipe | more))
        assert main(["plan", *words, "--gpu", gpu, "--json"]) == 0
        planned.append(json.loads(capsys.readouterr().out)["job"]["workspace_mib"])
    assert planned == [mib, mib, 300]
