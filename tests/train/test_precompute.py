"""Log-probs of the reference, taken before the first step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.reference.test_live import LN2, first_loss
from tests.train import tiny


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"max_tokens_per_row": 60}, {"num_train_epochs": 1.5, "max_steps": -1}],
    ids=str,
)
def test_a_full_fine_tune_is_its_own_reference(trainer: Any, options: dict) -> None:
    """By log-probs from the batches of the steps: the first loss is ln 2 to the bit."""
    made = trainer(**{"max_steps": 2, **options}, eval_dataset=tiny.pairs(4, seed=5))
    assert made.reference_kind == "store"
    held_out = made.evaluate()
    assert (held_out["eval_loss"], held_out["eval_drift/chosen"]) == (LN2, 0)
    assert first_loss(made) == LN2


def test_a_short_run_scores_what_it_comes_to(trainer: Any) -> None:
    """Not the whole data; a longer run goes on, and other weights have a folder of their own."""
    options = {"train_dataset": tiny.pairs(64), "max_steps": 2}
    made = trainer(**options)
    made.train()
    assert len(made.reference.store) == 3 * 4  # a batch more, which the loader fetches ahead
    longer = trainer(**{**options, "max_steps": 5})
    assert longer.reference.store.path == made.reference.store.path
    assert len(longer.reference.store) == 6 * 4
    other = trainer(**options, model=tiny.model(seed=1))
    assert other.reference.store.path != made.reference.store.path
    assert len(other.reference.store) == 3 * 4
