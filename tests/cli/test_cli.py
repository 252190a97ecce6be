from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_bitsandbytes_available

from fastpo.cli import main
from fastpo.model.opening import open_model
from fastpo.model.self_check import SelfCheckError
from fastpo.objectives import OBJECTIVES
from fastpo.run.folder import RunFolder
from fastpo.testing.three_way import assert_three_way, error
from tests.cli.child import killed_at
from tests.model.tiny import FAMILIES
from tests.model.tiny import tiny as tiny_model
from tests.train.child import start


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- objectives and doctor ------------------------------------------------------------------------


def test_objectives_table_has_every_name_and_formula(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "objectives")
    for objective in OBJECTIVES.values():
        assert f"  {objective.name} " in out
        assert objective.formula in out


def test_objectives_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "objectives", "--json")
    table = {row["name"]: row for row in json.loads(out)}
    assert list(table) == list(OBJECTIVES)
    assert table["dpo"]["needs"] == "reference"
    assert table["simpo"]["needs"] == "nothing else"
    assert "mismatched responses" in table["kto"]["needs"]


def test_one_objective_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "objectives", "ipo")
    assert "average: true" in out  # the recipe
    assert "https://arxiv.org/abs/2310.12036" in out
    assert (OBJECTIVES["ipo"].fn.__doc__ or "").split("\n")[0] in out


