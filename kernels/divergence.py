r"""Divergences of a policy's softmax p from a reference's q, from the raw products of both heads.

    a = h W^T, a' = h' W'^T [B, V] in fp32  ->  KL(q || p), KL(p || q), the statistics of p, log q_y
                                            ->  C = d loss / d a [B, V], rounded once

The divergences stream like the single head's statistics (`online`), from one more sum a direction,

    A = sum exp(z - m) ((z - m) - (z' - m'))      over all columns but the label's
    KL(p || q) = p_y log(p_y / q_y) + (1 - p_y) (A / s - log(s / s') + log((1 - p_y) / (1 - q_y)))

in which nothing is of the size of a logit: a policy near its reference keeps the digits of a small
divergence. The generalised Jensen-Shannon divergence of the mixture m = beta q + (1 - beta) p needs
both normalisers before its first term, so it costs a second sweep over the rows:

    jsd = beta KL(q || m) + (1 - beta) KL(p || m),    d jsd / dz_v = (1 - beta) p_v (log(p_v / m_v)
                                                                     - KL(p || m))

Traffic: 8 BV bytes for the statistics, as much again for `jsd`, (8 + size of C) BV for C.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient import DIFFERENTIABLE, coefficient, load_grads, load_saved, row_arguments
from .launch_table import launch
from .logits_epilogue import load_logits
from .online import (
    NEG_INF,
    STATISTICS,
    absorb,
    accumulated,
    empty_state,
    finish,
    pointers,
    split_label,
    statistics_reference,
    store_statistics,
)
from .tile import (
    Config,
    acc_dtype,
    chip_of,
    inverse_temperature,
    load_rows,
    logit_arguments,
    on_device_of,
    precision,
    transform_reference,
)

DIVERGENCES = ("kl_ref_policy", "kl_policy_ref", "jsd")
OF_BOTH = ("kl_ref_policy", "kl_policy_ref", "jsd", "kl_policy_mix")
OF_REFERENCE = ("ref_lse", "ref_lse_rest", "ref_logps")


class Both(NamedTuple):
    """Hold pointers to rows [N] of both heads.

    `jsd` and `kl_policy_mix` are None where the second sweep is not wanted.
    """

    kl_ref_policy: Any
    kl_policy_ref: Any
    jsd: Any
    kl_policy_mix: Any


class RefRows(NamedTuple):
    """Hold pointers to a reference's saved rows [N], and to cotangents of divergences or None."""

    lse: Any
    lse_rest: Any
    logps: Any
    kl_policy_ref: Any
    kl_policy_mix: Any
    grad_kl_ref_policy: Any
    grad_kl_policy_ref: Any
    grad_jsd: Any


@triton.jit
def log_mixture(b_x, BETA: tl.constexpr):
    """Return log(m / p) from b_x = log(q / p)."""
    # The larger of the two exponents is taken out: e^b_x alone overflows fp32 at b_x = 88.8.
    b_high = tl.maximum(b_x, 0.0)
    return b_high + tl.log(BETA * tl.exp(b_x - b_high) + (1.0 - BETA) * tl.exp(-b_high))


@triton.jit
def absorb_gap(gap, b_z, b_other, m_v, high, mass, after, other_high, other_after):
    """Return the sum A after more columns, which have raised `high` to `after` on either side."""
    # -inf - -inf is NaN: with no column before, or none finite, nothing is subtracted.
    new = tl.where(after == NEG_INF, 0.0, after)
    other_new = tl.where(other_after == NEG_INF, 0.0, other_after)
    moved = gap + mass * ((high - new) - (other_high - other_new))
    gap = tl.where(mass == 0.0, 0.0, tl.exp(high - new) * moved)
    b_d = b_z - new[:, None]
    b_e = tl.where(m_v, tl.exp(b_d), 0.0)
    return gap + tl.sum(tl.where(b_e == 0.0, 0.0, b_e * (b_d - (b_other - other_new[:, None]))), 1)


