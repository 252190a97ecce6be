"""A tokenizer with more tokens than the embedding: refused by name, or the embedding grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpo.cli import main
from fastpo.model.load import add_lora, load_model, resize_embeddings
from fastpo.model.opening import open_model, open_tokenizer
from tests.train import tiny as models

ROWS, NEW = 259, ["<think>", "</think>"]


@pytest.fixture(scope="module")
def larger(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `tied/`, `untied/` and `gpt2/` of models, `tokens/` of a larger tokenizer, rows."""
    folder = tmp_path_factory.mktemp("larger")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny / "model")
    for name in ("tied", "untied"):
        config = AutoConfig.from_pretrained(tiny / "model", tie_word_embeddings=name == "tied")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    positions = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=ROWS, **positions)
    ).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    tokenizer.save_pretrained(folder / "tokens")
    rows = [
        {**json.loads(line), "chosen": f"<think>{i} and {i + 1}</think>{2 * i + 1}"}
        for i, line in enumerate((tiny / "prefs.jsonl").read_text().splitlines())
    ]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def train(larger: Path, out: Path, model: str = "untied", *flags: object, **keys: Any) -> int:
    recipe = {
        "model": str(larger / model),  # an absolute path stays as it is
        "tokenizer": str(larger / "tokens"),
        "resize_embeddings": True,
        "dataset": str(larger / "prefs.jsonl"),
        "output_dir": str(out),
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "report": False,
        "num_samples": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        **keys,
    }
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    return main(["train", str(path), *map(str, flags)])


# Tied and untied ends, with and without adapters, each reference once, and quantised weights:
# every way in which new rows are trained, saved, and found again by score, sample and merge.
@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("tied", {}),
        ("untied", {"reference": "store"}),
        ("tied", {"lora": {"r": 2}}),
        ("gpt2", {"lora": {"r": 2}}),  # tied under other names
        ("untied", {"lora": {"r": 2}, "dtype": "bfloat16", "reference": "adapter"}),
        ("untied", {"lora": {"r": 2}, "quantization": "nf4", "dtype": "float32"}),
        ("tied", {"lora": {"r": 2, "modules_to_save": ["lm_head"]}, "reference": "store"}),
        ("untied", {"lora": {"r": 2}, "ref_model": "untied", "reference": "copy"}),
    ],
    ids=str,
)
def test_the_rows_of_new_tokens_are_trained_and_kept(
    larger: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    keys: dict[str, Any],
) -> None:
    if "ref_model" in keys:
        keys = {**keys, "ref_model": str(larger / keys["ref_model"])}
    run = tmp_path / "run"
    status = train(larger, run, model, **keys)
    if model == "gpt2" and peft.__version__.startswith("0.18."):
        assert status == 2
        assert "pip install -U 'peft>=0.19'" in capsys.readouterr().err
        return
    assert status == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in logged if "loss" in line) == pytest.approx(
        0.6931, abs=1e-3
    )

    trained: Any = open_model(str(run), dtype="float32", device="cpu")
    tokenizer = open_tokenizer(str(run), None, None)
    assert len(tokenizer) == ROWS + len(NEW)
    start: Any = load_model(str(larger / model), dtype="float32", vocabulary=ROWS + len(NEW))
    ids = torch.tensor([tokenizer("7 <think>8</think>")["input_ids"]])
    for part in ("get_input_embeddings", "get_output_embeddings"):
        now, then = getattr(trained, part)(), getattr(start, part)()
        weight = getattr(now, "modules_to_save", {"default": now})["default"].weight
        assert weight.shape[0] == ROWS + len(NEW)
        moved = (weight - then.weight).abs().amax(dim=1)[ROWS:]
        assert (moved > 1e-3).all(), f"{part} of new tokens moved by {moved.tolist()}"

    data = larger / "prefs.jsonl"
    score = ["--dataset", data, "--out", tmp_path / "scores.jsonl", "--dtype", "float32"]
    sample = ["--prompts", data, "--out", tmp_path / "answers.jsonl", "--max-new-tokens", 2]
    assert main([str(w) for w in ("score", "--model", run, *score)]) == 0
    assert main([str(w) for w in ("sample", "--model", run, *sample)]) == 0
    if "lora" in keys:
        merged = tmp_path / "merged"
        assert main(["merge", str(run), str(merged), "--dtype", "float32"]) == 0
        whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(whole(ids).logits, trained(ids).logits, rtol=0, atol=1e-4)