def test_doctor(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    status, out, _ = run(capsys, "doctor", "--model", tiny / "model", "--tokens", "128")
    assert status == 0
    for part in ("torch        works", "auto ", "LlamaForCausalLM", "prompts      shared", "259"):
        assert part in out
    assert "by groups    a loss on a trained head costs 3 x 2NDV for groups of up to" in out
    assert "256 MiB are used" in out
    _, out, _ = run(capsys, "doctor", "--model", tiny / "model", "--workspace-mib", "12.5")
    assert "12.5 MiB are used" in out


def test_doctor_fails_on_wrong_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpo.model import installation

    right = installation.linear_logps
    monkeypatch.setattr(installation, "linear_logps", lambda *a, **k: right(*a, **k) * 1.0001)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "WRONG" in out


# --- train, score, sample on a tiny model ---------------------------------------------------------


def test_train_resume_and_refuse(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    folder = recipe.parent / "run"
    status, out, _ = run(capsys, "train", recipe, "--beta", "0.2")
    assert status == 0
    for part in ("6 groups + 2 held out", "beta: 0.2", "adapter switched off", "2 products"):
        assert part in out
    facts = json.loads((folder / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["data"]["tokens"] < facts["data"]["unshared_tokens"]
    assert "by one prompt copy" in out
    for name in ("recipe.yaml", "report.html", "README.md", "adapter_model.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert {"before", "after"} == {row["when"] for row in lines(folder / "samples.jsonl")}
    assert any("eval_loss" in row for row in lines(folder / "metrics.jsonl"))

    status, out, _ = run(capsys, "train", recipe, "--beta", "0.2")
    assert status == 0
    assert "is finished: 2 steps" in out

    status, _, err = run(capsys, "train", recipe, "--beta", "0.3")
    assert status == 2
    assert "objective_args" in err
    assert "--overwrite" in err

    status, out, _ = run(capsys, "train", recipe, "--beta", "0.2", "--max_steps", "3")
    assert status == 0
    assert "checkpoint-2" in out
    assert max(row["step"] for row in lines(folder / "metrics.jsonl")) == 3

    (folder / "notes.txt").write_text("mine")
    status, out, _ = run(capsys, "train", recipe, "--overwrite")
    assert status == 0
    assert "resumes" not in out
    assert max(row["step"] for row in lines(folder / "metrics.jsonl")) == 2
    assert not (folder / "checkpoint-3").exists()
    assert (folder / "notes.txt").read_text() == "mine"


def test_bad_rows_stop_or_are_listed(
    capsys: pytest.CaptureFixture[str], recipe: Path, tiny: Path
) -> None:
    data = recipe.parent / "bad.jsonl"
    data.write_text((tiny / "prefs.jsonl").read_text() + '{"prompt": "Hi", "chosen": "Yes."}\n')
    status, _, err = run(capsys, "train", recipe, "--dataset", data)
    assert status == 2
    assert "bad.jsonl, row 8" in err
    status, _, _ = run(capsys, "train", recipe, "--dataset", data, "--on_bad_row", "skip")
    assert status == 0
    (skipped,) = lines(recipe.parent / "run" / "skipped.jsonl")
    assert skipped["row"] == 8
    assert skipped["reason"] in (recipe.parent / "run" / "report.html").read_text()


def test_an_interrupt_saves_and_says_how_to_go_on(recipe: Path) -> None:
    """One subprocess: the signal, the message, the status, and that the command then resumes."""
    pytest.importorskip("datasets")  # of a process of its own
    code = "import sys; from fastpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", str(recipe), "--max_steps", "100000"]
    folder = recipe.parent / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or not lines(folder / "metrics.jsonl"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "finishing this step" in err
    assert f"fastpo train {recipe} --max_steps 100000" in out
    (checkpoint,) = [p.name for p in folder.glob("checkpoint-*")]
    assert f"goes on from {checkpoint}" in out
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert "This run is interrupted" in (folder / "report.html").read_text()


def test_a_killed_run_ends_with_the_same_weights(
    capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    """SIGKILL before the first checkpoint and after one: the fresh adapter is drawn again."""
    words = ["train", str(recipe), "--max_steps", "4", "--save_steps", "2", "--output_dir"]
    whole, killed = recipe.parent / "whole", recipe.parent / "killed"
    for step, checkpoints in ((1, []), (3, ["checkpoint-2"])):
        process = start(killed_at, step, [*words, str(killed)], torch.get_num_threads())
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert [p.name for p in killed.glob("checkpoint-*")] == checkpoints
    assert "checkpoint-2" in run(capsys, *words, killed)[1]
    torch.manual_seed(123)  # what the process drew before is of no account
    assert run(capsys, *words, whole)[0] == 0
    name = "adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_overwrite_leaves_no_model_of_another_run(
    capsys: pytest.CaptureFixture[str], recipe: Path, tiny: Path
) -> None:
    folder = recipe.parent / "run"
    full = recipe.with_name("full.yaml")
    full.write_text(recipe.read_text().replace("lora: {r: 2}\n", ""))
    for path, adapted in ((full, False), (recipe, True), (full, False)):
        assert run(capsys, "train", path, "--output_dir", folder, "--overwrite")[0] == 0
        assert isinstance(open_model(str(folder)), PeftModel) is adapted
        assert (folder / "adapter_model.safetensors").exists() is adapted
        assert (folder / "model.safetensors").exists() is not adapted
    for model in (folder, folder / "checkpoint-2"):
        status, _, err = run(
            capsys, "train", full, "--model", model, "--output_dir", folder, "--overwrite"
        )
        assert (status, (model / "model.safetensors").exists()) == (2, True)
        assert f"would remove {model}, which this run reads" in err
    own = recipe.parent / "own"  # a folder that is no run's
    shutil.copytree(tiny / "model", own)
    RunFolder(own).forget()
    assert {p.name for p in own.iterdir()} == {p.name for p in (tiny / "model").iterdir()}


def test_a_finished_run_without_checkpoints_is_not_trained_over(
    capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    words = ["train", recipe, "--save_strategy", "no"]
    assert run(capsys, *words)[0] == 0
    path = recipe.parent / "run" / "adapter_model.safetensors"
    before = path.read_bytes()
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "is finished: 2 steps" in out
    for more, part in (
        (["--learning_rate", "1"], "holds a run with learning_rate = 0.001, now it is 1"),
        (["--max_steps", "3"], "no checkpoint to go on from"),
    ):
        status, _, err = run(capsys, *words, *more)
        assert status == 2
        assert part in err
        assert err.count("\n") == 1
    assert path.read_bytes() == before


def test_an_adapter_is_trained_on(
    capsys: pytest.CaptureFixture[str], recipe: Path, tiny: Path
) -> None:
    first, second = recipe.parent / "run", recipe.parent / "second"
    assert run(capsys, "train", recipe)[0] == 0
    onward = recipe.with_name("onward.yaml")
    text = recipe.read_text().replace("lora: {r: 2}\n", "").replace("1e-3", "0.0")
    onward.write_text(text.replace(str(tiny / "model"), str(first)))
    status, out, _ = run(capsys, "train", onward, "--output_dir", second)
    assert status == 0
    assert "frozen copy of the model as it was at the start" in out
    name = "adapter_model.safetensors"  # learning_rate 0: the adapter that was there, as it was
    assert load_file(first / name).keys() == load_file(second / name).keys()
    for key, value in load_file(first / name).items():
        assert torch.equal(value, load_file(second / name)[key])
    line = next(row for row in lines(second / "metrics.jsonl") if "loss" in row)
    assert line["rewards/margins"] == 0.0
    assert run(capsys, "train", onward, "--output_dir", second, "--learning_rate", "1e-3",
               "--overwrite")[0] == 0  # fmt: skip
    changed = load_file(second / name)
    assert any(not torch.equal(v, changed[k]) for k, v in load_file(first / name).items())
    status, _, err = run(capsys, "train", onward, "--lora")
    assert status == 2
    assert "drop lora" in err
    status, _, err = run(capsys, "train", onward, "--quantization", "{load_in_9bit: true}")
    assert "needs an adapter" not in err


def test_errors_of_a_run_are_one_line(
    capsys: pytest.CaptureFixture[str], recipe: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = run(capsys, "train", recipe, "--learning_rate", "1e30", "--max_grad_norm", "0")
    assert status == 2
    assert "fastpo: the loss is nan in step 2" in err
    assert "Traceback" not in err
    report = (recipe.parent / "run" / "report.html").read_text()
    assert "This run is failed" in report
    assert "FloatingPointError: the loss is nan" in report

    broken: Any = AutoModelForCausalLM.from_pretrained(tiny / "model")
    broken.model.norm.weight.data[0] = float("nan")
    shutil.copytree(tiny / "model", recipe.parent / "broken")
    broken.save_pretrained(recipe.parent / "broken")
    for command in (
        ["train", recipe, "--model", recipe.parent / "broken", "--overwrite"],
        ["score", "--model", recipe.parent / "broken", "--dataset", tiny / "prefs.jsonl"],
    ):
        status, _, err = run(capsys, *command)
        assert status == 2
        assert "the first is " in err
        assert "model.norm.weight; load another checkpoint" in err
        assert "Traceback" not in err
    with pytest.raises(SelfCheckError):
        main([*map(str, command), "--debug"])

    # transformers remembers what it finds, and the next test is to find bitsandbytes again.
    is_bitsandbytes_available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        status, _, err = run(capsys, "train", recipe, "--overwrite", "--quantization", "nf4")
    is_bitsandbytes_available.cache_clear()
    assert status == 2
    assert err.endswith(": pip install -U 'fastpo[quant]'\n")
    for name in [m for m in sys.modules if m.startswith("fastpo.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        status, _, err = run(capsys, "train", recipe, "--overwrite")
    assert status == 2
    assert "peft" in err
    assert err.endswith(": pip install -U 'fastpo[train]'\n")
    assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "fastpo.data.rows", None)  # a fault of ours
    with pytest.raises(ImportError):
        main([*map(str, command)])


@pytest.mark.parametrize("model_type", ["nemotron", "doge"])
def test_score_without_sharing_where_it_fails(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, model_type: str
) -> None:
    """Architectures that promise shared prompts and do not keep it."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    options = {**FAMILIES["llama"][1], "vocab_size": 259}
    tiny_model(model_type, **options).save_pretrained(tmp_path / "model")
    status, out, err = run(
        capsys, "score", "--model", tmp_path / "model", "--dataset", tiny / "prefs.jsonl"
    )
    assert status == 0, err
    assert len(out.splitlines()) == 8
    assert "prompts are not shared" in err


def gguf_of(model: Any, path: Path) -> None:
    """The tensors of a tiny Llama under their GGUF names; the tokenizer lies elsewhere."""
    config, writer = model.config, pytest.importorskip("gguf").GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {"self_attn.": "attn_", "o_proj": "output", "_proj": "", "mlp.": "ffn_"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "lm_head": "output"}
    names |= {"model.norm": "output_norm"}
    for name, value in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_run_on_gguf_weights_is_a_model_for_every_command(
    capsys: pytest.CaptureFixture[str], recipe: Path, tiny: Path, tmp_path: Path
) -> None:
    base, folder = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    gguf_of(AutoModelForCausalLM.from_pretrained(tiny / "model"), base / "tiny.gguf")
    gguf, tokenizer = ["--gguf-file", "tiny.gguf"], ["--tokenizer", tiny / "model"]
    assert run(capsys, "train", recipe, "--model", base, *gguf, *tokenizer)[0] == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    data, prompts = ["--dataset", tiny / "prefs.jsonl"], ["--prompts", tmp_path / "prompts.jsonl"]
    short = ["--max-new-tokens", "2"]
    for model in (folder, folder / "checkpoint-2"):
        for words in (
            ["score", "--model", model, *data, "--ref-model", "base"],
            ["sample", "--model", model, *prompts, *short],
            ["doctor", "--model", model, "--tokens", "8"],
            ["merge", model, tmp_path / f"merged-{model.name}"],
        ):
            status, _, err = run(capsys, *words)
            assert status == 0, err
    for words in (
        ["score", "--model", base, *data, *gguf, *tokenizer],
        ["sample", "--model", base, *prompts, *short, *gguf, *tokenizer],
        ["doctor", "--model", base, "--tokens", "8", *gguf],
        ["train", recipe, "--model", folder, "--lora", "null", "--output_dir", tmp_path / "2"],
        ["score", "--model", tmp_path / "2", *data],
    ):
        status, _, err = run(capsys, *words)
        assert status == 0, err


def test_score_against_transformers(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out_path = tmp_path / "scores.jsonl"
    status, out, err = run(
        capsys, "score", "--model", tiny / "model", "--dataset", tiny / "prefs.jsonl",
        "--ref-model", tiny / "model", "--max-rows", "3", "--out", out_path,
    )  # fmt: skip
    assert status == 0
    assert out == ""
    assert "pairs right" in err
    rows = lines(out_path)
    assert [row["row"] for row in rows] == [0, 1, 2]
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    for row, source in zip(rows, lines(tiny / "prefs.jsonl")[:3], strict=True):
        prompt = tokenizer(source["prompt"])["input_ids"]
        for response, name in zip(row["responses"], ("chosen", "rejected"), strict=True):
            answer = [*tokenizer(source[name])["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            logps = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = logps.gather(1, ids[0, len(prompt) :, None]).sum().item()
            assert response["tokens"] == len(answer)
            # float32 keeps 1e-6 of a sum of about 90 nats; the file keeps six decimals.
            assert response["logps"] == pytest.approx(expected, rel=1e-5)
            assert response["reward"] == 0.0
    assert rows[0]["responses"][0]["label"] is True


def test_sample(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 1 plus 1? "}\n{"prompt": "Hi"}\n')
    words = ["sample", "--model", tiny / "model", "--prompts", prompts, "--max-new-tokens", "6"]
    status, out, _ = run(capsys, *words, "--num-samples", "2", "--seed", "1")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [len(row["samples"]) for row in rows] == [2, 2]
    assert "responses" not in rows[0]  # `fastpo train` would read those as ranked, best first
    assert rows[0]["prompt"] == "What is 1 plus 1? "
    assert run(capsys, *words, "--num-samples", "2", "--seed", "1")[1] == out
    # Batched with left padding or one by one, greedy answers are the same.
    together = run(capsys, *words, "--temperature", "0")[1]
    assert run(capsys, *words, "--temperature", "0", "--batch-size", "1")[1] == together

    prompts.write_text('{"prompt": "Hi", "id": 7}\n{"prompt": "tor\n{"id": 8}\n')
    status, _, err = run(capsys, *words)
    assert status == 2
    assert "prompts.jsonl, row 1, field 'line': line 2 is not JSON" in err
    status, out, err = run(capsys, *words, "--skip-bad-rows")
    assert status == 0
    (row,) = map(json.loads, out.splitlines())
    assert row.keys() == {"prompt", "id", "samples"}
    assert "1 x prompt: neither text nor a list of messages" in err

    prompts.write_text('{"prompt": [{"role": "user", "content": "Hi"}]}\n')
    status, _, err = run(capsys, *words)
    assert status == 2
    assert "no chat template" in err


def test_merge(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    """The merged folder loads without peft, and its weights are W + (alpha / r) B A."""
    run_dir, merged = tmp_path / "run", tmp_path / "merged"
    assert run(capsys, "train", str(recipe), "--lora.init_lora_weights", "false")[0] == 0
    assert run(capsys, "merge", str(run_dir), str(merged))[0] == 0
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    adapter: Any = open_model(str(run_dir), dtype="float32")
    count = 0
    for name, layer in adapter.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        count += 1
        ours = model.get_parameter(name.removeprefix("base_model.model.") + ".weight")
        parts = (
            layer.base_layer.weight,
            layer.lora_B["default"].weight,
            layer.lora_A["default"].weight,
        )
        plain, truth = (
            w + layer.scaling["default"] * b @ a
            for w, b, a in (parts, [part.double() for part in parts])
        )
        assert_three_way(ours, plain, truth, name)
        assert error(parts[0], truth) > 100 * error(plain, truth)  # the adapter does something
    assert count == 14
    assert not (merged / "adapter_model.safetensors").exists()
    for words, part in (
        ((str(run_dir), str(merged)), "not an empty folder"),
        ((str(merged), str(tmp_path / "again")), "holds no adapter"),
    ):
        status, _, err = run(capsys, "merge", *words)
        assert status == 2
        assert part in err
