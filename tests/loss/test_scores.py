"""Sums over long responses keep their digits."""

from __future__ import annotations

import torch

from fastpo.loss.scores import score_responses
from fastpo.segments import Segments


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
