"""Three steps on rows of each dialect, from a file, as anybody would train on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastpo.data.dialects import DIALECTS
from fastpo.train.config import PreferenceConfig
from fastpo.train.trainer import PreferenceTrainer
from tests.data.conftest import make_tokenizer
from tests.data.test_dialects import PAIRS, POINTS, STEP, TEXTS
from tests.train import tiny

CASES = {
    **{case: (row, "dpo") for case, (_, row) in (PAIRS | TEXTS).items()},
    "Step-DPO": (STEP, "dpo"),
    **{f"{case}, rated": (row, "apo_zero_unpaired") for case, (_, row) in POINTS.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps(case: str, tmp_path: Path) -> None:
    row, objective = CASES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2)
    tokenizer = make_tokenizer("chatml")
    options: dict[str, Any] = {"disable_tqdm": True, "report_to": "none", "use_cpu": True}
    options["self_check"] = False  # it reads the model, which is the same in every case
    trainer = PreferenceTrainer(
        tiny.model(vocab_size=len(tokenizer)),
        PreferenceConfig(
            str(tmp_path / "run"),
            objective=objective,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            **options,
        ),
        train_dataset=str(path),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_no_dialect_is_left_out() -> None:
    trained = {dialect for cases in (PAIRS, POINTS, TEXTS) for dialect, _ in cases.values()}
    # LOGO's and LongPO's rows are trained on in files of their own.
    assert trained == DIALECTS.keys() - {"logo", "longpo", "step_dpo"}
