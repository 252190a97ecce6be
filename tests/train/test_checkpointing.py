"""Which checkpoints a run writes, keeps, and goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import tiny


def test_nothing_to_resume_from(trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*'auto'"):
        trainer().train(resume_from_checkpoint=True)
    made = trainer(max_steps=1)
    made.train(resume_from_checkpoint="auto")
    assert made.state.global_step == 1


def test_best_model_and_early_stopping(trainer: Any) -> None:
    """A learning rate far too high: the first evaluation is the best one and is loaded again."""
    made = trainer(
        eval_dataset=tiny.pairs(6, seed=1),
        learning_rate=0.3,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        early_stopping_patience=3,
        lr_scheduler_type="constant",
    )
    made.train()
    margins = [r["eval_rewards/margins"] for r in made.state.log_history if "eval_loss" in r]
    best = margins.index(max(margins)) + 1
    assert made.state.global_step == best + 3 < 12
    folder = Path(made.args.output_dir) / f"checkpoint-{best}"
    assert made.state.best_model_checkpoint == str(folder)
    assert folder.is_dir()
    again = made.evaluate()
    assert again["eval_rewards/margins"] == max(margins)