# Checkpoints of a whole model and of an adapter are written by different code.
@pytest.mark.parametrize("keys", [{}, {"lora": {"r": 2}}], ids=str)
def test_a_resumed_run_ends_where_a_whole_one_does(
    larger: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    assert train(larger, tmp_path / "run", **keys) == 0
    assert train(larger, tmp_path / "run", "untied", "--max_steps", 4, **keys) == 0
    assert train(larger, tmp_path / "whole", "untied", "--max_steps", 4, **keys) == 0
    one, two = (open_model(str(tmp_path / name), device="cpu") for name in ("run", "whole"))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# Every command that feeds rows to a model.
@pytest.mark.parametrize("command", ["train", "score", "sample", "weigh", "prepare"])
def test_without_resizing_every_command_names_the_token(
    larger: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = larger / "prefs.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "<think> 7"}\n')
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "<think> and more. " * 40}) + "\n")
    flags = ["--tokenizer", larger / "tokens", "--out", out]
    words: dict[str, list[Any]] = {
        "score": ["--dataset", data, "--model", larger / "untied", *flags],
        "sample": ["--prompts", tmp_path / "prompts.jsonl", "--model", larger / "tied", *flags],
        "weigh": ["--dataset", data, "--rule", "tis", "--positive", larger / "tied",
                  "--negative", larger / "untied", *flags],
        "prepare": ["logo", tmp_path / "texts.jsonl", out, *flags[:2], "--model", larger / "tied",
                    "--chunk-tokens", 64, "--questions", 1],
    }  # fmt: skip
    if command == "train":
        status = train(larger, tmp_path / "run", resize_embeddings=None)
    else:
        status = main([command, *map(str, words[command])])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert "token 259 of the rows is beyond the model's embedding of 259 rows" in said, said
    assert "it is '<think>', of a tokenizer with 261 tokens" in said
    assert "resize_embeddings: true" in said


def test_an_embedding_that_is_long_enough_stays(larger: Path, tmp_path: Path) -> None:
    assert train(larger, tmp_path / "run", tokenizer=None, lora={"r": 2}) == 0
    model: Any = open_model(str(tmp_path / "run"), device="cpu")
    assert model.get_input_embeddings().weight.shape[0] == ROWS
    assert model.peft_config["default"].modules_to_save is None


def test_an_adapter_of_fewer_rows_is_merged_first(
    larger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(larger, first, tokenizer=None, lora={"r": 2}) == 0
    assert train(larger, second, model=str(first)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{first} is an adapter of an embedding with 259 rows" in said
    assert "`fastpo merge`" in said
    assert main(["merge", str(first), str(tmp_path / "merged")]) == 0
    assert train(larger, second, model=str(tmp_path / "merged"), lora={"r": 2}) == 0
    # And one that has grown is trained on.
    assert train(larger, tmp_path / "third", model=str(second)) == 0


def test_gguf_weights_grow_too(larger: Path, tmp_path: Path) -> None:
    from tests.cli.test_cli import gguf_of

    base = tmp_path / "base"
    base.mkdir()
    gguf_of(AutoModelForCausalLM.from_pretrained(larger / "untied"), base / "tiny.gguf")
    keys: dict[str, Any] = {"gguf_file": "tiny.gguf", "lora": {"r": 2}}
    assert train(larger, tmp_path / "run", model=str(base), **keys) == 0
    out, data = str(tmp_path / "scores.jsonl"), str(larger / "prefs.jsonl")
    assert main(["score", "--model", str(tmp_path / "run"), "--dataset", data, "--out", out]) == 0
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0


# Fewer and more rows than the base model's 259.
@pytest.mark.parametrize("rows", [250, 300])
def test_an_adapter_of_another_tool_brings_its_rows(
    larger: Path, tmp_path: Path, rows: int
) -> None:
    """Others resize to the tokenizer's length in both directions."""
    model: Any = load_model(str(larger / "tied"), device="cpu")
    model.resize_token_embeddings(rows)
    adapted: Any = add_lora(model, {"r": 2, "init_lora_weights": False})
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, rows - 1]])
    opened: Any = open_model(str(tmp_path), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, adapted(ids).logits)


def test_two_matrices_stay_two_where_the_configuration_says_one(larger: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(larger / "untied", tie_word_embeddings=True)
    head = model.lm_head.weight.detach().clone()
    resize_embeddings(model, 270)
    torch.testing.assert_close(model.lm_head.weight[:ROWS], head, rtol=0, atol=0)
    assert not model.config.tie_word_embeddings


def test_a_head_with_a_bias_grows_with_it() -> None:
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "phi", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4,
        )
    )  # fmt: skip
    resize_embeddings(model, 70)
    assert (len(model.lm_head.weight), len(model.lm_head.bias)) == (70, 70)


def test_what_transformers_cannot_resize_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.model()

    def refuse(rows: int) -> None:
        raise NotImplementedError("packed")

    monkeypatch.setattr(model, "resize_token_embeddings", refuse)
    with pytest.raises(ValueError, match=r"cannot resize the embedding of llama \(packed\): name"):
        resize_embeddings(model, 200)


def test_new_rows_are_the_same_each_time(larger: Path) -> None:
    """So that a reference, and whoever opens an adapter later, meets those of the training."""
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        model: Any = load_model(str(larger / "untied"), device="cpu", vocabulary=ROWS + 2)
        assert torch.equal(before, torch.random.get_rng_state())
        drawn.append([model.get_input_embeddings().weight, model.get_output_embeddings().weight])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert drawn[0][0][ROWS:].abs().amax(1).gt(0).all()
