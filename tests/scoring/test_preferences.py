"""Scored groups against transformers on one sequence at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.model.load import load_model, load_tokenizer
from fastpo.scoring.follow_ups import FollowUps
from fastpo.scoring.preferences import ScoredGroup, ScoringOptions, score_preferences
from fastpo.scoring.scorer import Scorer
from fastpo.testing.three_way import assert_three_way
from tests.scoring.plain import DTYPES, plainly, response_ids, sources


def scored(
    tiny: Path, options: ScoringOptions, *, reference: bool = False, rows: Any = None
) -> list[ScoredGroup]:
    """Score the first rows; the reference is the same model."""
    tokenizer = load_tokenizer(str(tiny / "model"))
    groups = build_groups(rows or sources(tiny), tokenizer, DataOptions()).groups

    def scorers() -> tuple[Scorer, Scorer | None]:
        policy = Scorer(load_model(str(tiny / "model"), dtype="float32", device="cpu"))
        return policy, policy if reference else None

    batches = score_preferences(groups, tokenizer, scorers, options)
    return [row for batch in batches for row in batch.rows]


def test_log_probs_of_separate_forwards_and_rewards_of_the_same_model(tiny: Path) -> None:
    rows = scored(tiny, ScoringOptions(), reference=True)
    for row, source in zip(rows, sources(tiny), strict=True):
        assert list(row.columns()) == ["source", "row", "responses"]
        for response, name in zip(row.responses, ("chosen", "rejected"), strict=True):
            ids = response_ids(tiny, source[name])
            plain, truth = (
                plainly(tiny / "model", source["prompt"], ids, dtype).logps.sum()
                for dtype in DTYPES
            )
            # The row keeps six decimals.
            ours = torch.tensor(response.logps, dtype=torch.float64)
            assert_three_way(ours, plain, truth, terms=len(ids) * math.log(259))
            assert response.mean_logps == pytest.approx(response.logps / len(ids), abs=1e-6)
            assert (response.tokens, response.ref_logps) == (len(ids), response.logps)
            assert (response.reward, response.rank) == (0.0, int(name == "rejected"))


def test_ches_and_entanglement_of_separate_forwards(tiny: Path) -> None:
    rows = scored(tiny, ScoringOptions(ches=True, entanglement=True, batch_size=2))
    weights = [
        AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=d).lm_head.weight.detach()
        for d in DTYPES
    ]
    for row, source in zip(rows, sources(tiny), strict=True):
        both, square = [], 0.0
        for dtype, weight in zip(DTYPES, weights, strict=True):
            states, gradients = [], []
            for name in ("chosen", "rejected"):
                ids = response_ids(tiny, source[name])
                hidden = plainly(tiny / "model", source["prompt"], ids, dtype).hidden
                hot = torch.nn.functional.one_hot(torch.tensor(ids), len(weight)).to(dtype)
                states.append(hidden.sum(0))
                gradients.append(((hot - (hidden @ weight.T).softmax(-1)) @ weight).sum(0))
            (w, l), (g, h) = states, gradients
            square = (w @ w).item()  # at last in float64
            both.append({"ches": w @ l - w @ w, "inner": g @ h, "chosen_norm": g.norm()})
        plain, truth = both
        pair = row.pair
        for name in truth:
            terms = square if name == "ches" else 0.0
            assert_three_way(torch.tensor(pair[name]), plain[name], truth[name], name, terms=terms)
        assert pair["rejected_falls"] == (pair["inner"] <= pair["rejected_norm"] ** 2)


def test_follow_up_rewards_are_those_of_the_next_line(tiny: Path) -> None:
    utterances = FollowUps(["Thanks!", "Right."], ["No"])
    rows = scored(tiny, ScoringOptions(follow_ups=utterances))
    for row, source in zip(rows, sources(tiny), strict=True):
        for response, name in zip(row.responses, ("chosen", "rejected"), strict=True):

            def mean(text: str, dtype: torch.dtype, before: str) -> Tensor:
                ids = response_ids(tiny, text, end=False)
                return plainly(tiny / "model", before + "\n", ids, dtype).logps.mean()

            said = source["prompt"] + source[name]
            plain, truth = (
                (mean("Thanks!", d, said) + mean("Right.", d, said)) / 2 - mean("No", d, said)
                for d in DTYPES
            )
            ours = torch.tensor(response.follow_up)
            assert_three_way(ours, plain, truth, terms=math.log(259))


def test_pairs_are_needed_where_they_are_compared(tiny: Path) -> None:
    rows = [{"prompt": "Hi ", "completion": "there", "label": True}]
    with pytest.raises(ValueError, match="has one response: drop the flag"):
        scored(tiny, ScoringOptions(ches=True), rows=rows)
