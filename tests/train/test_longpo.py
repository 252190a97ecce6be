"""LongPO on its authors' rows of several turns, against whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.testing.three_way import assert_three_way
from tests.data.test_tokenised import longpo
from tests.train import tiny

ROWS = [longpo(), longpo(1), longpo(2)]
RECIPE = {
    "objective": {"sft": 1.0, "dpo": 0.5},
    "objective_args": {"sft.reduction": "sequence_mean", "dpo.beta": 0.3},
    "reference_prompt": "short_prompt",
}


def by_hand(dtype: torch.dtype) -> Tensor:
    """The paper's loss of the rows as they are, likelihood of the answers alone: whole logits.

    The reference is the same model, whose log-probs are summed over the short rows.
    """
    model = tiny.model().to(dtype)

    def log_prob(ids: list[int], labels: list[int], scored: int) -> Tensor:
        targets = torch.tensor(labels[1:])
        logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        mine = logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)[targets >= 0]
        return mine[:scored].sum()

    losses = []
    for row in ROWS:
        ratio, lengths = {}, {}
        for side in ("chosen", "rejected"):
            labels = row[f"{side}_labels"]
            lengths[side] = sum(label >= 0 for label in labels)
            policy = log_prob(row[f"{side}_input_ids"], labels, len(labels))
            short = zip(row[f"ref_{side}_input_ids"], row[f"ref_{side}_labels"], strict=True)
            # Two tokens at the end of a short row are the header of an answer that never comes.
            reference = sum(log_prob(i, t, sum(x >= 0 for x in t) - 2) for i, t in short)
            ratio[side] = policy - reference
            if side == "chosen":
                likelihood = policy
        dpo = -logsigmoid(0.3 * (ratio["chosen"] - ratio["rejected"]))
        losses.append(0.5 * dpo - likelihood / lengths["chosen"])
    return torch.stack(losses).mean().detach()


@pytest.mark.parametrize("share_prompt", ["true", "false"])
@pytest.mark.parametrize("kind", ["copy", "adapter", "store"])
def test_loss(trainer: Any, kind: str, share_prompt: str) -> None:
    options = DataOptions(reference_prompt="short_prompt")
    model: Any = tiny.model()
    if kind == "adapter":  # starts at zero: the same model, but the reference is it without
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    made = trainer(
        model=model,
        train_dataset=build_groups(ROWS, tiny.tokenizer(), options),
        reference=kind,
        share_prompt=share_prompt,
        per_device_train_batch_size=len(ROWS),
        max_steps=1,
        **RECIPE,
    )
    made.train()
    loss = torch.tensor(made.state.log_history[0]["loss"])
    assert_three_way(loss, by_hand(torch.float32), by_hand(torch.float64), "loss")
