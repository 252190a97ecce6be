"""A recipe of the alignment handbook's kind: every key is answered, then it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fastpo.cli import main

ZEPHYR = """\
# Model arguments
model_name_or_path: alignment-handbook/zephyr-7b-sft-full
model_revision: main
torch_dtype: bfloat16
attn_implementation: sdpa
use_peft: true
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]

# Data training arguments
dataset_mixer:
  HuggingFaceH4/ultrafeedback_binarized: 1.0
dataset_splits: [train_prefs, test_prefs]
preprocessing_num_workers: 12

# DPOTrainer arguments
bf16: true
beta: 0.01
loss_type: sigmoid
do_eval: true
evaluation_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: zephyr-7b-dpo-full
learning_rate: 5.0e-7
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_torch
output_dir: data/zephyr-7b-dpo-full
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
precompute_ref_log_probs: false
push_to_hub: false
report_to: [none]
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""

HERE = {
    "model_name_or_path": "model",
    "model_revision": "revision",
    "torch_dtype": "dtype",
    "use_peft": "lora: true",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "dataset_mixer": "dataset: HuggingFaceH4/ultrafeedback_binarized",
    "loss_type": "objective: dpo",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps: 0.1",
}


def test_a_zephyr_recipe_is_answered_and_then_trains(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "zephyr.yaml"
    path.write_text(ZEPHYR)
    assert main(["train", str(path)]) == 2
    err = capsys.readouterr().err
    told = dict(re.findall(r"zephyr\.yaml:\d+: unknown key '(\w+)'\. (.*)", err))
    missing = {f"fastpo: {path}: {key} is missing" for key in ("model", "dataset")}
    assert len(told) == len(err.splitlines()) - 2
    assert missing <= set(err.splitlines())
    assert {k: v for k, v in told.items() if not v.startswith(f"Here it is {HERE.get(k)}")} == {
        "dataset_splits": "Here they are split and eval_split, one each.",
        "preprocessing_num_workers": "Rows are tokenised once, in one process: leave it out.",
        "precompute_ref_log_probs": "There is no switch: leave it out, or set reference: copy for "
        "a second model.",
    }

    # The keys as they were told, but for lora, which lora.r and the others say already.
    given = {k: v for k, v in yaml.safe_load(ZEPHYR).items() if k not in told}
    for line in ZEPHYR.splitlines():
        key, _, value = line.partition(": ")
        head, _, told_value = HERE.get(key, "").partition(": ")
        if head and key != "use_peft":
            given[head] = yaml.safe_load(told_value or value)
    path.write_text(yaml.safe_dump(given))
    words = [
        *("--model", str(tiny / "model"), "--dataset", str(tiny / "prefs.jsonl")),
        *("--output_dir", str(tmp_path / "run"), "--revision", "null"),
        *("--eval_fraction", "0.25", "--max_steps", "3", "--use_cpu", "--bf16", "false"),
        *("--dtype", "float32", "--num_samples", "0", "--disable_tqdm"),
    ]
    assert main(["train", str(path), *words]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
