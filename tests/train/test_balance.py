"""The load-balance loss of a mixture of experts through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.data.packing import collate, counts_of
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import attach, target_hidden_and_balance
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.model.tiny import family, group
from tests.train import tiny

GROUPS = [group(9, [4, 7], 0), group(20, [3, 2], 1), group(7, [6, 1], 2)]
CUTS = (GROUPS[:2], GROUPS[2:])
COEFFICIENT = 0.7


def by_hand(dtype: torch.dtype, shared: bool) -> Tensor:
    """Gradient of the preference loss, and of each row's balance by its share of the tokens."""
    model: Any = attach(family("mixtral").to(dtype))
    loss = PreferenceLoss("simpo", read_head(model))
    totals = counts_of(GROUPS)
    tokens = "tokens" if shared else "unshared_tokens"
    for part in CUTS:
        batch = collate(part, share_prompt=shared, pad_token_id=0)
        hidden, balance = target_hidden_and_balance(model, batch)
        share = getattr(counts_of(part), tokens) / getattr(totals, tokens)
        whole = loss(
            hidden, batch.tokens.targets, batch.tokens.segments, totals=totals._asdict()
        ).loss
        (whole + COEFFICIENT * share * balance).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_a_step_count_by_their_tokens(tmp_path: Path, shared: bool) -> None:
    args = tiny.config(
        tmp_path,
        objective="simpo",
        router_aux_loss_coef=COEFFICIENT,
        share_prompt="true" if shared else "false",
    )
    model: Any = family("mixtral")
    trainer = PreferenceTrainer(
        model, args, train_dataset=GROUPS, processing_class=tiny.tokenizer()
    )
    batches, totals = trainer.get_batch_samples(map(trainer.collator, CUTS), 2, args.device)
    for rows in batches:
        trainer.training_step(model, rows, totals)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    plain, truth = (by_hand(dtype, shared) for dtype in (torch.float32, torch.float64))
    assert_three_way(found, plain, truth, what="gradient")
    means = trainer._meter.window.means()
    assert 1 < means["aux_loss"] < 4  # k experts of E are chosen: k where all are used alike
