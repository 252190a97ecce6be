"""What a run leaves behind: metrics, the bar, its configuration, its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpo.data.packing import counts_of
from fastpo.train.config import PreferenceConfig
from fastpo.train.metrics import METRICS_FILE, ProgressCallback, read_metrics
from tests.train import tiny

TRL_NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}


def test_metrics_file(trainer: Any) -> None:
    made = trainer(eval_dataset=tiny.pairs(3), eval_strategy="steps", eval_steps=2)
    made.train()
    records = read_metrics(made.args.output_dir)
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == [1, 2, 3]
    for record in training:
        assert record.keys() >= TRL_NAMES | {"tokens_per_second", "peak_memory_gib", "sharing"}
        assert record["tokens_per_second"] > 0
        assert record["peak_memory_gib"] > 0.05
    # Distinct tokens: every prompt once.
    order = list(made._get_train_sampler())
    seen = [made.train_dataset[i] for i in order[:12]]
    assert training[-1]["num_tokens"] == counts_of(seen).tokens == sum(map(len, seen))
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 3]
    assert "train_runtime" in records[-1]
    saved = yaml.safe_load((Path(made.args.output_dir) / "preference_config.yaml").read_text())
    assert PreferenceConfig.from_dict(saved).to_dict() == made.args.to_dict()


def test_resumed_file_has_no_step_twice(trainer: Any) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    made = trainer(**options)
    made.train()
    path = Path(made.args.output_dir) / METRICS_FILE
    before = read_metrics(path.parent)
    with path.open("a") as file:
        file.write('{"step": 9, "lo')  # torn by a kill
    trainer(**options).train(resume_from_checkpoint=str(path.parent / "checkpoint-2"))
    after = read_metrics(path.parent)
    assert [r["step"] for r in after] == [r["step"] for r in before] == [1, 2, 3, 4, 4]
    assert [r.get("loss") for r in after] == [r.get("loss") for r in before]
    for line in path.read_text().splitlines():
        json.loads(line)
    trainer(max_steps=1).train()  # a new run in the same folder
    assert [r["step"] for r in read_metrics(path.parent)] == [1, 1]


def test_progress_bar(trainer: Any, capfd: pytest.CaptureFixture) -> None:
    made = trainer(disable_tqdm=False)
    assert [c for c in made.callback_handler.callbacks if isinstance(c, ProgressCallback)]
    made.train()
    text = capfd.readouterr().err
    assert "3/3" in text
    assert "loss=0.6" in text
    assert "margin=" in text
    assert "acc=" in text


def test_model_card_is_ours(trainer: Any) -> None:
    made = trainer(objective="simpo")
    made.train()
    made.create_model_card(model_name="My model", tags=["ignored"])
    card = (Path(made.args.output_dir) / "README.md").read_text()
    assert "# My model" in card
    assert "## Metrics after 3 steps" in card
    assert "rewards/margins" in card
    assert "generated from Trainer" not in card
