r"""Row statistics of a softmax in one pass over its logits.

The state of a row after any set of columns, the label's own column kept apart:

    label    z_y, or 0 while the label has not been seen
    high     m = max z                    over the other columns, -inf while there are none
    mass     s = sum exp(z - m)           "
    slope    t = sum exp(z - m) (z - m)   "           entropy
    square   r = sum exp(z - m)^2         "           log sum p^2
    before   max z over the columns left of the label   top1
    total    sum z over all columns                     mean_logit

Why the label is kept apart: with d = (m - z_y) + log s, the others' log-sum-exp less the label,

    log p_y = -softplus(d)      log(1 - p_y) = -softplus(-d)

For a confident token d is very negative and both are exact to a few ulps, where z_y - lse would be
the difference of two nearly equal numbers (p_y = .9999 at z = 1000: fp32 keeps no digit of it).
The other statistics are sums of terms of one sign built from these two:

    H           = -p log p - q log q + q (log s - t / s)              p = p_y, q = 1 - p_y
    log sum p^2 = logaddexp(2 log p, 2 log q + log r - 2 log s)

`lse_rest` is what rounding lse to fp32 lost. Recomputed probabilities exp(z - lse) would otherwise
sum to 1 + eps |lse|, one error shared by all V columns of a gradient.

Members that no requested statistic needs stay zero and compile away.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

STATISTICS = ("lse", "lse_rest", "logps", "entropy", "log_p2", "top1", "mean_logit")
ACCUMULATED = ("entropy", "log_p2", "top1", "mean_logit")
"""Statistics that need members of the state beyond label, high and mass."""

STATE = 7
"""Members of the state, in the order listed above."""

NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]. log(u) / (u - 1) is smooth: the rounding of u = 1 + x cancels."""
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0.0, x, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def empty_state(BN: tl.constexpr, ACC: tl.constexpr):
    zero = tl.zeros([BN], dtype=ACC)
    low = tl.full([BN], NEG_INF, dtype=ACC)
    return zero, low, zero, zero, zero, low, zero


@triton.jit
def absorb(
    state,
    b_z,
    o_v,
    labels,
    V,
    WANT_ENTROPY: tl.constexpr,
    WANT_LOG_P2: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    WANT_MEAN_LOGIT: tl.constexpr,
):
    """The state after the columns o_v [BV] with logits b_z [BN, BV]; columns from V on are void."""
    label, high, mass, slope, square, before, total = state
    m_label = o_v[None, :] == labels[:, None]
    m_v = o_v[None, :] < V
    label += tl.sum(tl.where(m_label, b_z, 0.0), axis=1)
    if WANT_TOP1:
        m_before = o_v[None, :] < labels[:, None]
        before = tl.maximum(before, tl.max(tl.where(m_before, b_z, NEG_INF), axis=1))
    if WANT_MEAN_LOGIT:
        total += tl.sum(tl.where(m_v, b_z, 0.0), axis=1)
    b_z = tl.where(m_v & (o_v[None, :] != labels[:, None]), b_z, NEG_INF)
    new_high = tl.maximum(high, tl.max(b_z, axis=1))
    # All columns so far at -inf: subtract 0, since -inf - -inf is NaN.
    shift = tl.where(new_high == NEG_INF, 0.0, new_high)
    fade = tl.exp(high - shift)
    b_d = b_z - shift[:, None]
    b_e = tl.exp(b_d)
    if WANT_ENTROPY:
        slope = fade * tl.where(mass == 0.0, 0.0, slope + mass * (high - shift))
        slope += tl.sum(tl.where(b_e == 0.0, 0.0, b_e * b_d), axis=1)
    if WANT_LOG_P2:
        square = square * fade * fade + tl.sum(b_e * b_e, axis=1)
    mass = mass * fade + tl.sum(b_e, axis=1)
    return label, new_high, mass, slope, square, before, total


@triton.jit
def merge(label, high, mass, slope, square, before, total):
    """One state from those of disjoint column sets: members [BN, BS] -> [BN]."""
    new_high = tl.max(high, axis=1)
    shift = tl.where(new_high == NEG_INF, 0.0, new_high)[:, None]
    fade = tl.exp(high - shift)
    moved = fade * tl.where(mass == 0.0, 0.0, slope + mass * (high - shift))
    return (
        tl.sum(label, axis=1),
        new_high,
        tl.sum(mass * fade, axis=1),
        tl.sum(moved, axis=1),
        tl.sum(square * fade * fade, axis=1),
        tl.max(before, axis=1),
        tl.sum(total, axis=1),
    )


