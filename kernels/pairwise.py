r"""Losses of pairs of responses, with their gradients and rewards, in one launch.

    x [G, 2]  ->  loss [G], d loss / d x [G, 2], reward [G, 2]

Slot 0 is the chosen response w, slot 1 the rejected one l. Every loss is put together from a few
parts, each a constexpr (`PairForm`): a transform of the scores, a margin, a link, and terms of the
single sides.

    c = transform(x)
    v_w = CHOSEN (c_w + PENALTY min(0, c_w)),  v_l = REJECTED c_l
    z = v_w - v_l + shift(given)
    loss = SCALE link(z) + SIDE_SCALE sides(v_w, v_l)

The loss is a mean over pairs, so its gradient at a unit cotangent is all that backward will need:
it is written along with the loss, and backward multiplies. Nothing is kept for a second sweep.

All arithmetic is float64. A pair takes some hundred instructions beside the launch itself, and in
exchange every number is the float64 result rounded once: f-divergences hold e^u of log-ratios near
100, which float32 has no room for.

Traffic: a pair's scores, mask and outputs, 42 bytes in float32. What a form does not use compiles
away. The formulas' specification is `fastpo.objectives`; this file only regroups them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .links import LN2, at_most, expm1, link, logistic, product, relu, sigmoid
from .online import log1p
from .tile import Config, Table, chip_of, on_device_of, pick

# 0.9 log of the largest float64: e^HALF squared is past it, and e^HALF is not.
HALF: tl.constexpr = tl.constexpr(638.8)


@triton.jit
def transform(x, FORM: tl.constexpr, TINY: tl.constexpr):
    """Return (c, dc/dx)."""
    TRANSFORM: tl.constexpr = FORM.transform
    POWER: tl.constexpr = FORM.power
    CLAMP: tl.constexpr = FORM.clamp
    c, slope = x, tl.full(x.shape, 1.0, tl.float64)
    if TRANSFORM == "power":  # (e^(POWER x) - 1) / POWER
        e = POWER * x
        if CLAMP is not None:
            slope = tl.where(e > CLAMP, 0.0, slope)
            e = at_most(e, CLAMP)
        c, slope = expm1(e) / POWER, slope * tl.exp(e)
    if TRANSFORM == "twice sigmoid":  # log(2 sigmoid(x))
        c = tl.where(x > 0, 0.0, x) - log1p(0.5 * expm1(-tl.abs(x)))
        slope = sigmoid(-x)
    if TRANSFORM == "exp":
        c = tl.exp(x)
        slope = c
    if TRANSFORM == "log odds":  # x - log(1 - e^x); log-probabilities of 0 count as -TINY
        sure = x > -TINY
        x = at_most(x, -TINY)
        rest = -expm1(x)
        near = tl.log(rest)
        c = x - tl.where(x > -LN2, near, log1p(-tl.exp(at_most(x, -LN2))))
        slope = tl.where(sure, 0.0, 1.0 / rest)
    return c, slope


@triton.jit
def power_margin(x_w, x_l, FORM: tl.constexpr):
    """Return CHOSEN c_w - REJECTED c_l for the transform "power".

    It is infinite only where the difference is, not where one of its terms is.
    """
    CHOSEN: tl.constexpr = FORM.chosen
    REJECTED: tl.constexpr = FORM.rejected
    POWER: tl.constexpr = FORM.power
    CLAMP: tl.constexpr = FORM.clamp
    a, b = POWER * x_w, POWER * x_l
    if CLAMP is not None:
        a, b = at_most(a, CLAMP), at_most(b, CLAMP)
    top = tl.where(a > b, a, b)
    top = tl.where(top < 0, 0.0, top)
    # e^-top (e^t - 1), of which neither factor overflows.
    s_a = tl.where(a > 0, -expm1(-tl.abs(a)) * tl.exp(a - top), expm1(-tl.abs(a)) * tl.exp(-top))
    s_b = tl.where(b > 0, -expm1(-tl.abs(b)) * tl.exp(b - top), expm1(-tl.abs(b)) * tl.exp(-top))
    # e^top in two factors of its root: the difference may be finite where e^top is not.
    half = tl.exp(at_most(0.5 * top, HALF))
    return ((CHOSEN / POWER) * s_a - (REJECTED / POWER) * s_b) * half * half


@triton.jit
def sides(v_w, v_l, q_w, q_l, FORM: tl.constexpr):
    """Return (s, ds/dv_w, ds/dv_l) of the terms that see one side at a time."""
    SIDES: tl.constexpr = FORM.sides
    MIX: tl.constexpr = FORM.mix
    TARGET: tl.constexpr = FORM.side_target
    if SIDES == "logistic":  # the share MIX of the rejected side's term falls on the chosen one
        f = logistic(v_w) + (1.0 - MIX) * logistic(-v_l)
        slope_w, slope_l = -sigmoid(-v_w), (1.0 - MIX) * sigmoid(v_l)
        if MIX != 0:  # 0 * logistic(-inf) would be NaN
            f += MIX * logistic(-v_w)
            slope_w += MIX * sigmoid(v_w)
    elif SIDES == "sigmoid":
        f = sigmoid(-v_w) + sigmoid(v_l)
        slope_w = -sigmoid(v_w) * sigmoid(-v_w)
        slope_l = sigmoid(v_l) * sigmoid(-v_l)
    elif SIDES == "chosen sigmoid":
        f = sigmoid(v_w)
        slope_w, slope_l = f * sigmoid(-v_w), tl.zeros_like(v_l)
    elif SIDES == "squares":  # to TARGET (2 q - 1), q the side's probability of winning
        d_w, d_l = v_w - TARGET * (2.0 * q_w - 1.0), v_l - TARGET * (2.0 * q_l - 1.0)
        f = d_w * d_w + d_l * d_l
        slope_w, slope_l = 2.0 * d_w, 2.0 * d_l
    else:
        tl.static_assert(SIDES == "none", "unknown sides")
        f, slope_w, slope_l = tl.zeros_like(v_w), tl.zeros_like(v_w), tl.zeros_like(v_l)
    return f, slope_w, slope_l


@triton.jit
def pair_kernel(
    score_ptr,
    reward_of_ptr,
    given_ptr,
    mask_ptr,
    loss_ptr,
    grad_ptr,
    reward_ptr,
    G,
    FORM: tl.constexpr,
    LOGS: tl.constexpr,
    TINY: tl.constexpr,
    BN: tl.constexpr,
):
    """Write losses, gradients and rewards of BN pairs; LOGS is (log rate, log(1 - rate))."""
    # Unpacked: triton 3.6 multiplies members by the first one's method, and int * float has none;
    # nor does it pass a string on to another function.
    LINK: tl.constexpr = FORM.link
    TRANSFORM: tl.constexpr = FORM.transform
    GIVEN: tl.constexpr = FORM.given
    GIVEN_SCALE: tl.constexpr = FORM.given_scale
    CHOSEN: tl.constexpr = FORM.chosen
    REJECTED: tl.constexpr = FORM.rejected
    PENALTY: tl.constexpr = FORM.penalty
    SCALE: tl.constexpr = FORM.scale
    SIDE_SCALE: tl.constexpr = FORM.side_scale
    REWARD: tl.constexpr = FORM.reward
    o_g = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_w, o_l, m_g = 2 * o_g, 2 * o_g + 1, o_g < G
    m_w = tl.load(mask_ptr + o_w, mask=m_g, other=0) != 0
    m_l = tl.load(mask_ptr + o_l, mask=m_g, other=0) != 0
    both = m_w & m_l
    # Padding is not even read: a NaN in it reaches nothing.
    x_w = tl.load(score_ptr + o_w, mask=m_w, other=0.0).to(tl.float64)
    x_l = tl.load(score_ptr + o_l, mask=m_l, other=0.0).to(tl.float64)
    c_w, slope_w = transform(x_w, FORM, TINY)
    c_l, slope_l = transform(x_l, FORM, TINY)
    r_w, r_l = x_w, x_l
    if FORM.transformed_reward:
        r_w, r_l = c_w, c_l
    if reward_of_ptr is not None:
        r_w = tl.load(reward_of_ptr + o_w, mask=m_w, other=0.0).to(tl.float64)
        r_l = tl.load(reward_of_ptr + o_l, mask=m_l, other=0.0).to(tl.float64)
    out = reward_ptr.dtype.element_ty
    tl.store(reward_ptr + o_w, tl.where(m_w, REWARD * r_w, 0.0).to(out), mask=m_g)
    tl.store(reward_ptr + o_l, tl.where(m_l, REWARD * r_l, 0.0).to(out), mask=m_g)

    if PENALTY != 0:
        slope_w = tl.where(c_w < 0, (1.0 + PENALTY) * slope_w, slope_w)
        c_w = tl.where(c_w < 0, (1.0 + PENALTY) * c_w, c_w)
    v_w, v_l = CHOSEN * c_w, REJECTED * c_l
    slope_w, slope_l = CHOSEN * slope_w, REJECTED * slope_l
    z = v_w - v_l
    if TRANSFORM == "power":
        z = power_margin(x_w, x_l, FORM)
    z += FORM.shift

    q_w, q_l = tl.full(z.shape, 1.0, tl.float64), tl.zeros_like(z)
    if GIVEN == "margin":
        z += GIVEN_SCALE * tl.load(given_ptr + o_g, mask=both, other=0.0).to(tl.float64)
    elif GIVEN != "none":
        empty: tl.constexpr = 1.0 if GIVEN == "log ratio" else 0.0
        q_w = tl.load(given_ptr + o_w, mask=m_w, other=empty).to(tl.float64)
        q_l = tl.load(given_ptr + o_l, mask=m_l, other=empty).to(tl.float64)
    if GIVEN == "difference":
        z += GIVEN_SCALE * (q_w - q_l)
    if GIVEN == "log difference" and GIVEN_SCALE != 0:
        z += GIVEN_SCALE * tl.log(relu(q_w - q_l))
    if GIVEN == "log ratio" and GIVEN_SCALE != 0:
        z += GIVEN_SCALE * (tl.log(q_w) - tl.log(q_l))
    if GIVEN == "chosen wins":
        q_l = 1.0 - q_w

    f, f_slope = link(z, LINK, FORM.rate, LOGS[0], LOGS[1], FORM.target, FORM.tau)
    s, s_slope_w, s_slope_l = sides(v_w, v_l, q_w, q_l, FORM)
    loss = SCALE * f + SIDE_SCALE * s
    d_w = product(SCALE * f_slope + SIDE_SCALE * s_slope_w, slope_w)
    d_l = product(SIDE_SCALE * s_slope_l - SCALE * f_slope, slope_l)
    tl.store(loss_ptr + o_g, tl.where(both, loss, 0.0).to(out), mask=m_g)
    tl.store(grad_ptr + o_w, tl.where(both, d_w, 0.0).to(out), mask=m_g)
    tl.store(grad_ptr + o_l, tl.where(both, d_l, 0.0).to(out), mask=m_g)


class PairForm(NamedTuple):
    """Say which loss of pairs: the constexpr FORM of `pair_kernel`, see the module's docstring.

    Args:
        transform: `none`; `power`, (e^(power x) - 1) / power with exponents up to `clamp`;
            `twice sigmoid`, log(2 sigmoid(x)); `exp`; `log odds`, x - log(1 - e^x).
        chosen, rejected: factors of the sides in the margin.
        penalty: extra factor of a negative chosen c.
        given: what `given` adds to the margin, times `given_scale`: `none`; `margin`, a number for
            every pair; `difference`, `log difference`, `log ratio` of a number for every response;
            `wins` and `chosen wins` add nothing, but are probabilities for `squares`.
        shift: a constant of the margin.
        link: `logistic` (labels flipped at `rate`), `hinge`, `squared`, `truncated_quadratic` (all
            three about `target`), `exponential`, `sigmoid`, `savage`, `linear`, `kl` (from labels
            with `rate`), `modulated` (by `tau`), `none`.
        sides: `logistic` (with `mix`), `sigmoid`, `chosen sigmoid`, `squares` (to `side_target`).
        scale, side_scale: factors of the two parts of the loss.
        reward: factor of the scores in the rewards.
        transformed_reward: whether it is the factor of c instead.
    """

    link: str = "logistic"
    transform: str = "none"
    power: float = 1.0
    clamp: float | None = None
    chosen: float = 1.0
    rejected: float = 1.0
    penalty: float = 0.0
    given: str = "none"
    given_scale: float = 0.0
    shift: float = 0.0
    rate: float = 0.0
    target: float = 1.0
    tau: float = 1.0
    scale: float = 1.0
    sides: str = "none"
    side_scale: float = 1.0
    side_target: float = 0.0
    mix: float = 0.0
    reward: float = 1.0
    transformed_reward: bool = False

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        """Return the constexprs of `pair_kernel`, for scores of `dtype`."""
        # TINY: the scores' dtype says how near 1 a probability can be.
        logs = 0.0, 0.0
        if self.link == "kl":
            logs = math.log(self.rate), math.log1p(-self.rate)
        return {"FORM": self, "LOGS": logs, "TINY": torch.finfo(dtype).tiny}


CONFIGS: Table = {("any", bits): Config(BN=128, BV=0) for bits in ("16", "32", "64")}
"""One pair a thread. 128 of them, so that 4096 pairs already occupy 32 multiprocessors."""


def pair_losses(
    form: PairForm,
    score: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    reward_of: Tensor | None = None,  # [G, 2]
    given: Tensor | None = None,  # [G] or [G, 2]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [G], d losses / d score [G, 2] and rewards [G, 2], in the dtype of `score`.

    No autograd. A pair with a padded slot has loss and gradient 0, a padded slot reward 0.

    Args:
        form: which loss.
        score: fp32 or fp64.
        mask: where there is a response.
        reward_of: the scores that rewards are of, where those are not `score`.
        given: the numbers of `form.given`, any dtype.
    """
    G = score.shape[0]
    assert score.shape == mask.shape == (G, 2)
    losses, grads, rewards = score.new_empty(G), score.new_empty(G, 2), score.new_empty(G, 2)
    if G == 0:
        return losses, grads, rewards
    config = pick(CONFIGS, chip_of(score.device), score.dtype)
    with on_device_of(score):
        pair_kernel[(triton.cdiv(G, config.BN),)](
            score.contiguous(),
            None if reward_of is None else reward_of.contiguous(),
            None if given is None else given.contiguous(),
            mask.contiguous(),
            losses,
            grads,
            rewards,
            G,
            **form.constants(score.dtype),
            BN=config.BN,
            num_warps=config.warps,
        )
    return losses, grads, rewards
