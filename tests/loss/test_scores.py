"""Every score of the table in `score_responses` in closed form, and sums that keep their digits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.loss.scores import score_responses
from fastpo.objectives.vocabulary import SCORES
from fastpo.segments import Segments

# Tokens of nine responses, the third empty. Values are eighths, whose sums float32 holds exactly.
LENGTHS = [3, 4, 0, 2, 1, 5, 2, 3, 1]
GRID = [[0, 1, 2], [3, -1, -1], [5, 6, -1]]
EXTRAS = {"mismatched": [4, 7, 8], "gold": [7, 2, 4]}
FACTS: dict[str, Any] = {
    "label": [[True, False, False], [True, True, True], [False, True, True]],
    "score": [[0.5, -1.0, 2.0], [3.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
    "rank": [[0, 1, 2], [0, 0, 0], [0, 0, 0]],
    "margin": [0.25, -1.5, 2.0],
    "population": [1, 0, 1],
}
LOGPS = [-1, -9, -3, -4, -2, -11, -7, -6, -5, -13, -8, -1, -2, -10, -3, -4, -12, -5, -6, -2, -7]
VALUES = {
    "logps": LOGPS,
    "ref_logps": [-1 - 7 * i % 11 for i in range(21)],
    "ref2_logps": [value - 3 * (i % 4) for i, value in enumerate(LOGPS)],
    "old_logps": [value + 2 - i % 5 for i, value in enumerate(LOGPS)],
    "kl": [1 + i % 3 for i in range(21)],
    "kl_reverse": [2 + 3 * (i % 4) for i in range(21)],
    "log_p2": [-1 - 2 * (i % 6) for i in range(21)],
    "entropy": [3 + 5 * (i % 2) for i in range(21)],
    "rewards": [(-1) ** i * (1 + i % 7) for i in range(21)],
}
TOKENS = {name: [value / 8 for value in values] for name, values in VALUES.items()}
STATISTIC = {"kl": "kl_ref_policy", "kl_reverse": "kl_policy_ref"}
# One response has zeros among its weights, one has zeros alone; some weights are negative.
WEIGHTS = [1.0, 0.0, -2.0, 0.5, 0.0, 0.25, 1.0, 0.0, 0.0, 3.0, 0.0, -0.5, 1.0, 0.0, 1.5]
WEIGHTS += [0.25, 1.0, -1.0, 0.0, 0.5, 0.0]
KL_WEIGHTS = [0.0, 0.0, 2.0, 0.5, -0.25, 0.0, 1.0, 0.0, 1.0, 0.5, 3.0, 0.0, 0.0, -2.0, 1.0]
KL_WEIGHTS += [0.5, 0.0, 0.0, 1.5, 0.0, -1.0]
CASES: dict[str, tuple[list[float] | None, list[float] | None]] = {
    "without weights": (None, None),
    "with weights": (WEIGHTS, None),
    "with KL weights": (None, KL_WEIGHTS),
    "with both weights": (WEIGHTS, KL_WEIGHTS),
}


def segments_of_the_table() -> Segments:
    return Segments(
        response=torch.tensor([r for r, length in enumerate(LENGTHS) for _ in range(length)]),
        grid=torch.tensor(GRID),
        num_responses=len(LENGTHS),
        extras={role: torch.tensor(index) for role, index in EXTRAS.items()},
        **{name: torch.tensor(values) for name, values in FACTS.items()},
    )


@functools.cache
def computed(case: str) -> dict[str, Tensor]:
    """The scores as the product gives them."""
    weights, kl_weights = (None if w is None else torch.tensor(w) for w in CASES[case])
    tokens = {name: torch.tensor(values) for name, values in TOKENS.items()}
    statistics = ("logps", "kl", "kl_reverse", "log_p2", "entropy")
    return score_responses(
        {STATISTIC.get(name, name): tokens[name] for name in statistics},
        segments_of_the_table(),
        ref_logps=tokens["ref_logps"],
        ref2_logps=tokens["ref2_logps"],
        old_logps=tokens["old_logps"],
        token_weights=weights,
        token_rewards=tokens["rewards"],
        kl_weights=kl_weights,
        per_token=True,
    )


def response_scores(first: int, length: int, case: str) -> dict[str, float]:
    """Plain loops over the `length` tokens of one response, which begins at token `first`."""
    weights, kl_weights = CASES[case]
    summed = ("logps", "ref_logps", "ref2_logps", "old_logps", "log_p2", "entropy")
    sums: dict[str, float] = dict.fromkeys((*summed, "kl", "kl_reverse"), 0.0)
    count, estimate = 0, 0.0
    for t in range(first, first + length):
        weight = 1.0 if weights is None else weights[t]
        kl_weight = weight if kl_weights is None else kl_weights[t]
        for name in sums:
            factor = kl_weight if name in ("kl", "kl_reverse") else weight
            sums[name] += factor * TOKENS[name][t]
        if weight != 0:
            count += 1
            estimate += (TOKENS["logps"][t] - TOKENS["ref_logps"][t]) ** 2 / 2
    sums["length"], sums["kl_estimate"] = float(count), estimate
    sums["ratio"] = sums["logps"] - sums["ref_logps"]
    sums["ratio2"] = sums["logps"] - sums["ref2_logps"]
    for name in ("logps", "ratio", "log_p2", "entropy"):
        sums[f"mean_{name}"] = sums[name] / count if count else 0.0
    return sums


def token_scores(first: int, length: int, longest: int, case: str) -> dict[str, list[float]]:
    """The tokens of one response without their weights, padded to `longest` with zeros."""
    weights, kl_weights = CASES[case]
    weights = weights or [1.0] * len(LOGPS)
    columns = {f"token_{name}": values for name, values in TOKENS.items()}
    columns["token_weights"] = weights
    columns["token_kl_weights"] = kl_weights or weights
    columns["token_mask"] = [
        a != 0 or b != 0 for a, b in zip(weights, columns["token_kl_weights"], strict=True)
    ]
    span = slice(first, first + length)
    padding = [0.0] * (longest - length)
    return {name: [*map(float, values[span]), *padding] for name, values in columns.items()}


@functools.cache
def expected(case: str) -> dict[str, Any]:
    """The whole table: name -> nested lists."""
    firsts = [sum(LENGTHS[:r]) for r in range(len(LENGTHS))]
    longest = max(LENGTHS)
    scores = [response_scores(*place, case) for place in zip(firsts, LENGTHS, strict=True)]
    tokens = [token_scores(*place, longest, case) for place in zip(firsts, LENGTHS, strict=True)]
    table: dict[str, Any] = {}
    for name in scores[0]:
        table[name] = [[scores[r][name] if r >= 0 else 0.0 for r in slots] for slots in GRID]
        for role, index in EXTRAS.items():
            table[f"{role}_{name}"] = [scores[r][name] for r in index]
    nothing = [0.0] * longest
    for name in tokens[0]:
        table[name] = [[tokens[r][name] if r >= 0 else nothing for r in slots] for slots in GRID]
    table |= {name: FACTS[name] for name in ("score", "rank", "margin", "population")}
    table["mask"] = [[r >= 0 for r in slots] for slots in GRID]
    table["label"] = [
        [label and r >= 0 for label, r in zip(labels, slots, strict=True)]
        for labels, slots in zip(FACTS["label"], GRID, strict=True)
    ]
    return table


@pytest.mark.parametrize("name", sorted(expected("with both weights")))
@pytest.mark.parametrize("case", CASES)
def test_score_in_closed_form(name: str, case: str):
    value, truth = computed(case)[name], torch.tensor(expected(case)[name], dtype=torch.float64)
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0)


def test_the_table_is_whole():
    """No score of the vocabulary is missing here, and none is returned without a closed form."""
    # Ties are broken by the loss module; denoising errors and what of them are no model's scores.
    elsewhere = {"tie_key", "error", "ref_error"}
    table = expected("with both weights")
    assert SCORES.keys() - elsewhere <= table.keys()
    assert computed("with both weights").keys() == table.keys()


def test_scores_of_what_is_given_only():
    logps = torch.tensor(TOKENS["logps"])
    scores = score_responses({"logps": logps}, segments_of_the_table())
    own = {"logps", "mean_logps", "length"}
    roles = {f"{role}_{name}" for role in EXTRAS for name in own}
    assert scores.keys() == own | roles | {*FACTS, "mask"}


def test_which_scores_carry_gradients():
    """Log-probs and token weights get gradients, none through `kl_estimate` and `length`."""
    logps = torch.tensor(TOKENS["logps"], requires_grad=True)
    weights = torch.tensor(WEIGHTS, requires_grad=True)
    ref_logps = torch.tensor(TOKENS["ref_logps"])
    scores = score_responses(
        {"logps": logps}, segments_of_the_table(), ref_logps=ref_logps, token_weights=weights
    )
    assert not scores["kl_estimate"].requires_grad
    assert not scores["length"].requires_grad
    in_grid = torch.tensor(
        [float(any(r in slots for slots in GRID)) for r, n in enumerate(LENGTHS) for _ in range(n)]
    )
    to_logps, to_weights = torch.autograd.grad(scores["ratio"].sum(), (logps, weights))
    assert torch.equal(to_logps, weights.detach() * in_grid)
    assert torch.equal(to_weights, (logps - ref_logps).detach() * in_grid)


def long_pair(length: int) -> Segments:
    return Segments(
        response=torch.tensor([0, 1]).repeat_interleave(length),
        grid=torch.tensor([[0, 1]]),
        label=torch.tensor([[True, False]]),
        num_responses=2,
    )


def test_sums_of_long_responses_are_rounded_once():
    """100,000 tokens: one after the other in float32 the sum is off by thousands of its eps."""
    segments, g = long_pair(100_000), torch.Generator().manual_seed(0)
    logps = -torch.rand(200_000, generator=g)
    weights = torch.rand(200_000, generator=g)
    scores = score_responses({"logps": logps}, segments, token_weights=weights)
    truth = (logps * weights).double().view(1, 2, -1).sum(-1)
    assert torch.equal(scores["logps"], truth.float())


def test_ratio_to_a_near_reference_keeps_its_digits():
    """Sums of 20,000 nats differ by 1e-3: float32 resolves them to 2e-3 only."""
    segments, g = long_pair(20_000), torch.Generator().manual_seed(0)
    logps = -torch.rand(40_000, generator=g) * 2
    ref_logps = logps + 1e-6 * torch.randn(40_000, generator=g)
    scores = score_responses({"logps": logps}, segments, ref_logps=ref_logps)
    truth = (logps.double() - ref_logps.double()).view(1, 2, -1).sum(-1)
    assert ((scores["ratio"] - truth) / truth).abs().max() < 1e-6
    same = score_responses({"logps": logps}, segments, ref_logps=logps)
    assert (same["ratio"] == 0).all()