@triton.jit
def split_label(label, high, log_mass):
    """log p_y, log(1 - p_y) and log1p(exp(-|d|)) of the module docstring's d."""
    d = (high - label) + log_mass
    tail = log1p(tl.exp(-tl.abs(d)))
    return -(tl.maximum(d, 0.0) + tail), -(tl.maximum(-d, 0.0) + tail), tail


@triton.jit
def finish(state, V):
    """State over all columns -> the statistics, each [BN], in the order of STATISTICS."""
    label, high, mass, slope, square, before, total = state
    log_mass = tl.log(mass)
    # lse = top + above, both parts exact: a row of logits near 1000 keeps its last digits.
    top = tl.maximum(high, label)
    others = (high - top) + log_mass
    log_p, log_q, tail = split_label(label, high, log_mass)
    above = tl.maximum(others, label - top) + tail
    lse = top + above
    lse_rest = above - (lse - top)
    p, q = tl.exp(log_p), tl.exp(log_q)
    # Compared with == 0 and not > 0, so that a NaN row stays NaN.
    entropy = tl.where(q == 0.0, 0.0, q * (log_mass - slope / mass - log_q))
    entropy -= tl.where(p == 0.0, 0.0, p * log_p)
    own = 2.0 * log_p
    rest = tl.where(mass == 0.0, NEG_INF, 2.0 * (log_q - log_mass) + tl.log(square))
    log_p2 = tl.maximum(own, rest) + log1p(tl.exp(-tl.abs(own - rest)))
    top1 = ((label > before) & (label >= high)).to(lse.dtype)
    return lse, lse_rest, log_p, entropy, log_p2, top1, total / V


@triton.jit
def store_statistics(
    statistics,
    o_n,
    m_n,
    lse_ptr,
    lse_rest_ptr,
    logps_ptr,
    entropy_ptr,
    log_p2_ptr,
    top1_ptr,
    mean_logit_ptr,
    WANT_LSE: tl.constexpr,
    WANT_LSE_REST: tl.constexpr,
    WANT_LOGPS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_LOG_P2: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    WANT_MEAN_LOGIT: tl.constexpr,
):
    """Write the wanted statistics of the rows o_n."""
    lse, lse_rest, logps, entropy, log_p2, top1, mean_logit = statistics
    if WANT_LSE:
        tl.store(lse_ptr + o_n, lse, mask=m_n)
    if WANT_LSE_REST:
        tl.store(lse_rest_ptr + o_n, lse_rest, mask=m_n)
    if WANT_LOGPS:
        tl.store(logps_ptr + o_n, logps, mask=m_n)
    if WANT_ENTROPY:
        tl.store(entropy_ptr + o_n, entropy, mask=m_n)
    if WANT_LOG_P2:
        tl.store(log_p2_ptr + o_n, log_p2, mask=m_n)
    if WANT_TOP1:
        tl.store(top1_ptr + o_n, top1, mask=m_n)
    if WANT_MEAN_LOGIT:
        tl.store(mean_logit_ptr + o_n, mean_logit, mask=m_n)


def check_names(want: Iterable[str]) -> tuple[str, ...]:
    """`want` as a tuple; ValueError for a name that is no statistic."""
    want = tuple(want)
    for name in want:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}; choose from {', '.join(STATISTICS)}")
    return want


def flags(want: Iterable[str], names: Iterable[str] = STATISTICS) -> dict[str, bool]:
    """The WANT_X constexprs of `names`."""
    want = set(want)
    return {f"WANT_{name.upper()}": name in want for name in names}


def pointers(outputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The x_ptr arguments of `store_statistics`, None for what is not wanted."""
    return {f"{name}_ptr": outputs.get(name) for name in STATISTICS}


def statistics_reference(z: Tensor, labels: Tensor, want: Iterable[str]) -> dict[str, Tensor]:
    """The statistics in plain torch, in the dtype of the logits z [N, V]."""
    logp = z.log_softmax(-1)
    p = logp.exp()
    top = z.amax(-1, keepdim=True)
    make = {
        "lse": lambda: z.logsumexp(-1),
        "lse_rest": lambda: (z - top).logsumexp(-1) - (z.logsumexp(-1) - top[:, 0]),
        "logps": lambda: logp.gather(-1, labels[:, None]).squeeze(-1),
        "entropy": lambda: -torch.where(p == 0, 0.0, p * logp).sum(-1),
        "log_p2": lambda: (2 * logp).logsumexp(-1),
        "top1": lambda: (z.argmax(-1) == labels).to(z.dtype),
        "mean_logit": lambda: z.mean(-1),
    }
    return {name: make[name]() for name in want}
