"""The pointwise catalogue against the running code of TRL 1.16.

As `test_peers`: the trainer's loss method is called on a stand-in for the trainer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpo.objectives.pointwise import apo_zero_unpaired
from fastpo.testing.three_way import assert_three_way

from .test_peers import MASK, B, Model, T, token_logps, trainer

WEIGHTS = {"desirable_weight": 1.25, "undesirable_weight": 0.75}


def trl_apo(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """KTOTrainer's loss of the 2B rows of `test_peers`, which asks for no mismatched responses."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    options = {"beta": 0.1, "loss_type": "apo_zero_unpaired", "calculate_KL": False, **WEIGHTS}
    prompt = torch.zeros(2 * B, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(2 * B, 1 + T, dtype=torch.long),
        "attention_mask": torch.cat([prompt + 1, MASK.long()], dim=1),
        "completion_mask": torch.cat([prompt, MASK.long()], dim=1),
        "label": labels,
        "ref_logps": token_logps(1, dtype).sum(-1),
    }
    this, model = trainer(**options), Model(token_logps(0, dtype))
    this._compute_kl_logps = lambda model, batch: None  # what it returns without calculate_KL
    return module.KTOTrainer._compute_loss(this, model, inputs, False)


def test_trl_apo_zero_unpaired() -> None:
    labels = torch.randint(0, 2, (2 * B,), generator=torch.Generator().manual_seed(2)).bool()

    def ours(dtype: torch.dtype) -> Tensor:
        u = (token_logps(0, dtype) - token_logps(1, dtype)).sum(-1)
        loss = apo_zero_unpaired(
            u[:, None], labels[:, None], torch.ones(2 * B, 1).bool(), **WEIGHTS
        )
        return loss.terms[0].values.sum() / (2 * B)

    mine, theirs, truth = ours(torch.float32), trl_apo(labels, torch.float32), ours(torch.float64)
    assert_three_way(mine, theirs, truth)
    assert_three_way(theirs, mine, truth, "peer's")
