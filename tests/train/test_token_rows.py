"""A token budget cuts batches, and changes nothing of what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.train import tiny


def run(
    folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PreferenceTrainer, Tensor]:
    """(trainer, the losses of twenty steps), of eight pairs each."""
    trainer = PreferenceTrainer(
        tiny.model().to(dtype),
        tiny.config(
            folder,
            **{
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 20,
                "learning_rate": 1e-3,
                "optim": "sgd",
                **options,
            },
        ),
        train_dataset=tiny.pairs(40),
        eval_dataset=tiny.pairs(7, seed=5),
        ref_model=tiny.model(seed=1).to(dtype),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return trainer, torch.tensor(losses, dtype=dtype)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_twenty_steps_do_not_see_the_cut(share_prompt: bool, tmp_path: Path) -> None:
    most = 40 if share_prompt else 100
    ours, losses = run(tmp_path / "ours", max_tokens_per_row=most, share_prompt=share_prompt)
    whole, plain = run(tmp_path / "whole", share_prompt=share_prompt)
    _, truth = run(tmp_path / "truth", torch.float64, share_prompt=share_prompt)
    assert len(losses) == 20
    assert_three_way(losses, plain, truth, "losses")
    assert ours.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert ours.state.epoch == whole.state.epoch
    assert ours.state.total_flos == whole.state.total_flos or not share_prompt
    log = ours.state.log_history[0]
    assert ("row_fill" in log) is share_prompt
    if share_prompt:
        assert 0.5 < log["row_fill"] <= 1
    one, two = (t.evaluate()["eval_loss"] for t in (ours, whole))
    three = whole.model.double() and whole.evaluate()["eval_loss"]
    assert_three_way(*(torch.tensor(x) for x in (one, two)), torch.tensor(three).double(), "eval")


def test_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_tokens_per_row": 40, "save_strategy": "steps", "save_steps": 7}
    options["lr_scheduler_type"] = "constant"  # a decay would depend on max_steps
    whole, _ = run(tmp_path / "a", **{**options, "max_steps": 9})
    run(tmp_path / "b", **{**options, "max_steps": 7})
    resumed, _ = run(tmp_path / "b", **options, max_steps=9, resume_from_checkpoint="auto")
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_rows_that_fit_nowhere_stop_before_the_first_step(trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"do not fit max_tokens_per_row=9 \(tiny.jsonl, row 0: "):
        trainer(max_tokens_per_row=9)