@triton.jit
def divergence_of(gap, log_s, other_log_s, mass, log_p, log_q, other_log_p, other_log_q):
    """Return KL from its sum A, the masses s, and log p_y, log(1 - p_y) of both sides."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    # 0 log 0 = 0, also where the other side's logarithm is infinite.
    at_label = tl.where(p == 0.0, 0.0, p * (log_p - other_log_p))
    others = gap / mass - (log_s - other_log_s) + (log_q - other_log_q)
    return at_label + tl.where(q == 0.0, 0.0, q * others)


@triton.jit
def load_both(row_ptrs, bias_ptr, o_v, m_n, cooling, V, LOGIT: tl.constexpr, ACC: tl.constexpr):
    """Return z and dz/da of the policy and z of the reference; pointers are pairs of theirs."""
    b_z, b_slope = load_logits(row_ptrs[0], bias_ptr[0], o_v, m_n, cooling, V, LOGIT, ACC)
    b_r, _ = load_logits(row_ptrs[1], bias_ptr[1], o_v, m_n, cooling, V, LOGIT, ACC)
    return b_z, b_slope, b_r


@triton.jit
def divergence_kernel(
    products_ptr,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    statistics_ptr,
    ref_statistics_ptr,
    both_ptr,
    strides,
    N,
    V,
    BLOCKS: tl.constexpr,
    LOGIT: tl.constexpr,
    WANT: tl.constexpr,
    REF_WANT: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """Write the statistics of BN rows of both heads, then their divergences."""
    # int64: N V passes 2^31 at 16K tokens of a 128K vocabulary.
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    labels = tl.load(labels_ptr + o_n, mask=m_n, other=0).to(tl.int32)
    row_ptrs = (products_ptr[0] + o_n * strides[0], products_ptr[1] + o_n * strides[1])
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, LOGIT, BN, ACC)
    state, ref = empty_state(BN, ACC), empty_state(BN, ACC)
    gap, ref_gap = tl.zeros([BN], dtype=ACC), tl.zeros([BN], dtype=ACC)
    for block in range(BLOCKS):
        o_v = block * BV + tl.arange(0, BV)
        b_z, _, b_r = load_both(row_ptrs, bias_ptr, o_v, m_n, cooling, V, LOGIT, ACC)
        high, mass, ref_high, ref_mass = state.high, state.mass, ref.high, ref.mass
        state = absorb(state, b_z, o_v, labels, V, WANT)
        ref = absorb(ref, b_r, o_v, labels, V, REF_WANT)
        m_v = (o_v[None, :] < V) & (o_v[None, :] != labels[:, None])
        gap = absorb_gap(gap, b_z, b_r, m_v, high, mass, state.high, ref_high, ref.high)
        ref_gap = absorb_gap(ref_gap, b_r, b_z, m_v, ref_high, ref_mass, ref.high, high, state.high)
    saved, ref_saved = finish(state, V), finish(ref, V)
    store_statistics(saved, statistics_ptr, o_n, m_n)
    store_statistics(ref_saved, ref_statistics_ptr, o_n, m_n)
    logp, ref_logp = saved.logps, ref_saved.logps
    log_s, ref_log_s = tl.log(state.mass), tl.log(ref.mass)
    log_q = split_label(state.label, state.high, log_s)[1]
    ref_log_q = split_label(ref.label, ref.high, ref_log_s)[1]
    kl = divergence_of(gap, log_s, ref_log_s, state.mass, logp, log_q, ref_logp, ref_log_q)
    ref_kl = divergence_of(ref_gap, ref_log_s, log_s, ref.mass, ref_logp, ref_log_q, logp, log_q)
    tl.store(both_ptr.kl_policy_ref + o_n, kl, mask=m_n)
    tl.store(both_ptr.kl_ref_policy + o_n, ref_kl, mask=m_n)
    # A second sweep, 8 BV bytes more: the mixture needs both normalisers before its first term.
    if both_ptr.jsd is not None:
        mix, ref_mix = tl.zeros([BN], dtype=ACC), tl.zeros([BN], dtype=ACC)
        for block in range(BLOCKS):
            o_v = block * BV + tl.arange(0, BV)
            b_z, _, b_r = load_both(row_ptrs, bias_ptr, o_v, m_n, cooling, V, LOGIT, ACC)
            m_label = o_v[None, :] == labels[:, None]
            m_v = m_n[:, None] & (o_v[None, :] < V)
            b_p, b_q, b_x = probabilities(b_z, b_r, m_label, saved, ref_saved)
            # Each as its own sum: as a difference one would keep the rounding of log(q / p).
            b_m, b_w = log_mixture(b_x, BETA), log_mixture(-b_x, 1.0 - BETA)
            mix -= tl.sum(tl.where(m_v & (b_p != 0.0), b_p * b_m, 0.0), axis=1)
            ref_mix -= tl.sum(tl.where(m_v & (b_q != 0.0), b_q * b_w, 0.0), axis=1)
        tl.store(both_ptr.kl_policy_mix + o_n, mix, mask=m_n)
        tl.store(both_ptr.jsd + o_n, BETA * ref_mix + (1.0 - BETA) * mix, mask=m_n)


@triton.jit
def probabilities(b_z, b_r, m_label, saved, ref_saved):
    """Return p, q and log(q / p) from rows that begin with (lse, lse_rest, log p_y).

    The label's column comes from its saved log-probs, see `coefficient.coefficient`.
    """
    b_logp = (b_z - saved[0][:, None]) - saved[1][:, None]
    b_logq = (b_r - ref_saved[0][:, None]) - ref_saved[1][:, None]
    b_logp = tl.where(m_label, saved[2][:, None], b_logp)
    b_logq = tl.where(m_label, ref_saved[2][:, None], b_logq)
    return tl.exp(b_logp), tl.exp(b_logq), b_logq - b_logp


@triton.jit
def divergence_coefficients_kernel(
    products_ptr,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    rows_ptr,
    ref_rows_ptr,
    out_ptr,
    strides,
    stride_on,
    v_start,
    N,
    V_slice,
    V,
    LOGIT: tl.constexpr,
    GRADS: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """Write one [BN, BV] block of C."""
    num_v = tl.cdiv(V_slice, BV)
    o_n = (tl.program_id(0) // num_v).to(tl.int64) * BN + tl.arange(0, BN)
    o_v = (tl.program_id(0) % num_v) * BV + tl.arange(0, BV)
    m_n = o_n < N
    labels = (tl.load(labels_ptr + o_n, mask=m_n, other=-1) - v_start).to(tl.int32)
    m_label = o_v[None, :] == labels[:, None]
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, LOGIT, BN, ACC)
    # Statistics before the products, cotangents last: in another order the rich form takes 44 to
    # 48 registers instead of 40 (aot: sm_100 under triton 3.9, sm_80 under 3.6).
    saved = load_saved(rows_ptr, o_n, m_n, GRADS, BN, ACC)
    row_ptrs = (products_ptr[0] + o_n * strides[0], products_ptr[1] + o_n * strides[1])
    b_z, b_slope, b_r = load_both(row_ptrs, bias_ptr, o_v, m_n, cooling, V_slice, LOGIT, ACC)
    ref = ref_rows_ptr
    ref_saved = (
        load_rows(ref.lse, o_n, m_n, BN, ACC),
        load_rows(ref.lse_rest, o_n, m_n, BN, ACC),
        load_rows(ref.logps, o_n, m_n, BN, ACC),
    )
    grads = load_grads(rows_ptr, o_n, m_n, BN, ACC)
    b_c = coefficient(b_z, b_slope, m_label, saved, grads, V, GRADS)
    b_p, b_q, b_x = probabilities(b_z, b_r, m_label, saved, ref_saved)
    b_d = tl.zeros(b_z.shape, dtype=ACC)
    if ref.grad_kl_ref_policy is not None:
        b_d += load_rows(ref.grad_kl_ref_policy, o_n, m_n, BN, ACC)[:, None] * (b_p - b_q)
    b_factor = tl.zeros(b_z.shape, dtype=ACC)
    if ref.grad_kl_policy_ref is not None:
        kl = load_rows(ref.kl_policy_ref, o_n, m_n, BN, ACC)
        g = load_rows(ref.grad_kl_policy_ref, o_n, m_n, BN, ACC)
        b_factor -= g[:, None] * (b_x + kl[:, None])
    if ref.grad_jsd is not None:
        mix = load_rows(ref.kl_policy_mix, o_n, m_n, BN, ACC)
        g = load_rows(ref.grad_jsd, o_n, m_n, BN, ACC) * (1.0 - BETA)
        b_factor -= g[:, None] * (log_mixture(b_x, BETA) + mix[:, None])
    # A column at -inf has p = 0 and adds nothing; 0 * inf would be NaN.
    b_d += tl.where(b_p == 0.0, 0.0, b_p * b_factor)
    b_c += b_d * b_slope
    out_ptrs = out_ptr + o_n[:, None] * stride_on + o_v[None, :]
    m_out = m_n[:, None] & (o_v[None, :] < V_slice)
    tl.store(out_ptrs, b_c.to(out_ptr.dtype.element_ty), mask=m_out)


def divergence(
    products: Tensor,  # [B, V]
    ref_products: Tensor,  # [B, V]
    labels: Tensor,  # [B]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    jsd_beta: float = 0.5,
    want: Iterable[str] = ("logps", "kl_ref_policy"),
    config: Config | None = None,
) -> dict[str, Tensor]:
    r"""Return statistics of both softmaxes and their divergences.

    Args:
        products, ref_products: [B, V] raw products of both heads, fp32 (or fp64); any row stride.
        labels, bias, softcap, logit_scale, temperature: as in `logits_epilogue`; both share them.
        jsd_beta: the reference's share of the mixture, in (0, 1).
        want: names out of `online.STATISTICS`, OF_BOTH and OF_REFERENCE.

    Returns:
        name -> [B] fp32 (fp64).
    """
    want = tuple(want)
    B, V = products.shape
    assert ref_products.shape == (B, V)
    assert products.stride(-1) == ref_products.stride(-1) == 1
    acc = acc_dtype(products.dtype)
    made = (*(n for n in STATISTICS if n in want), *OF_BOTH, *OF_REFERENCE)
    stats = {name: products.new_empty(B, dtype=acc) for name in made}
    config = config or launch("divergence_kernel", chip_of(products.device), products.dtype)
    divergences = {name: stats[name] for name in OF_BOTH}
    if "jsd" not in want:
        divergences |= {"jsd": None, "kl_policy_mix": None}
    if B:
        with on_device_of(products):
            divergence_kernel[(triton.cdiv(B, config.BN),)](
                (products, ref_products),
                (_contiguous(bias), _contiguous(ref_bias)),
                labels.contiguous(),
                statistics_ptr=pointers(stats),
                ref_statistics_ptr=pointers(
                    {name.removeprefix("ref_"): stats[name] for name in OF_REFERENCE}
                ),
                both_ptr=Both(**divergences),
                strides=(products.stride(0), ref_products.stride(0)),
                N=B,
                V=V,
                BLOCKS=triton.cdiv(V, config.BV),
                **logit_arguments(softcap, logit_scale, temperature),
                WANT=accumulated(want),
                REF_WANT=accumulated(()),  # lse, lse_rest and logps alone
                BETA=jsd_beta,
                ACC=precision(products.dtype)["ACC"],
                BN=config.BN,
                BV=config.BV,
                num_warps=config.warps,
            )
    return {name: stats[name] for name in want}


def divergence_coefficients(
    products: Tensor,  # [B, Vs]
    ref_products: Tensor,  # [B, Vs]
    labels: Tensor,  # [B]
    bias: Tensor | None = None,  # [Vs]
    ref_bias: Tensor | None = None,  # [Vs]
    *,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    v_start: int = 0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    jsd_beta: float = 0.5,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return d loss / d products [B, Vs] from the cotangents of the row statistics.

    Args:
        products, ref_products, bias, ref_bias: as in `divergence`, or the columns from v_start on.
        stats: what `divergence` returned: lse, lse_rest, logps, the OF_REFERENCE ones, and of
            entropy, kl_policy_ref and kl_policy_mix those whose cotangent is given.
        cotangents: name -> [B]; mixture's is `jsd`.
        vocab_size: V, the whole vocabulary; None for the columns of `products`.
        out_dtype: dtype of the result; None for that of `products`.
    """
    B, V_slice = products.shape
    out = torch.empty_like(products, dtype=out_dtype)
    config = config or launch(
        "divergence_coefficients_kernel", chip_of(products.device), products.dtype
    )
    if B and V_slice:
        grid = (triton.cdiv(B, config.BN) * triton.cdiv(V_slice, config.BV),)
        with on_device_of(products):
            divergence_coefficients_kernel[grid](
                (products, ref_products),
                (_contiguous(bias), _contiguous(ref_bias)),
                labels.contiguous(),
                **row_arguments(
                    **{name: stats.get(name) for name in ("lse", "lse_rest", "logps", "entropy")},
                    **{f"grad_{name}": cotangents.get(name) for name in DIFFERENTIABLE},
                ),
                ref_rows_ptr=RefRows(
                    *(_contiguous(stats.get(name)) for name in OF_REFERENCE),
                    *(_contiguous(stats.get(name)) for name in ("kl_policy_ref", "kl_policy_mix")),
                    *(_contiguous(cotangents.get(name)) for name in DIVERGENCES),
                ),
                out_ptr=out,
                strides=(products.stride(0), ref_products.stride(0)),
                stride_on=out.stride(0),
                v_start=v_start,
                N=B,
                V_slice=V_slice,
                V=vocab_size or V_slice,
                **logit_arguments(softcap, logit_scale, temperature),
                BETA=jsd_beta,
                ACC=precision(products.dtype)["ACC"],
                BN=config.BN,
                BV=config.BV,
                num_warps=config.warps,
            )
    return out


