"""The scalar functions that the loss kernels are made of, exact to a few ulps over the whole range.

From exp and log alone: `tl` has no expm1, log1p or tanh, and libdevice cannot be interpreted. NaN
stays NaN, so conditions are written to be false of it where the other branch keeps it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .online import log1p
from .tile import tanh

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def logistic(z):
    """Return log(1 + e^-z)."""
    # e^-|z| never overflows and lies in [0, 1], the domain of log1p.
    return tl.where(z < 0, -z, 0.0) + log1p(tl.exp(-tl.abs(z)))


@triton.jit
def sigmoid(z):
    """Return 1 / (1 + e^-z), without overflow."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def relu(z):
    """Return max(z, 0), NaN where z is: `tl.maximum` would drop it."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def expm1(x):
    """Return e^x - 1."""
    # 2 t / (1 - t) has no cancellation near 0, but t nears 1 for large x, where e^x - 1 is exact.
    t = tanh(0.5 * x)
    return tl.where(x < 1.0, 2.0 * t / (1.0 - t), tl.exp(x) - 1.0)


@triton.jit
def product(a, b):
    """Return a b, where 0 * inf counts as 0: a link is flat where its margin overflows."""
    r = a * b
    # r != r is NaN's own test: `tl` has no isnan. NaN of a or b itself stays.
    return tl.where((r != r) & (a == a) & (b == b), 0.0, r)


@triton.jit
def at_most(x, LIMIT: tl.constexpr):
    """Return min(x, LIMIT), NaN where x is."""
    # Not the bare number, which `tl.where` would round to fp32.
    return tl.where(x > LIMIT, tl.full(x.shape, LIMIT, x.dtype), x)


@triton.jit
def link(
    z,
    LINK: tl.constexpr,
    RATE: tl.constexpr,
    LOG_RATE: tl.constexpr,
    LOG_REST: tl.constexpr,
    TARGET: tl.constexpr,
    TAU: tl.constexpr,
):
    """Return (f(z), f'(z)); the names are those of `pairwise.PairForm`."""
    if LINK == "logistic":  # labels flipped at RATE
        f = logistic(z)
        slope = -sigmoid(-z)
        if RATE != 0:  # else 0 * logistic(-inf) would be NaN
            f = (1.0 - RATE) * f + RATE * logistic(-z)
            slope = (1.0 - RATE) * slope + RATE * sigmoid(z)
    elif LINK == "hinge":
        f = relu(TARGET - z)
        slope = tl.where(z >= TARGET, 0.0, -1.0).to(z.dtype)
    elif LINK == "squared":
        f = (z - TARGET) * (z - TARGET)
        slope = 2.0 * (z - TARGET)
    elif LINK == "truncated_quadratic":
        d = relu(TARGET - z)
        f, slope = d * d, -2.0 * d
    elif LINK == "exponential":
        f = tl.exp(-z)
        slope = -f
    elif LINK == "sigmoid":
        f = sigmoid(-z)
        slope = -f * sigmoid(z)
    elif LINK == "savage":
        q = sigmoid(-z)
        f, slope = q * q, -2.0 * q * q * sigmoid(z)
    elif LINK == "linear":
        f, slope = -z, tl.full(z.shape, -1.0, z.dtype)
    elif LINK == "kl":  # KL(Bernoulli(sigmoid(z)) || Bernoulli(1 - RATE))
        # p q z would be 0 * inf at an infinite z; from 746 on e^-z is 0 in float64.
        z = tl.where(z > 1000.0, 1000.0, tl.where(z < -1000.0, -1000.0, z))
        p, q = sigmoid(z), sigmoid(-z)
        f = -p * (logistic(z) + LOG_REST) - q * (logistic(-z) + LOG_RATE)
        slope = p * q * (z - (LOG_REST - LOG_RATE))
    elif LINK == "modulated":  # (1 - g) logistic(z) + g e^-z, g = sigmoid(z / TAU)
        # An infinite z would meet g's zero slope: the last, linear part has it instead.
        inner = -at_most(-z, 1e30)
        g, rest = sigmoid(inner / TAU), sigmoid(-inner / TAU)
        m = tl.exp(-logistic(inner / TAU) - inner)
        f = rest * logistic(inner) + m + relu(-1e30 - z)
        slope = -g * rest / TAU * logistic(inner) - rest * sigmoid(-inner)
        slope += product(m, rest / TAU - 1.0)
    else:
        tl.static_assert(LINK == "none", "unknown link")
        f, slope = tl.zeros_like(z), tl.zeros_like(z)
    return f, slope
