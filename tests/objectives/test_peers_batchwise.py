"""Batch objectives against the running code of TRL 1.16; liger-kernel 0.8.5 has none of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpo.objectives import OBJECTIVES
from fastpo.testing.three_way import assert_three_way

from .test_peers import B, scores, token_logps, trl_dpo


def ours(name: str, dtype: torch.dtype, **hyper) -> Tensor:
    """Mean over the whole batch: one rank, one micro-batch."""
    objective, named = OBJECTIVES[name], scores(dtype)
    ref = torch.stack(token_logps(1, dtype).sum(-1).chunk(2), dim=-1)
    named["ref_logps"] = ref
    for key, statistic in objective.statistics.items():
        values, where = statistic.of(named, {**objective.hyper, **hyper})
        named[key] = statistic.reduce(values[where].double(), hyper).to(dtype)
    outcome = objective(named, **hyper)
    return outcome.terms[0].values.sum() / B


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_trl_aot(name: str, label_smoothing: float) -> None:
    """TRL sorts what one rank has; ours what all ranks have, which for one rank is the same."""
    hyper = {"beta": 0.1, "label_smoothing": label_smoothing}
    theirs, _ = trl_dpo(name, **hyper)
    mine, truth = (ours(name, dtype, **hyper) for dtype in (torch.float32, torch.float64))
    assert_three_way(mine, theirs, truth, name)
    assert_three_way(theirs.float(), mine, truth, f"peer's {name}")
