"""Numbers of single tokens from two models, against whole logits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpo.model.load import load_model, load_tokenizer
from fastpo.reference.live import LiveReference, ModelReference
from fastpo.scoring.rules import get_rule
from fastpo.scoring.weigh import weigh
from fastpo.testing.three_way import assert_three_way
from tests.scoring.plain import DTYPES, by_hand, sources


def opened(folder: Path) -> LiveReference:
    model: Any = load_model(str(folder), dtype="float32", device="cpu")
    return ModelReference.frozen(model)


# Each rule makes another number of the two log-probs; `critical` takes one pass over both models.
@pytest.mark.parametrize("rule", ["tis", "critical", "treg"])
def test_two_models(tiny: Path, worse: Path, tmp_path: Path, rule: str) -> None:
    model, rows = tiny / "model", sources(tiny)
    column = "token_rewards" if rule == "treg" else "token_weights"
    scorers = partial(opened, model), partial(opened, worse)
    weighted = weigh(
        rows, load_tokenizer(str(model)), get_rule(rule, {}), *scorers, tmp_path, batch_size=2
    )
    for row, written in zip(rows, weighted, strict=True):
        assert {k: v for k, v in written.items() if k != column} == row
        plain, truth = (by_hand(rule, model, worse, row, dtype) for dtype in DTYPES)
        numbers: Any = written[column]
        for ours, a, b in zip(numbers, plain, truth, strict=True):
            # The column keeps six decimals: half a unit of the last, in float32's eps.
            terms = 0.5e-6 / 2 / torch.finfo(torch.float32).eps
            assert_three_way(torch.tensor(ours), a, b, column, terms=terms)
