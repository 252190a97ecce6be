"""Scalar links against 60 digits of mpmath, over the whole range of floats."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from fastpo.objectives import links
from fastpo.testing.scores import assert_rounded

from .formulas.common import nlsig, sigmoid

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
    "log_smoothed_0": (
        lambda z: links.log_smoothed_logistic(z, 0.0),
        lambda z: mpmath.log(mpmath.log1p(mpmath.exp(-z))),
        BOTH,
    ),
    "log_smoothed": (
        lambda z: links.log_smoothed_logistic(z, 0.25),
        lambda z: mpmath.log(
            0.75 * mpmath.log1p(mpmath.exp(-z)) + 0.25 * mpmath.log1p(mpmath.exp(z))
        ),
        BOTH,
    ),
    "kl_to_label": (
        lambda z: links.kl_to_label(z, 0.25),
        lambda z: sum(
            p * mpmath.log(p / q)
            for p, q in ((sigmoid(z), mpmath.mpf(0.75)), (sigmoid(-z), mpmath.mpf(0.25)))
        ),
        BOTH,
    ),
    "log_ratio_modulated": (
        lambda z: links.log_ratio_modulated(z, 0.25),
        lambda z: sigmoid(-4 * z) * nlsig(z) + sigmoid(4 * z) * mpmath.exp(-z),
        BOTH,
    ),
    "exponential": (links.GPO_LINKS["exponential"], lambda z: mpmath.exp(-z), BOTH),
    "savage": (links.GPO_LINKS["savage"], lambda z: sigmoid(-z) ** 2, BOTH),
    "squared": (links.GPO_LINKS["squared"], lambda z: (1 - z) ** 2, BOTH),
    "log_twice_sigmoid": (links.log_twice_sigmoid, lambda u: mpmath.log(2 * sigmoid(u)), BOTH),
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
@pytest.mark.parametrize("name", ["logistic", "smoothed", "robust", "hinge", "discopop"])
def test_link_at_the_ends(name: str, value: float) -> None:
    z = torch.tensor(value, requires_grad=True)
    loss = {
        "logistic": links.logistic,
        "smoothed": lambda z: links.smoothed_logistic(z, 0.0),
        "robust": lambda z: links.robust_logistic(z, 0.0),
        "hinge": lambda z: links.sigmoid_or_hinge(z, "hinge"),
        "discopop": lambda z: links.log_ratio_modulated(z, 0.05),
    }[name](z)
    (grad,) = torch.autograd.grad(loss, z)
    if math.isnan(value):
        assert loss.isnan()
        assert grad.isnan() or name in ("hinge", "discopop")  # relu's is 0 or 1
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
    with pytest.raises(ValueError, match=r"label_smoothing=.* must be in \[0, 0\.5\)"):
        link(torch.zeros(1), rate)


def test_live_stops_values_and_gradients() -> None:
    x = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    y = links.live(x, torch.tensor([True, False, False])).square()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [1.0, 0.0, 0.0]
    assert grad.tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_kl_to_label_is_flat_at_the_ends(value: float) -> None:
    z = torch.tensor(value, requires_grad=True)
    loss = links.kl_to_label(z, 0.25)
    (grad,) = torch.autograd.grad(loss, z)
    # One rounding to float32.
    assert loss.item() == pytest.approx(-math.log(0.75 if value > 0 else 0.25), rel=2**-23)
    assert grad == 0


@pytest.mark.parametrize("rate", [-0.1, 0.0, 0.5, math.nan])
def test_kl_to_label_needs_two_labels(rate: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=.* must be in \(0, 0\.5\)"):
        links.kl_to_label(torch.zeros(1), rate)


def test_sigmoid_or_hinge_refuses() -> None:
    z = torch.zeros(1)
    with pytest.raises(ValueError, match="'tanh'; use 'sigmoid' or 'hinge'"):
        links.sigmoid_or_hinge(z, "tanh")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1, but loss_type='hinge' smooths no"):
        links.sigmoid_or_hinge(z, "hinge", 0.1)


EXPONENTS = torch.tensor([-1e4, -300.0, -30.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 85.0, 300.0, 1e4])


@DTYPES
def test_expm1_difference_is_exact(dtype: torch.dtype) -> None:
    """Of all pairs of exponents: infinite where it is too large, never inf - inf."""
    a, b = torch.cartesian_prod(EXPONENTS, EXPONENTS).to(dtype).unbind(-1)
    x, y = torch.full_like(a, 0.25), torch.full_like(b, 0.3)
    ours = links.expm1_difference(a, b, x, y)
    with mpmath.workdps(60):
        numbers = [[mpmath.mpf(v) for v in t.tolist()] for t in (a, b, x, y)]
        truth, bound = [], []
        for p, q, v, w in zip(*numbers, strict=True):
            parts = v * mpmath.expm1(p), w * mpmath.expm1(q)
            truth.append(float(parts[0] - parts[1]))
            # the parts, and what the rounding of an exponent times its slope changes
            slopes = abs(v * p * mpmath.exp(p)) + abs(w * q * mpmath.exp(q))
            bound.append(float(abs(parts[0]) + abs(parts[1]) + slopes))
    exact, scale = (torch.tensor(v, dtype=torch.float64) for v in (truth, bound))
    assert_rounded(ours, exact, scale, "difference")
    same = links.expm1_difference(a, a, x, x)
    assert torch.equal(same, torch.zeros_like(same))


@DTYPES
def test_expm1_difference_gradient(dtype: torch.dtype) -> None:
    """x e^a and -y e^b; 0 where nothing depends on the difference, however steep it is."""
    a, b = (t.to(dtype).requires_grad_() for t in torch.cartesian_prod(EXPONENTS, EXPONENTS).T)
    x, y = torch.full_like(a, 0.25), torch.full_like(b, 0.5)
    difference = links.expm1_difference(a, b, x, y)
    slopes = torch.autograd.grad(difference.sum(), (a, b), retain_graph=True)
    assert torch.equal(slopes[0], 0.25 * a.exp())
    assert torch.equal(slopes[1], -0.5 * b.exp())
    none = torch.autograd.grad(difference, (a, b), torch.zeros_like(difference))
    assert all((slope == 0).all() for slope in none)
    a, b = (t.detach().double()[a.abs() < 2].requires_grad_() for t in (a, b))
    weights = (torch.full_like(a, w).requires_grad_() for w in (0.25, 0.5))
    assert torch.autograd.gradcheck(links.expm1_difference, (a, b.clamp(max=1), *weights))
