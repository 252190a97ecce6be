r"""Losses of ragged lists of K responses, with their gradients and rewards, in one launch.

    u [G, K], grades q [G, K]  ->  loss [G], d loss / d u [G, K], reward [G, K]

Nearly all are sums over ordered pairs (i, j) of a list, K^2 terms of which none reaches memory. A
program owns BG whole lists and goes over blocks of BI rows of their [K, K] squares. A row is never
cut: what it needs of all its columns (a softmax's log-sum-exp, a rank, a smooth rank) is known
before it is left, and the gradient is a sum over rows of

    col_ij  to candidate j,  own_i = -sum_j col_ij  to candidate i

in one register row [BG, BK]. So one sweep gives value and gradient, each element has one owner, and
the order of every sum is fixed. Only LiPO, whose weights need every candidate's rank, sweeps twice.

Columns stay in registers up to K = 1024. A tile has 1024 elements: the whole squares of several
lists up to K = 32, and 16 rows of one list at K = 64.

With x_ij = BETA (u_j - u_i), A_i = log(1 + sum_j e^x_ij) and P_ij = e^(x_ij - A_i):

    below        sum_i A_i over j graded below i               col = BETA P
    contrast     the same, x_ij = (q_i - q_j) u_j - max_j (q_i - q_j) u_i
    softmax      sum_i t_i A_i over j != i, t of the grades    col = BETA t_i P
    exo          sum_i p_i log(p_i / t_i), p_i = e^-A_i        col = -BETA p_i log(p_i / t_i) P
    smooth rank  -NDCG of ranks 1 + sum_j sigmoid(x_ij / TEMPERATURE)
    logistic, hinge, squared: f(BETA (u_i - u_j)) of every pair
    nca, point squared, point logistic, first: no pairs at all

The specification is `fastpo.objectives`; this file only regroups its formulas.

Legend beyond `tile`'s: i row of the square, j column; `b_` values are [BG, BI, BK], `r_` rows
[BG, BI], `c_` columns [BG, BK]; values of a list, [BG], carry no prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .links import LN2, expm1, link, logistic, sigmoid
from .online import NEG_INF
from .tile import chip_of, on_device_of, precision


@triton.jit
def live_sum(x, m):
    """Sum a row [BG, n] over the columns of `m`."""
    return tl.sum(tl.where(m, x, 0.0), axis=1)


@triton.jit
def log1p_sum_exp(b_x, m_b):
    """Return (A, P): log(1 + sum_j e^x) over the j of `m_b`, 0 of none, and e^(x - A).

    P is e^(x - max) times a factor of the row: x - A itself, of two numbers that may be large,
    would carry the rounding of A into every element.
    """
    high = tl.max(tl.where(m_b, b_x, NEG_INF), axis=2)
    # A row of none, or one at +inf: subtract 0, since inf - inf is NaN.
    high = tl.where(tl.abs(high) == -NEG_INF, 0.0, high)
    b_e = tl.where(m_b, tl.exp(b_x - high[:, :, None]), 0.0)
    mass = tl.sum(b_e, axis=2)
    lse = high + tl.log(mass)
    share = sigmoid(lse) / tl.where(mass == 0.0, 1.0, mass)
    return logistic(-lse), b_e * share[:, :, None]


@triton.jit
def soft_targets(c_q, m_c, TEMPERATURE: tl.constexpr):
    """Return (max, sum) [BG] of a softmax of the grades: t = e^((q - max) / TEMPERATURE) / sum."""
    # Grades are subtracted before the temperature divides them: 7.85 / 1e-4 is rounded by .004 in
    # fp32, which is as much of t.
    c_s = tl.where(m_c, c_q, NEG_INF)
    top = tl.max(c_s, axis=1)
    top = tl.where(top == NEG_INF, 0.0, top)
    total = tl.sum(tl.exp((c_s - top[:, None]) / TEMPERATURE), axis=1)
    return top, tl.where(total == 0.0, 1.0, total)


@triton.jit
def discount(rank, LOG2: tl.constexpr):
    """Return 1 / log(1 + rank), or 1 / log2(1 + rank)."""
    if LOG2:
        return 1.0 / tl.log2(1.0 + rank)
    else:
        return 1.0 / tl.log(1.0 + rank)


@triton.jit
def without_pairs(
    c_u,
    c_q,
    m_c,
    o_j,
    FORM: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return (loss [BG], gradient [BG, BK]) of the forms that need no square."""
    NAME: tl.constexpr = FORM.form
    BETA: tl.constexpr = FORM.beta
    TEMPERATURE: tl.constexpr = FORM.temperature
    c_g = BETA * c_u
    if NAME == "first":  # against the mean of the others, by a margin of BETA DELTA
        m_first, m_rest = m_c & (o_j == 0)[None, :], m_c & (o_j > 0)[None, :]
        others = tl.sum(m_rest.to(ACC), axis=1)
        complete = (others > 0.0) & (tl.sum(m_first.to(ACC), axis=1) > 0.0)
        scale = 1.0 / tl.where(others == 0.0, 1.0, others)
        rest = live_sum(c_u, m_rest) * scale
        z = BETA * (live_sum(c_u, m_first) - rest - FORM.delta)
        slope = tl.where(complete, -BETA * sigmoid(-z), 0.0)
        c_grad = tl.where(m_first, slope[:, None], -(slope * scale)[:, None])
        loss = tl.where(complete, logistic(z), 0.0)
    elif NAME == "nca":
        top, total = soft_targets(c_q, m_c, TEMPERATURE)
        c_t = tl.exp((c_q - top[:, None]) / TEMPERATURE) / total[:, None]
        size = tl.sum(m_c.to(ACC), axis=1)
        c_n = (1.0 / tl.where(size == 0.0, 1.0, size))[:, None]
        loss = live_sum(logistic(-c_g) * c_n + c_t * logistic(c_g), m_c)
        c_grad = BETA * (sigmoid(c_g) * c_n - c_t * sigmoid(-c_g))
    elif NAME == "point logistic":
        loss = live_sum(c_q * logistic(c_g) + (1.0 - c_q) * logistic(-c_g), m_c)
        c_grad = BETA * ((1.0 - c_q) * sigmoid(c_g) - c_q * sigmoid(-c_g))
    else:
        tl.static_assert(NAME == "point squared", "unknown form")
        c_d = c_g - c_q
        loss, c_grad = live_sum(c_d * c_d, m_c), 2.0 * BETA * c_d
    return loss, c_grad


