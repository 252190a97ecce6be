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

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Statistics(NamedTuple):
    """Hold one of each statistic: values [BN], pointers to [N] or None, or the constexpr WANT."""

    lse: Any
    lse_rest: Any
    logps: Any
    entropy: Any
    log_p2: Any
    top1: Any
    mean_logit: Any


STATISTICS = Statistics._fields
ACCUMULATED = STATISTICS[3:]
"""Statistics that need members of the state beyond label, high and mass: the member in the same
place of `State`."""


class State(NamedTuple):
    """Hold the state of rows [BN], in the order listed above."""

    label: Any
    high: Any
    mass: Any
    slope: Any
    square: Any
    before: Any
    total: Any


STATE = len(State._fields)

NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def log1p(x):
    """Return log(1 + x) for x in [0, 1].

    log(u) / (u - 1) is smooth, so the rounding of u = 1 + x cancels.
    """
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0.0, x, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def empty_state(BN: tl.constexpr, ACC: tl.constexpr):
    """Return the state of no columns."""
    zero = tl.zeros([BN], dtype=ACC)
    low = tl.full([BN], NEG_INF, dtype=ACC)
    return State(zero, low, zero, zero, zero, low, zero)


@triton.jit
def absorb(state, b_z, o_v, labels, V, WANT: tl.constexpr):
    """Return the state after the columns o_v [BV] with logits b_z [BN, BV].

    Columns from V on are void.
    """
    label, high, mass, slope, square, before, total = state
    m_label = o_v[None, :] == labels[:, None]
    m_v = o_v[None, :] < V
    label += tl.sum(tl.where(m_label, b_z, 0.0), axis=1)
    if WANT.top1:
        m_before = o_v[None, :] < labels[:, None]
        before = tl.maximum(before, tl.max(tl.where(m_before, b_z, NEG_INF), axis=1))
    if WANT.mean_logit:
        total += tl.sum(tl.where(m_v, b_z, 0.0), axis=1)
    b_z = tl.where(m_v & (o_v[None, :] != labels[:, None]), b_z, NEG_INF)
    new_high = tl.maximum(high, tl.max(b_z, axis=1))
    # All columns so far at -inf: subtract 0, since -inf - -inf is NaN.
    shift = tl.where(new_high == NEG_INF, 0.0, new_high)
    # exp is ex2.approx after a multiply. exp2 with log2(e) folded into the scale would spare one of
    # plain `split_kernel`'s four FMUL a logit: not tried before a GPU says that they show.
    fade = tl.exp(high - shift)
    b_d = b_z - shift[:, None]
    b_e = tl.exp(b_d)
    if WANT.entropy:
        slope = fade * tl.where(mass == 0.0, 0.0, slope + mass * (high - shift))
        slope += tl.sum(tl.where(b_e == 0.0, 0.0, b_e * b_d), axis=1)
    if WANT.log_p2:
        square = square * fade * fade + tl.sum(b_e * b_e, axis=1)
    mass = mass * fade + tl.sum(b_e, axis=1)
    return State(label, new_high, mass, slope, square, before, total)


@triton.jit
def merge(state):
    """Return one state [BN] from those of BS disjoint column sets, members [BN, BS]."""
    label, high, mass, slope, square, before, total = state
    new_high = tl.max(high, axis=1)
    shift = tl.where(new_high == NEG_INF, 0.0, new_high)[:, None]
    fade = tl.exp(high - shift)
    moved = fade * tl.where(mass == 0.0, 0.0, slope + mass * (high - shift))
    return State(
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
    """Return log p_y, log(1 - p_y) and log1p(exp(-|d|)) for the module docstring's d."""
    d = (high - label) + log_mass
    tail = log1p(tl.exp(-tl.abs(d)))
    return -(tl.maximum(d, 0.0) + tail), -(tl.maximum(-d, 0.0) + tail), tail


@triton.jit
def finish(state, V):
    """Return the statistics [BN] of a state over all columns."""
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
    label_p2 = 2.0 * log_p
    # Without other columns square and mass are 0, and log 0 - log 0 is NaN.
    others_p2 = tl.where(mass == 0.0, NEG_INF, 2.0 * (log_q - log_mass) + tl.log(square))
    log_p2 = tl.maximum(label_p2, others_p2) + log1p(tl.exp(-tl.abs(label_p2 - others_p2)))
    # torch's argmax is the first maximum: a tie with a column to the left of the label loses.
    top1 = ((label > before) & (label >= high)).to(lse.dtype)
    return Statistics(lse, lse_rest, log_p, entropy, log_p2, top1, total / V)


@triton.jit
def store_statistics(statistics, statistics_ptr, o_n, m_n):
    """Write the statistics of the rows o_n that have a pointer."""
    for i in tl.static_range(len(statistics)):
        if statistics_ptr[i] is not None:
            tl.store(statistics_ptr[i] + o_n, statistics[i], mask=m_n)


def check_names(want: Iterable[str]) -> tuple[str, ...]:
    """Return `want` as a tuple; ValueError for a name that is no statistic."""
    want = tuple(want)
    for name in want:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}; choose from {', '.join(STATISTICS)}")
    return want


def accumulated(want: Collection[str]) -> Statistics:
    """Return the constexpr WANT: which optional members of the state a sweep keeps.

    lse, lse_rest and logps are never True: they cost nothing, and a kernel is compiled per value.
    """
    return Statistics(*(name in want and name in ACCUMULATED for name in STATISTICS))


def pointers(outputs: Mapping[str, Tensor]) -> Statistics:
    """Return the `statistics_ptr` of a kernel, None for what is not in `outputs`."""
    return Statistics(*map(outputs.get, STATISTICS))


def statistics_reference(z: Tensor, labels: Tensor, want: Iterable[str]) -> dict[str, Tensor]:
    """Return the statistics in plain torch, in the dtype of the logits z [N, V]."""
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
