"""Sequence scores by `segment_reduce`: what the plain sums say, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpo.loss.scores import score_responses
from fastpo.segments import Segments
from fastpo.testing.three_way import assert_three_way

LENGTHS = torch.tensor([3, 0, 5, 1])
SEGMENTS = Segments(
    response=torch.arange(4).repeat_interleave(LENGTHS),
    grid=torch.tensor([[0, 1], [2, -1]]),
    label=torch.tensor([[True, False]] * 2),
    num_responses=4,
    extras={"gold": torch.tensor([3, 3])},
)
PER_TOKEN = ("logps", "kl_ref_policy", "ref_logps", "token_weights", "kl_weights")


def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Every score of two groups, and the gradients of their weighted sum by each input."""
    g = torch.Generator().manual_seed(0)
    given = {name: -torch.rand(9, generator=g) * 9 for name in PER_TOKEN}
    given["token_weights"][torch.tensor([1, 4])] = 0
    given = {name: value.to(dtype).requires_grad_() for name, value in given.items()}
    stats = {name: given[name] for name in ("logps", "kl_ref_policy")}
    beside = {name: given[name] for name in ("ref_logps", "token_weights", "kl_weights")}
    scores = score_responses(stats, SEGMENTS, **beside, backend=backend)
    roots = [value for value in scores.values() if value.requires_grad]
    cotangents = [torch.randn(root.shape, generator=g).to(dtype) for root in roots]
    grads = torch.autograd.grad(roots, list(given.values()), cotangents)
    return scores | {f"d{name}": grad for name, grad in zip(given, grads, strict=True)}


def test_three_way():
    ours, plain, truth = (
        run(torch.float32, "triton"), run(torch.float32, "torch"), run(torch.float64, "torch")
    )  # fmt: skip
    assert list(ours) == list(plain)
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype
        if value.is_floating_point():
            assert_three_way(value, plain[name], truth[name], name)
        else:
            assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("weighted", [True, False])
def test_same_bits_twice_of_inputs_of_any_type(weighted):
    g = torch.Generator().manual_seed(1)
    logps, ref = -torch.rand(9, generator=g), -torch.rand(9, generator=g).bfloat16()
    weights = torch.rand(9, generator=g, dtype=torch.float64) if weighted else None

    def ratio(backend: str, *given: Tensor) -> Tensor:
        of = {"token_weights": weights, "backend": backend}
        return score_responses({"logps": given[0]}, SEGMENTS, ref_logps=given[1], **of)["ratio"]

    ours, plain = ratio("triton", logps, ref), ratio("torch", logps, ref)
    assert torch.equal(ours, ratio("triton", logps, ref))
    assert_three_way(ours, plain, ratio("torch", logps.double(), ref.double()), "ratio")