@triton.jit
def ranks(
    score_ptr,
    key_ptr,
    mask_ptr,
    base,
    m_g,
    c_x,
    c_key,
    m_c,
    K,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the rank [BG, BK] of each column's candidate by descending x, 1 is best.

    The smaller key wins a tie, without keys the earlier candidate.
    """
    o_j = tl.arange(0, BK)
    c_rank = tl.full(c_x.shape, 1.0, dtype=ACC)
    for first in range(0, BK, BI):
        o_i = first + tl.arange(0, BI)
        at = base + o_i[None, :]
        m_i = tl.load(mask_ptr + at, mask=m_g & (o_i < K)[None, :], other=0) != 0
        b_x = tl.load(score_ptr + at, mask=m_i, other=0)[:, :, None]
        if key_ptr is not None:
            r_key = tl.load(key_ptr + at, mask=m_i, other=0)
            m_first = r_key[:, :, None] < c_key[:, None, :]
        else:
            m_first = (o_i[:, None] < o_j[None, :])[None, :, :]
        m_ahead = (b_x > c_x[:, None, :]) | ((b_x == c_x[:, None, :]) & m_first)
        c_rank += tl.sum((m_ahead & m_i[:, :, None]).to(ACC), axis=1)
    return c_rank


@triton.jit
def list_kernel(
    score_ptr,
    grade_ptr,
    key_ptr,
    mask_ptr,
    loss_ptr,
    grad_ptr,
    reward_ptr,
    G,
    K,
    FORM: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    ACC: tl.constexpr,
    BG: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    """Write losses, gradients and rewards of BG lists."""
    NAME: tl.constexpr = FORM.form
    BETA: tl.constexpr = FORM.beta
    TARGETS: tl.constexpr = FORM.targets
    TEMPERATURE: tl.constexpr = FORM.temperature
    LOG2: tl.constexpr = FORM.log2
    o_g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    o_j = tl.arange(0, BK)
    m_g, base = (o_g < G)[:, None], (o_g * K)[:, None]
    at_j = base + o_j[None, :]
    m_in = m_g & (o_j < K)[None, :]
    m_c = tl.load(mask_ptr + at_j, mask=m_in, other=0) != 0
    # Padding is not even read: a NaN in it reaches nothing.
    c_x = tl.load(score_ptr + at_j, mask=m_c, other=0)
    c_u = c_x.to(ACC)
    # Grades are compared as they are: rounding could tie two of them.
    c_grade = c_x if NAME == "first" else tl.load(grade_ptr + at_j, mask=m_c, other=0)
    c_q = c_grade.to(ACC)
    size = tl.sum(m_c.to(ACC), axis=1)

    if not HAS_PAIRS:
        loss, c_grad = without_pairs(c_u, c_q, m_c, o_j, FORM, ACC)
    else:
        top, total = tl.zeros([BG], dtype=ACC), tl.sum(c_q, axis=1)
        if TARGETS == "softmax":
            top, total = soft_targets(c_q, m_c, TEMPERATURE)
        scale = tl.full([BG], 1.0, dtype=ACC)
        if FORM.normalise:
            # By the DCG of the best order; candidates of one grade add the same in any.
            c_rank = ranks(grade_ptr, None, mask_ptr, base, m_g, c_grade, c_x, m_c, K, ACC, BI, BK)
            ideal = live_sum(expm1(c_q * LN2) * discount(c_rank, LOG2), m_c)
            scale = 1.0 / tl.where(ideal == 0.0, 1.0, ideal)
        if FORM.size_power == 1:
            scale *= size
        if FORM.size_power == -1:  # the number of others
            scale *= 1.0 / tl.where(size > 1.0, size - 1.0, 1.0)
        if FORM.lambda_weights:
            c_key = tl.load(key_ptr + at_j, mask=m_c, other=0)
            c_rank = ranks(score_ptr, key_ptr, mask_ptr, base, m_g, c_x, c_key, m_c, K, ACC, BI, BK)
            # Of close ranks and grades only differences count: float64 keeps their digits.
            c_discount = discount(c_rank.to(tl.float64), LOG2)
            c_gain = tl.exp2(c_q.to(tl.float64))

        # Sums over up to 1024 rows, one addition a block: float64 costs nothing there.
        loss = tl.zeros([BG], dtype=tl.float64)
        c_grad = tl.zeros([BG, BK], dtype=tl.float64)
        for first in range(0, BK, BI):
            o_i = first + tl.arange(0, BI)
            at_i = base + o_i[None, :]
            m_i = tl.load(mask_ptr + at_i, mask=m_g & (o_i < K)[None, :], other=0) != 0
            r_x = tl.load(score_ptr + at_i, mask=m_i, other=0)
            r_grade = tl.load(grade_ptr + at_i, mask=m_i, other=0)
            r_u, r_q = r_x.to(ACC), r_grade.to(ACC)
            m_self = (o_i[:, None] == o_j[None, :])[None, :, :]
            m_b = m_i[:, :, None] & m_c[:, None, :]
            if FORM.ascending:
                m_better = m_b & (r_grade[:, :, None] < c_grade[:, None, :])
            else:
                m_better = m_b & (r_grade[:, :, None] > c_grade[:, None, :])
            b_z = BETA * (r_u[:, :, None] - c_u[:, None, :])
            b_q = r_q[:, :, None] - c_q[:, None, :]

            if NAME == "below":
                r_loss, b_col = log1p_sum_exp(-b_z, m_better)
                r_own = -tl.sum(b_col, axis=2)
            elif NAME == "contrast":
                b_t = tl.where(m_better, b_q, 0.0)
                steepest = tl.max(b_t, axis=2)
                b_x = b_t * c_u[:, None, :] - (steepest * r_u)[:, :, None]
                r_loss, b_col = log1p_sum_exp(b_x, m_better)
                r_own = -steepest * tl.sum(b_col, axis=2)
                b_col = b_t * b_col
            elif NAME == "softmax" or NAME == "exo":
                r_loss, b_col = log1p_sum_exp(-b_z, m_b & ~m_self)
                if NAME == "exo":
                    r_target, _ = log1p_sum_exp(b_q * (-1.0 / TEMPERATURE), m_b & ~m_self)
                    r_loss = tl.exp(-r_loss) * (r_target - r_loss)
                    r_t = -r_loss  # of d(p log p) the part dp sums to 0 over a list
                else:
                    if TARGETS == "softmax":
                        # An empty row's 0 may be far above the grades, and 0 * inf NaN.
                        r_t = (tl.where(m_i, r_q, NEG_INF) - top[:, None]) / TEMPERATURE
                        r_t = tl.exp(r_t) / total[:, None]
                    else:  # shares of the grades, equal where all are 0
                        equal = (1.0 / tl.where(size == 0.0, 1.0, size))[:, None]
                        r_t = r_q / tl.where(total == 0.0, 1.0, total)[:, None]
                        r_t = tl.where((total == 0.0)[:, None], equal, r_t)
                    r_loss = r_t * r_loss
                b_col = r_t[:, :, None] * b_col
                r_own = -tl.sum(b_col, axis=2)
            elif NAME == "smooth rank":
                b_s = tl.where(m_b & ~m_self, sigmoid(b_z * (-1.0 / TEMPERATURE)), 0.0)
                r_rank = 2.0 + tl.sum(b_s, axis=2)  # 1 + rank, as the discount wants it
                r_log, r_gain = tl.log2(r_rank), expm1(r_q * LN2)
                r_loss = -r_gain / r_log
                r_slope = r_gain / (r_log * r_log * r_rank * (LN2 * TEMPERATURE))
                b_col = r_slope[:, :, None] * b_s * sigmoid(b_z * (1.0 / TEMPERATURE))
                r_own = -tl.sum(b_col, axis=2)
            else:
                m_f = m_better
                if NAME == "squared":  # each pair once, whatever its grades
                    m_f = m_b & (o_i[:, None] < o_j[None, :])[None, :, :]
                    b_z -= b_q
                b_f, b_slope = link(b_z, NAME, 0.0, 0.0, 0.0, FORM.delta, 1.0)
                if FORM.lambda_weights:
                    r_key = tl.load(key_ptr + at_i, mask=m_i, other=0)
                    b_tied = r_x[:, :, None] == c_x[:, None, :]
                    b_tied = b_tied & (c_key[:, None, :] < r_key[:, :, None])
                    m_ahead = m_b & ((c_x[:, None, :] > r_x[:, :, None]) | b_tied)
                    r_rank = 1.0 + tl.sum(m_ahead.to(ACC), axis=2)
                    r_discount = discount(r_rank.to(tl.float64), LOG2)
                    r_gain = tl.exp2(r_q.to(tl.float64))
                    b_weight = (r_discount[:, :, None] - c_discount[:, None, :]).to(ACC)
                    b_weight *= (r_gain[:, :, None] - c_gain[:, None, :]).to(ACC)
                    b_f, b_slope = b_f * tl.abs(b_weight), b_slope * tl.abs(b_weight)
                b_col = tl.where(m_f, -b_slope, 0.0)
                r_loss = tl.sum(tl.where(m_f, b_f, 0.0), axis=2)
                r_own = -tl.sum(b_col, axis=2)

            loss += live_sum(r_loss, m_i).to(tl.float64)
            b_col += tl.where(m_self, r_own[:, :, None], 0.0)
            c_grad += tl.sum(b_col, axis=1).to(tl.float64)
        loss *= scale
        c_grad *= BETA * scale[:, None]

    out = reward_ptr.dtype.element_ty
    tl.store(loss_ptr + o_g, loss.to(out), mask=o_g < G)
    tl.store(grad_ptr + at_j, tl.where(m_c, c_grad, 0.0).to(out), mask=m_in)
    tl.store(reward_ptr + at_j, (BETA * c_u).to(out), mask=m_in)


class ListForm(NamedTuple):
    """Say which loss of lists: the constexpr FORM of `list_kernel`, see the module's docstring.

    Args:
        form: `below`, `contrast`, `softmax`, `exo`, `smooth rank`, `logistic`, `hinge`, `squared`,
            `nca`, `point squared`, `point logistic`, `first`.
        beta: factor of the scores; rewards are beta u.
        ascending: whether the smaller grade is the better one, as with ranks.
        targets: t of `softmax`: the `softmax` of the grades, or their `share`.
        temperature: of the grades, or of `smooth rank`'s sigmoid.
        delta: margin of `hinge` and `first`.
        lambda_weights: whether pairs are weighted by what swapping them would change in DCG.
        log2: whether ranks are discounted by log2 and not by the natural logarithm.
        normalise: whether to divide by the best order's DCG.
        size_power: 1 multiplies by the number of candidates, -1 divides by that of the others.
    """

    form: str
    beta: float = 1.0
    ascending: bool = False
    targets: str = "none"
    temperature: float = 1.0
    delta: float = 0.0
    lambda_weights: bool = False
    log2: bool = False
    normalise: bool = False
    size_power: int = 0

    def constants(self) -> dict[str, object]:
        """Return the constexprs of `list_kernel`."""
        alone = ("first", "nca", "point squared", "point logistic")
        return {"FORM": self, "HAS_PAIRS": self.form not in alone}


MAX_CANDIDATES = 1024
TILE = 1024
"""Elements of a tile, 8 a thread. With 16 `exo` at K = 64 spills on sm_90."""


def launch_options(chip: str) -> dict[str, int]:
    """Return warps and, on NVIDIA, the number of registers that a thread may have anyway."""
    if chip.startswith("gfx"):
        # The masks of LiPO's tile overflow the scalar registers of 4 wavefronts.
        return {"num_warps": 8}
    # Without maxnreg, ptxas spills LiPO's last 12 bytes to reach the next step of occupancy.
    return {"num_warps": 4, "maxnreg": 255} if chip.startswith("sm_") else {"num_warps": 4}


def blocks(num_candidates: int) -> dict[str, int]:
    """Return BG lists a program, BI rows a block, BK columns for lists of K candidates."""
    BK = max(2, triton.next_power_of_2(num_candidates))
    BI = min(BK, TILE // BK)
    return {"BG": min(32, TILE // (BI * BK)), "BI": BI, "BK": BK}


def list_losses(
    form: ListForm,
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    grade: Tensor | None = None,  # [G, K]
    tie_key: Tensor | None = None,  # [G, K] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [G], d losses / d score [G, K] and rewards [G, K], in the dtype of `score`.

    No autograd. Padded slots have reward and gradient 0, empty lists loss 0.

    Args:
        form: which loss.
        score: fp32 or fp64, the dtype of all arithmetic.
        mask: where there is a candidate.
        grade: grades, ranks or labels of any dtype; None for `first`.
        tie_key: decides between equal scores where there are `lambda_weights`.
    """
    G, K = score.shape
    assert mask.shape == (G, K)
    assert 1 <= K <= MAX_CANDIDATES
    losses, grads = score.new_empty(G), score.new_empty(G, K)
    rewards = torch.empty_like(grads)
    if G == 0:
        return losses, grads, rewards
    sizes = blocks(K)
    with on_device_of(score):
        list_kernel[(triton.cdiv(G, sizes["BG"]),)](
            score.contiguous(),
            None if grade is None else grade.contiguous(),
            None if tie_key is None else tie_key.contiguous(),
            mask.contiguous(),
            losses,
            grads,
            rewards,
            G,
            K,
            **form.constants(),
            ACC=precision(score.dtype)["ACC"],
            **sizes,
            **launch_options(chip_of(score.device)),
        )
    return losses, grads, rewards
