"""The demo's model and recipe for two steps: GGUF to safetensors to an adapter, on real pairs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import smollm2
from transformers import AutoConfig

from fastpo.cli import main
from fastpo.run.record import Run
from fastpo.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_two_steps_of_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipe's paths start there
    model = smollm2.convert()
    assert AutoConfig.from_pretrained(model).model_type == "llama"
    words = "--max_steps 2 --max_rows 1 --save_strategy no --num_samples 0 --eval_strategy no"
    words += " --per_device_train_batch_size 1 --warmup_steps 0"  # the same pair twice
    # The evaluation at the end takes a second a pair: one pair.
    held_out = (ROOT / "examples" / "data" / "json_person_eval_pairs.jsonl").read_text()
    (tmp_path / "one.jsonl").write_text(held_out.partition("\n")[0])
    words += f" --eval_dataset {tmp_path / 'one.jsonl'}"
    recipe = str(ROOT / "examples" / "json_person.yaml")
    status = main(["train", recipe, *words.split(), "--output_dir", str(tmp_path / "run")])
    assert status == 0
    run = tmp_path / "run"
    first, second = (r for r in read_metrics(run) if "loss" in r)
    # The adapter starts as nothing: DPO at ln 2, and the likelihood of the chosen replies.
    assert first["rewards/margins"] == 0.0
    assert first["loss"] > math.log(2)
    assert second["loss"] < first["loss"]
    assert second["rewards/margins"] > 0
    assert (run / "adapter_model.safetensors").stat().st_size > 1 << 20
    assert Run.read(run).facts["status"] == "finished"
    assert "smollm2" in (run / "report.html").read_text(encoding="utf-8")
