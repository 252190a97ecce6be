"""The host does not wait for the device within a micro-batch, and once in an optimiser step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpo.data.packing import counts_of
from fastpo.objectives import OBJECTIVES
from fastpo.testing.scores import make_scores
from fastpo.train.finite import FiniteLosses
from tests import syncs
from tests.train import tiny

CASES: dict[str, dict[str, Any]] = {
    "pairs": {"objective": "dpo"},
    "padded rows": {"objective": "dpo", "share_prompt": "false"},
    "lists": {"objective": "lipo", "train_dataset": tiny.groups(8, 3)},
    "statistics": {"objective": "kto", "train_dataset": tiny.groups(8, 2, extras=("mismatched",))},
    "memory": {"objective": "bco"},
    "moving average": {"objective": "beta_dpo"},
    "divergences": {"objective": "tdpo2"},
    "tokens": {
        "objective": "kto_humanline",
        "train_dataset": tiny.groups(8, 2, extras=("mismatched",)),
    },
    "mixture": {"objective": {"simpo": 1.0, "sft": 0.5}},
    "learned masks": {"objective": "sparse_po", "token_masks": "independent", "reference": "copy"},
    "reference at hand": {"objective": "dpo", "reference": "store"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_waits_for_nothing(trainer: Any, case: str) -> None:
    made = trainer(**CASES[case])
    groups = [made.train_dataset[i] for i in range(8)]
    batch, totals = made._prepare_inputs(made.collator(groups)), counts_of(groups)
    made.model.train()
    with syncs.counted() as seen:
        made.compute_loss(made.model, batch, num_items_in_batch=totals).backward()
    assert seen == []


def test_groups_of_a_trained_head_wait_for_nothing(trainer: Any, monkeypatch: Any) -> None:
    """Cut into as many parts as there are groups."""
    made = trainer(objective="dpo")
    monkeypatch.setattr("fastpo.loss.preference_loss.most_kept_tokens", lambda *_, **__: 1)
    groups = tiny.pairs(8)
    batch, totals = made._prepare_inputs(made.collator(groups)), counts_of(groups)
    made.model.train()
    with syncs.counted() as seen:
        made.compute_loss(made.model, batch, num_items_in_batch=totals).backward()
    assert seen == []


def test_losses_are_looked_at_once_a_step(trainer: Any) -> None:
    groups = tiny.pairs(4)
    made = trainer(objective="dpo", train_dataset=groups)
    batches = [made._prepare_inputs(made.collator([group])) for group in groups]
    made.model.train()
    with syncs.counted() as seen:
        for batch in batches:
            made.compute_loss(made.model, batch, num_items_in_batch=counts_of(groups))
        made._finite.on_pre_optimizer_step(made.args, made.state, made.control)
    assert len(seen) == 1
    assert FiniteLosses.on_pre_optimizer_step.__name__ in seen[0]


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"maxmin"}))
def test_objectives_wait_for_nothing(name: str) -> None:
    """`maxmin` asks how many populations a batch has."""
    objective = OBJECTIVES[name]
    sizes = [2, 2] if objective.family == "pair" else [3, 2]
    with syncs.counted() as seen:
        scores = make_scores(objective, sizes)  # its batch statistics too
        objective(scores)
    assert seen == []
    assert all(statistic.where is not None for statistic in objective.statistics.values())


def test_counting_sees_what_waits() -> None:
    with syncs.counted() as seen:
        FiniteLosses().on_pre_optimizer_step(None, None, None)  # has seen nothing
        values = torch.tensor([1.0, 2.0])
        assert values[values > 1].item() == 2.0  # a test's own reads do not count
    assert seen == []
