"""Diffusion objectives: their margin is DPO's, and MaPO's score keeps its digits."""

from __future__ import annotations

import mpmath
import pytest
import torch

from fastpo.objectives.diffusion import _shortfall, diffusion_dpo, mapo
from fastpo.objectives.pairwise import dpo
from fastpo.testing.three_way import assert_three_way

from .test_families import PAIR, randn, value


def test_diffusion_dpo_is_dpo_on_halved_errors() -> None:
    e, ref, both = randn(4, 2).abs(), randn(4, 2, seed=1).abs(), PAIR.expand(4, 2)
    exact = value(dpo(-(e - ref) / 2, both, beta=2000.0))
    assert torch.equal(value(diffusion_dpo(e, ref, both, beta=2000.0)), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "x", [0.0, 1e-12, 1e-6, 1e-3, 0.25, 0.4999999, 0.5, 0.75, 3.0, 20.0, 200.0]
)
def test_mapo_shortfall(x: float, dtype: torch.dtype) -> None:
    """1 - x/(e^x - 1) and its derivative in 60 digits, on both sides of the series' end at 1/2."""
    at = torch.tensor(x, dtype=dtype, requires_grad=True)
    with mpmath.workdps(60):
        point = mpmath.mpf(at.item())
        grown = mpmath.exp(point)
        shortfall = 1 - point / (grown - 1) if x else mpmath.mpf(0)
        slope = (point * grown - grown + 1) / (grown - 1) ** 2 if x else mpmath.mpf(1) / 2
        exact = [torch.tensor(float(y), dtype=torch.float64) for y in (shortfall, slope)]
    found = _shortfall(at)
    (grad,) = torch.autograd.grad(found, at)
    # Above 1/2 the value is 1 less another number, the derivative a difference of two below 2.
    for name, ours, truth in (("value", found, exact[0]), ("slope", grad, exact[1])):
        terms = 0.0 if x < 0.5 else 2.0
        assert_three_way(ours, truth.to(dtype), truth, name, terms=terms)


def test_mapo_margin_of_nearly_equal_small_errors() -> None:
    """Errors of 1e-4 and 2e-4: phi rounds both to nearly 1, but the margin keeps its digits."""
    e = torch.tensor([[1e-4, 2e-4]])
    loss, truth = (value(mapo(x, PAIR)) for x in (e, e.double()))
    naive = [x / torch.expm1(x) for x in (e / 2)[0]]
    plain = e[:, 0] + 0.1 * torch.nn.functional.softplus(-1000 * (naive[0] - naive[1]))
    assert_three_way(loss, truth.float(), truth, "loss")
    assert (plain - truth).abs() > 4 * (loss - truth).abs()
