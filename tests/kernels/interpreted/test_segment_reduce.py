"""`segment_reduce`: ragged responses in packed order, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpo.kernels import segment_reduce as module
from fastpo.kernels.segment_reduce import REDUCTIONS, segment_reduce, segment_reduce_reference
from fastpo.kernels.tile import Config
from fastpo.testing.three_way import assert_three_way

STARTS = torch.tensor([0, 5, 5, 6, 106, 116, 120])
"""Lengths 5, 0, 1, 100, 10, 4: the last two have weights 0, and weights that sum to 0."""


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens are many steps."""
    monkeypatch.setattr(module, "pick", lambda *_: Config(BN=16, BV=0))


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    values, weights = -torch.rand(120, generator=g) * 9, torch.randn(120, generator=g)
    weights[:106:7] = 0
    weights[106:116] = 0
    weights[116:] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    return values.to(dtype), weights.to(dtype), torch.randn(6, generator=g).to(dtype)


def run(reduce, values, weights, cotangents, reduction) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (values, weights) if t is not None]
    out = reduce(leaves[0], STARTS, leaves[1] if len(leaves) > 1 else None, reduction)
    grads = torch.autograd.grad(out, leaves, cotangents)
    return {"value": out.detach(), **dict(zip(("dvalues", "dweights"), grads, strict=False))}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_three_way(reduction, weighted):
    values, weights, cotangents = inputs(torch.float32)
    given = (values, weights if weighted else None, cotangents)
    wide = tuple(None if t is None else t.double() for t in given)
    ours = run(segment_reduce, *given, reduction)
    plain = run(segment_reduce_reference, *given, reduction)
    truth = run(segment_reduce_reference, *wide, reduction)
    assert len(ours) == 3 if weighted else 2
    for name, value in ours.items():
        assert_three_way(value, plain[name], truth[name], name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    values, weights, _ = inputs(torch.float64)
    keep = slice(100, 116)  # a response of 6, and one whose weights are all 0
    starts = torch.tensor([0, 6, 6, 16])
    weights = weights[keep].clone()
    # Counting nonzero weights is no continuous function of them.
    weights[weights == 0] = 0.5 if reduction == "mean" else 0.0
    if reduction == "normalised":
        weights[6:] = torch.rand(10, generator=torch.Generator().manual_seed(1)) + 0.5
    leaves = values[keep].clone().requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: segment_reduce(x, starts, a, reduction), leaves)


def test_empty_and_weightless_responses_are_zero():
    values, weights, cotangents = inputs(torch.float32)
    for reduction in REDUCTIONS:
        found = run(segment_reduce, values, weights, cotangents, reduction)
        assert found["value"][1] == 0
        assert found["value"][4] == 0
        assert all(t.isfinite().all() for t in found.values())
    assert run(segment_reduce, values, weights, cotangents, "normalised")["value"][5] == 0


def test_same_bits_twice_whatever_the_strides():
    values, weights, cotangents = inputs(torch.float32)
    first = run(segment_reduce, values, weights, cotangents, "normalised")
    strided = torch.stack([values, values], dim=1)[:, 0]
    again = run(segment_reduce, strided, weights, cotangents, "normalised")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_tokens_of_no_response_have_no_gradient():
    values = torch.ones(10, requires_grad=True)
    segment_reduce(values, torch.tensor([2, 5])).sum().backward()
    assert values.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_no_responses_and_unknown_reductions():
    assert segment_reduce(torch.ones(3), torch.tensor([0])).shape == (0,)
    with pytest.raises(ValueError, match="unknown reduction 'max'; use 'sum', 'mean'"):
        segment_reduce(torch.ones(3), torch.tensor([0, 3]), reduction="max")
