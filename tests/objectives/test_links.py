"""Scalar links against 60 digits of mpmath, over the whole range of floats."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from fastpo.objectives import links

from .battery import assert_rounded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
WIDE = [
    0.0,
    1e-37,
    1e-20,
    1e-8,
    1e-4,
    0.1,
    0.5,
    math.log(2),
    1.0,
    3.0,
    20.0,
    80.0,
    90.0,
    700.0,
    1e4,
]
BOTH = [*WIDE, *(-x for x in WIDE[1:])]
LOGP = [-x for x in WIDE[1:]] + [-math.log(2) + 1e-6, -math.log(2) - 1e-6]


def exact(f, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f and its derivative at the numbers that x holds, as float64."""
    numbers = [mpmath.mpf(v) for v in x.tolist()]
    values = [float(f(v)) for v in numbers]
    # steps of 60 digits relative to the point: a finite difference is as good as a formula
    slopes = [float(mpmath.diff(f, v, h=(abs(v) or 1) * mpmath.mpf(10) ** -25)) for v in numbers]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)


LINKS = {
    "logistic": (links.logistic, lambda z: mpmath.log1p(mpmath.exp(-z)), BOTH),
    "smoothed": (
        lambda z: links.smoothed_logistic(z, 0.25),
        lambda z: 0.75 * mpmath.log1p(mpmath.exp(-z)) + 0.25 * mpmath.log1p(mpmath.exp(z)),
        BOTH,
    ),
    "robust": (
        lambda z: links.robust_logistic(z, 0.25),
        lambda z: 1.5 * mpmath.log1p(mpmath.exp(-z)) - 0.5 * mpmath.log1p(mpmath.exp(z)),
        BOTH,
    ),
    "log1mexp": (links.log1mexp, lambda x: mpmath.log1p(-mpmath.exp(x)), LOGP),
    "log_odds": (links.log_odds, lambda x: x - mpmath.log1p(-mpmath.exp(x)), LOGP),
}


@DTYPES
@pytest.mark.parametrize("name", LINKS)
def test_link_is_exact(name: str, dtype: torch.dtype) -> None:
    ours, truth, points = LINKS[name]
    with mpmath.workdps(60):
        x = torch.tensor(points, dtype=dtype, requires_grad=True)
        values, slopes = exact(truth, x.detach().double())
    result = ours(x)
    (grad,) = torch.autograd.grad(result.sum(), x)
    assert result.dtype == dtype
    assert_rounded(result, values, values.abs() + (x.detach() * slopes).abs(), "value")
    # The slopes are sums of e^x-like terms whose condition number is |x| at most. torch's own
    # derivative of logsigmoid is right to absolute, not relative rounding of 1.
    assert_rounded(grad, slopes, slopes.abs() * (1 + x.detach().double().abs()) + 1, "slope")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["logistic", "smoothed", "robust"])
def test_link_at_the_ends(name: str, value: float) -> None:
    z = torch.tensor(value, requires_grad=True)
    loss = {
        "logistic": links.logistic,
        "smoothed": lambda z: links.smoothed_logistic(z, 0.0),
        "robust": lambda z: links.robust_logistic(z, 0.0),
    }[name](z)
    (grad,) = torch.autograd.grad(loss, z)
    if math.isnan(value):
        assert loss.isnan()
        assert grad.isnan()
    else:
        assert loss == (0.0 if value > 0 else math.inf)
        assert grad == (0.0 if value > 0 else -1.0)


@DTYPES
def test_log_odds_of_certainty(dtype: torch.dtype) -> None:
    """A log-probability that rounds to 0 or above it: finite odds, zero gradient, not NaN."""
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([0.0, 1e-7, -tiny], dtype=dtype, requires_grad=True)
    odds = links.log_odds(x)
    (grad,) = torch.autograd.grad(odds.sum(), x)
    assert torch.equal(odds, odds[2].expand(3))
    truth = torch.tensor(-math.log(tiny), dtype=torch.float64)
    assert_rounded(odds[2], truth, truth, "log-odds")
    assert grad[:2].tolist() == [0.0, 0.0]
    assert links.log_odds(torch.tensor(math.nan, dtype=dtype)).isnan()
    assert links.log1mexp(torch.tensor(0.0, dtype=dtype)) == -math.inf


@pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0, math.nan])
@pytest.mark.parametrize("link", [links.smoothed_logistic, links.robust_logistic])
def test_flip_rate_is_checked(link, rate: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing is .*\[0, 0\.5\)"):
        link(torch.zeros(1), rate)


def test_live_stops_values_and_gradients() -> None:
    x = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    y = links.live(x, torch.tensor([True, False, False])).square()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [1.0, 0.0, 0.0]
    assert grad.tolist() == [2.0, 0.0, 0.0]