def _contiguous(x: Tensor | None) -> Tensor | None:
    """Return `x` with unit stride, None for None."""
    return None if x is None else x.contiguous()


def divergence_reference(
    products: Tensor,
    ref_products: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    jsd_beta: float = 0.5,
    want: Iterable[str] = ("logps", "kl_ref_policy"),
) -> dict[str, Tensor]:
    """Return `divergence` in plain torch, differentiable in `products`."""
    facts = softcap, logit_scale, temperature
    z = transform_reference(products, bias, *facts)
    z_ref = transform_reference(ref_products, ref_bias, *facts)
    log_p, log_q = z.log_softmax(-1), z_ref.log_softmax(-1)
    of_ref = statistics_reference(z_ref, labels, ("lse", "lse_rest", "logps"))
    stats = {f"ref_{name}": value for name, value in of_ref.items()}
    log_m = torch.log(jsd_beta * log_q.exp() + (1 - jsd_beta) * log_p.exp())
    stats["kl_ref_policy"] = (log_q.exp() * (log_q - log_p)).sum(-1)
    stats["kl_policy_ref"] = (log_p.exp() * (log_p - log_q)).sum(-1)
    stats["kl_policy_mix"] = (log_p.exp() * (log_p - log_m)).sum(-1)
    of_reference = (log_q.exp() * (log_q - log_m)).sum(-1)
    stats["jsd"] = jsd_beta * of_reference + (1 - jsd_beta) * stats["kl_policy_mix"]
    own = statistics_reference(z, labels, [name for name in want if name not in stats])
    return {name: (own | stats)[name] for name in want}
