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
    """log(1 + e^-z)."""
    return tl.where(z < 0, -z, 0.0) + log1p(tl.exp(-tl.abs(z)))


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z), without overflow."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def relu(z):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def expm1(x):
    """e^x - 1. With t = tanh(x / 2) it is 2 t / (1 - t), which loses its digits for large x."""
    t = tanh(0.5 * x)
    return tl.where(x < 1.0, 2.0 * t / (1.0 - t), tl.exp(x) - 1.0)
