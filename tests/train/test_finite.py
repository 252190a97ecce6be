"""A loss that is not finite: no step is taken on it, and nothing is written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fastpo.train.trainer import PreferenceTrainer
from tests.train import child, tiny


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


def one_of_two(rank: int, port: int, folder: str) -> None:
    """Train on pairs of which rank 1 meets a bad one in the second step; write what it was told."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    weights = Weights()
    made = PreferenceTrainer(
        tiny.model(),
        tiny.config(
            folder,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=1,
            max_steps=4,
        ),
        train_dataset=poisoned(8, 3),
        processing_class=tiny.tokenizer(),
        callbacks=[weights],
    )
    try:
        made.train()
    except FloatingPointError as error:
        model = made.accelerator.unwrap_model(made.model)
        kept = all(torch.equal(p, weights.last[n]) for n, p in model.named_parameters())
        Path(folder, f"told-{rank}").write_text(f"{kept} {error}")
    os._exit(0)  # the ranks stopped within a step, and do not meet again


def test_no_rank_steps_on_a_loss_of_another(tmp_path: Path) -> None:
    port = child.free_port()
    ranks = [child.start(one_of_two, rank, port, str(tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.join(120)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert "True the loss is not finite in step 2, from rows of another rank" in told[0]
    assert "True the loss is nan in step 2, from tiny.jsonl row 3" in told[1]
