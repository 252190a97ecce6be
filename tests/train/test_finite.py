"""A loss that is not finite: no step is taken on it, and nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tests.train import tiny


class Weights(TrainerCallback):
    """Keeps the weights after the last step that was taken."""

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.last = {n: p.detach().clone() for n, p in model.named_parameters()}


def poisoned(count: int, at: int) -> list:
    """Pairs, one of which has a response of infinite weight."""
    groups = tiny.pairs(count)
    chosen, *rest = groups[at].responses
    weights = np.full(len(chosen.input_ids), np.inf, np.float32)
    groups[at] = replace(groups[at], responses=[replace(chosen, token_weights=weights), *rest])
    return groups


@pytest.mark.parametrize("at", [2, 3])  # the first or the last micro-batch of the second step
def test_the_weights_are_those_of_the_last_good_step(trainer: Any, tmp_path: Path, at: int) -> None:
    weights = Weights()
    made = trainer(
        train_dataset=poisoned(8, at),
        callbacks=[weights],
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        output_dir=tmp_path,
    )
    with pytest.raises(
        FloatingPointError, match=rf"the loss is (inf|nan|-inf) in step 2, from .*row {at}; "
    ):
        made.train()
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, weights.last[name]), name
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_run_that_was_stopped_within_a_step_begins_anew(trainer: Any) -> None:
    made = trainer(train_dataset=poisoned(4, 0))
    batch = made._prepare_inputs(made.collator(poisoned(1, 0)))
    made.model.train()
    made.compute_loss(made.model, batch)
    made.train_dataset = tiny.pairs(4)
    made.args.max_steps = 1
    made.train()
