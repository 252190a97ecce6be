r"""The coefficient d loss / d raw logit, from saved statistics of the rows and their cotangents.

    C_v = dz_v/da_v * ( g_logps (1[v = y] - p_v) + g_lse p_v + g_mean / V
                        - g_entropy p_v (log p_v + H) )

Three kernels write it: with recomputed products (`linear_coefficients`), with kept ones
(`kept_coefficients`) and right after the statistics (`logits_epilogue`). `divergence` adds to it.

C is formed in fp32, one-hot included, and rounded ONCE, to the dtype of the products. Rounding p
and subtracting it from the one-hot afterwards loses every digit of a confident token's gradient
(bf16, p_y = .998: relative error 1.1 against 1.3e-3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import load_rows, tanh


class Rows(NamedTuple):
    """Hold pointers to saved statistics and cotangents [N], None for what is absent or zero."""

    lse: Any
    lse_rest: Any
    logps: Any
    entropy: Any
    grad_logps: Any
    grad_lse: Any
    grad_mean_logit: Any
    grad_entropy: Any


class Grads(NamedTuple):
    """Say which cotangents there are: the constexpr GRADS of a kernel."""

    logps: bool
    lse: bool
    mean_logit: bool
    entropy: bool


DIFFERENTIABLE = Grads._fields


@triton.jit
def load_saved(rows_ptr, o_n, m_n, GRADS: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """Return (lse, lse_rest, log p_y, entropy) [BN] of the rows o_n."""
    entropy_ptr = rows_ptr.entropy if GRADS.entropy else None
    return (
        load_rows(rows_ptr.lse, o_n, m_n, BN, ACC),
        load_rows(rows_ptr.lse_rest, o_n, m_n, BN, ACC),
        load_rows(rows_ptr.logps, o_n, m_n, BN, ACC),
        load_rows(entropy_ptr, o_n, m_n, BN, ACC),
    )


@triton.jit
def load_grads(rows_ptr, o_n, m_n, BN: tl.constexpr, ACC: tl.constexpr):
    """Return the cotangents [BN] of the rows o_n, in the order of `Grads`."""
    return (
        load_rows(rows_ptr.grad_logps, o_n, m_n, BN, ACC),
        load_rows(rows_ptr.grad_lse, o_n, m_n, BN, ACC),
        load_rows(rows_ptr.grad_mean_logit, o_n, m_n, BN, ACC),
        load_rows(rows_ptr.grad_entropy, o_n, m_n, BN, ACC),
    )


@triton.jit
def coefficient(b_z, b_slope, m_label, saved, grads, V, GRADS: tl.constexpr):
    """Return C [BN, BV] in the accumulator's precision.

    `saved` and `grads` are what `load_saved` and `load_grads` return, V the whole vocabulary.
    """
    lse, lse_rest, logp, entropy = saved
    g_logps, g_lse, g_mean, g_entropy = grads
    # The label's column is a row vector, formed from the saved log p: for a confident token p and
    # 1 - p from z - lse would be rounding noise.
    at_label = tl.zeros_like(logp)
    factor = tl.zeros_like(logp)  # of p in the other columns
    p = tl.exp(logp)
    if GRADS.logps:
        t = tanh(0.5 * logp)
        at_label += g_logps * (-2.0 * t / (1.0 - t))  # 1 - p = -expm1(logp) without cancellation
        factor -= g_logps
    if GRADS.lse:
        at_label += g_lse * p
        factor += g_lse
    if GRADS.entropy:
        at_label -= g_entropy * tl.where(p == 0.0, 0.0, p * (logp + entropy))
    b_c = tl.zeros(b_z.shape, dtype=b_z.dtype)
    if GRADS.logps or GRADS.lse or GRADS.entropy:
        # lse_rest second: added to lse first, it would be rounded away.
        b_logp = (b_z - lse[:, None]) - lse_rest[:, None]
        b_p = tl.exp(b_logp)
        b_c = b_p * factor[:, None]
        if GRADS.entropy:
            # A logit of -inf has p = 0 and adds nothing; 0 * -inf would be NaN.
            b_e = b_p * (b_logp + entropy[:, None]) * g_entropy[:, None]
            b_c -= tl.where(b_p == 0.0, 0.0, b_e)
        b_c = tl.where(m_label, at_label[:, None], b_c)
    if GRADS.mean_logit:
        b_c += (g_mean / V)[:, None]
    return b_c * b_slope


def row_arguments(**rows: Tensor | None) -> dict[str, object]:
    """Return a kernel's `rows_ptr` and GRADS for the rows [N] by their names in `Rows`."""
    # Cotangents of a sum arrive expanded (stride 0); [N] copies are cheaper than a stride each.
    pointers = {name: x if x is None else x.contiguous() for name, x in rows.items()}
    present = (rows.get(f"grad_{name}") is not None for name in DIFFERENTIABLE)
    absent = dict.fromkeys(Rows._fields)
    return {"rows_ptr": Rows(**(absent | pointers)), "GRADS": Grads(*present)}
