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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_table import launch
from .logits_epilogue import load_logits
from .online import (
    NEG_INF,
    STATISTICS,
    absorb,
    empty_state,
    finish,
    flags,
    pointers,
    split_label,
    statistics_reference,
    store_statistics,
)
from .tile import (
    Config,
    acc_dtype,
    chip_of,
    coefficient,
    inverse_temperature,
    load_rows,
    on_device_of,
    precision,
    transform_arguments,
    transform_reference,
)

DIVERGENCES = ("kl_ref_policy", "kl_policy_ref", "jsd")
OF_BOTH = ("kl_ref_policy", "kl_policy_ref", "jsd", "kl_policy_mix")
OF_REFERENCE = ("ref_lse", "ref_lse_rest", "ref_logps")


@triton.jit
def log_mixture(b_x, BETA: tl.constexpr):
    """log(m / p) from b_x = log(q / p)."""
    b_high = tl.maximum(b_x, 0.0)
    return b_high + tl.log(BETA * tl.exp(b_x - b_high) + (1.0 - BETA) * tl.exp(-b_high))


@triton.jit
def absorb_gap(gap, b_z, b_other, m_v, high, mass, after, other_high, other_after):
    """The sum A after more columns, which have raised `high` to `after` on either side."""
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
    """KL from its sum A, the masses s, and log p_y, log(1 - p_y) of both sides."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    own = tl.where(p == 0.0, 0.0, p * (log_p - other_log_p))
    rest = gap / mass - (log_s - other_log_s) + (log_q - other_log_q)
    return own + tl.where(q == 0.0, 0.0, q * rest)


@triton.jit
def divergence_kernel(
    products_ptr,
    ref_products_ptr,
    bias_ptr,
    ref_bias_ptr,
    labels_ptr,
    lse_ptr,
    lse_rest_ptr,
    logps_ptr,
    entropy_ptr,
    log_p2_ptr,
    top1_ptr,
    mean_logit_ptr,
    ref_lse_ptr,
    ref_lse_rest_ptr,
    ref_logps_ptr,
    kl_ref_policy_ptr,
    kl_policy_ref_ptr,
    jsd_ptr,
    kl_policy_mix_ptr,
    stride_pn,
    stride_rn,
    N,
    V,
    temperature_ptr,
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    WANT_LSE: tl.constexpr,
    WANT_LSE_REST: tl.constexpr,
    WANT_LOGPS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_LOG_P2: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    WANT_MEAN_LOGIT: tl.constexpr,
    WANT_JSD: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """All statistics of BN rows."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    labels = tl.load(labels_ptr + o_n, mask=m_n, other=0).to(tl.int32)
    row_ptrs = products_ptr + o_n * stride_pn
    ref_ptrs = ref_products_ptr + o_n * stride_rn
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, HAS_TEMPERATURE, BN, ACC)
    state, ref = empty_state(BN, ACC), empty_state(BN, ACC)
    gap, ref_gap = tl.zeros([BN], dtype=ACC), tl.zeros([BN], dtype=ACC)
    for block in range(BLOCKS):
        o_v = block * BV + tl.arange(0, BV)
        b_z, _unused = load_logits(
            row_ptrs, bias_ptr, o_v, m_n, cooling, V,
            HAS_BIAS, HAS_TEMPERATURE, SOFTCAP, INNER, OUTER, ACC,
        )  # fmt: skip
        b_r, _unused = load_logits(
            ref_ptrs, ref_bias_ptr, o_v, m_n, cooling, V,
            HAS_REF_BIAS, HAS_TEMPERATURE, SOFTCAP, INNER, OUTER, ACC,
        )  # fmt: skip
        high, mass, ref_high, ref_mass = state[1], state[2], ref[1], ref[2]
        state = absorb(
            state, b_z, o_v, labels, V, WANT_ENTROPY, WANT_LOG_P2, WANT_TOP1, WANT_MEAN_LOGIT
        )
        ref = absorb(ref, b_r, o_v, labels, V, False, False, False, False)
        m_v = (o_v[None, :] < V) & (o_v[None, :] != labels[:, None])
        gap = absorb_gap(gap, b_z, b_r, m_v, high, mass, state[1], ref_high, ref[1])
        ref_gap = absorb_gap(ref_gap, b_r, b_z, m_v, ref_high, ref_mass, ref[1], high, state[1])
    statistics, of_ref = finish(state, V), finish(ref, V)
    store_statistics(
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
        WANT_LSE,
        WANT_LSE_REST,
        WANT_LOGPS,
        WANT_ENTROPY,
        WANT_LOG_P2,
        WANT_TOP1,
        WANT_MEAN_LOGIT,
    )
    lse, lse_rest, logp = statistics[0], statistics[1], statistics[2]
    ref_lse, ref_lse_rest, ref_logp = of_ref[0], of_ref[1], of_ref[2]
    tl.store(ref_lse_ptr + o_n, ref_lse, mask=m_n)
    tl.store(ref_lse_rest_ptr + o_n, ref_lse_rest, mask=m_n)
    tl.store(ref_logps_ptr + o_n, ref_logp, mask=m_n)
    log_s, ref_log_s = tl.log(state[2]), tl.log(ref[2])
    log_q = split_label(state[0], state[1], log_s)[1]
    ref_log_q = split_label(ref[0], ref[1], ref_log_s)[1]
    kl = divergence_of(gap, log_s, ref_log_s, state[2], logp, log_q, ref_logp, ref_log_q)
    ref_kl = divergence_of(ref_gap, ref_log_s, log_s, ref[2], ref_logp, ref_log_q, logp, log_q)
    tl.store(kl_policy_ref_ptr + o_n, kl, mask=m_n)
    tl.store(kl_ref_policy_ptr + o_n, ref_kl, mask=m_n)
    if WANT_JSD:
        mix, ref_mix = tl.zeros([BN], dtype=ACC), tl.zeros([BN], dtype=ACC)
        for block in range(BLOCKS):
            o_v = block * BV + tl.arange(0, BV)
            b_z, _unused = load_logits(
                row_ptrs, bias_ptr, o_v, m_n, cooling, V,
                HAS_BIAS, HAS_TEMPERATURE, SOFTCAP, INNER, OUTER, ACC,
            )  # fmt: skip
            b_r, _unused = load_logits(
                ref_ptrs, ref_bias_ptr, o_v, m_n, cooling, V,
                HAS_REF_BIAS, HAS_TEMPERATURE, SOFTCAP, INNER, OUTER, ACC,
            )  # fmt: skip
            m_label = o_v[None, :] == labels[:, None]
            m_v = m_n[:, None] & (o_v[None, :] < V)
            b_p, b_q, b_x = probabilities(
                b_z, b_r, m_label, lse, lse_rest, logp, ref_lse, ref_lse_rest, ref_logp
            )
            # Each in its own right: as a difference one would keep the rounding of log(q / p).
            b_m, b_w = log_mixture(b_x, BETA), log_mixture(-b_x, 1.0 - BETA)
            mix -= tl.sum(tl.where(m_v & (b_p != 0.0), b_p * b_m, 0.0), axis=1)
            ref_mix -= tl.sum(tl.where(m_v & (b_q != 0.0), b_q * b_w, 0.0), axis=1)
        tl.store(kl_policy_mix_ptr + o_n, mix, mask=m_n)
        tl.store(jsd_ptr + o_n, BETA * ref_mix + (1.0 - BETA) * mix, mask=m_n)


@triton.jit
def probabilities(b_z, b_r, m_label, lse, lse_rest, logp, ref_lse, ref_lse_rest, ref_logp):
    """p, q and log(q / p); the label's column from its saved log-probs, see `tile.coefficient`."""
    b_logp = (b_z - lse[:, None]) - lse_rest[:, None]
    b_logq = (b_r - ref_lse[:, None]) - ref_lse_rest[:, None]
    b_logp = tl.where(m_label, logp[:, None], b_logp)
    b_logq = tl.where(m_label, ref_logp[:, None], b_logq)
    return tl.exp(b_logp), tl.exp(b_logq), b_logq - b_logp


@triton.jit
def divergence_coefficients_kernel(
    products_ptr,
    ref_products_ptr,
    bias_ptr,
    ref_bias_ptr,
    labels_ptr,
    lse_ptr,
    lse_rest_ptr,
    logps_ptr,
    entropy_ptr,
    ref_lse_ptr,
    ref_lse_rest_ptr,
    ref_logps_ptr,
    kl_policy_ref_ptr,
    kl_policy_mix_ptr,
    grad_logps_ptr,
    grad_lse_ptr,
    grad_mean_logit_ptr,
    grad_entropy_ptr,
    grad_kl_ref_policy_ptr,
    grad_kl_policy_ref_ptr,
    grad_jsd_ptr,
    out_ptr,
    stride_pn,
    stride_rn,
    stride_on,
    v_start,
    N,
    V_slice,
    V,
    temperature_ptr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_LOGPS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_KL_REF_POLICY: tl.constexpr,
    HAS_KL_POLICY_REF: tl.constexpr,
    HAS_JSD: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """One [BN, BV] block of C."""
    num_v = tl.cdiv(V_slice, BV)
    o_n = (tl.program_id(0) // num_v).to(tl.int64) * BN + tl.arange(0, BN)
    o_v = (tl.program_id(0) % num_v) * BV + tl.arange(0, BV)
    m_n = o_n < N
    labels = (tl.load(labels_ptr + o_n, mask=m_n, other=-1) - v_start).to(tl.int32)
    m_label = o_v[None, :] == labels[:, None]
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, HAS_TEMPERATURE, BN, ACC)
    b_z, b_slope = load_logits(
        products_ptr + o_n * stride_pn, bias_ptr, o_v, m_n, cooling, V_slice,
        HAS_BIAS, HAS_TEMPERATURE, SOFTCAP, INNER, OUTER, ACC,
    )  # fmt: skip
    b_r, _unused = load_logits(
        ref_products_ptr + o_n * stride_rn, ref_bias_ptr, o_v, m_n, cooling, V_slice,
        HAS_REF_BIAS, HAS_TEMPERATURE, SOFTCAP, INNER, OUTER, ACC,
    )  # fmt: skip
    lse = load_rows(lse_ptr, o_n, m_n, True, BN, ACC)
    lse_rest = load_rows(lse_rest_ptr, o_n, m_n, True, BN, ACC)
    logp = load_rows(logps_ptr, o_n, m_n, True, BN, ACC)
    b_c = coefficient(
        b_z,
        b_slope,
        m_label,
        lse,
        lse_rest,
        logp,
        load_rows(entropy_ptr, o_n, m_n, HAS_ENTROPY, BN, ACC),
        load_rows(grad_logps_ptr, o_n, m_n, HAS_LOGPS, BN, ACC),
        load_rows(grad_lse_ptr, o_n, m_n, HAS_LSE, BN, ACC),
        load_rows(grad_mean_logit_ptr, o_n, m_n, HAS_MEAN, BN, ACC),
        load_rows(grad_entropy_ptr, o_n, m_n, HAS_ENTROPY, BN, ACC),
        V,
        HAS_LOGPS,
        HAS_LSE,
        HAS_MEAN,
        HAS_ENTROPY,
    )
    b_p, b_q, b_x = probabilities(
        b_z,
        b_r,
        m_label,
        lse,
        lse_rest,
        logp,
        load_rows(ref_lse_ptr, o_n, m_n, True, BN, ACC),
        load_rows(ref_lse_rest_ptr, o_n, m_n, True, BN, ACC),
        load_rows(ref_logps_ptr, o_n, m_n, True, BN, ACC),
    )
    b_d = tl.zeros(b_z.shape, dtype=ACC)
    if HAS_KL_REF_POLICY:
        b_d += load_rows(grad_kl_ref_policy_ptr, o_n, m_n, True, BN, ACC)[:, None] * (b_p - b_q)
    b_factor = tl.zeros(b_z.shape, dtype=ACC)
    if HAS_KL_POLICY_REF:
        kl = load_rows(kl_policy_ref_ptr, o_n, m_n, True, BN, ACC)
        g = load_rows(grad_kl_policy_ref_ptr, o_n, m_n, True, BN, ACC)
        b_factor -= g[:, None] * (b_x + kl[:, None])
    if HAS_JSD:
        mix = load_rows(kl_policy_mix_ptr, o_n, m_n, True, BN, ACC)
        g = load_rows(grad_jsd_ptr, o_n, m_n, True, BN, ACC) * (1.0 - BETA)
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
    r"""Statistics of both softmaxes and their divergences.

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
    if B:
        with on_device_of(products):
            divergence_kernel[(triton.cdiv(B, config.BN),)](
                products,
                ref_products,
                None if bias is None else bias.contiguous(),
                None if ref_bias is None else ref_bias.contiguous(),
                labels.contiguous(),
                **pointers(stats),
                **{f"{name}_ptr": stats[name] for name in (*OF_BOTH, *OF_REFERENCE)},
                stride_pn=products.stride(0),
                stride_rn=ref_products.stride(0),
                N=B,
                V=V,
                BLOCKS=triton.cdiv(V, config.BV),
                HAS_BIAS=bias is not None,
                HAS_REF_BIAS=ref_bias is not None,
                **transform_arguments(softcap, logit_scale, temperature),
                **flags(want),
                WANT_JSD="jsd" in want,
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
    """d loss / d products [B, Vs] from the cotangents of the row statistics.

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
    rows = ("lse", "lse_rest", "logps", "entropy", *OF_REFERENCE, "kl_policy_ref", "kl_policy_mix")
    own = {"LOGPS": "logps", "LSE": "lse", "MEAN": "mean_logit", "ENTROPY": "entropy"}
    differentiable = own | {name.upper(): name for name in DIVERGENCES}

    def pointer(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    if B and V_slice:
        grid = (triton.cdiv(B, config.BN) * triton.cdiv(V_slice, config.BV),)
        with on_device_of(products):
            divergence_coefficients_kernel[grid](
                products,
                ref_products,
                pointer(bias),
                pointer(ref_bias),
                labels.contiguous(),
                **{f"{name}_ptr": pointer(stats.get(name)) for name in rows},
                **{f"grad_{n}_ptr": pointer(cotangents.get(n)) for n in differentiable.values()},
                out_ptr=out,
                stride_pn=products.stride(0),
                stride_rn=ref_products.stride(0),
                stride_on=out.stride(0),
                v_start=v_start,
                N=B,
                V_slice=V_slice,
                V=vocab_size or V_slice,
                HAS_BIAS=bias is not None,
                HAS_REF_BIAS=ref_bias is not None,
                **transform_arguments(softcap, logit_scale, temperature),
                **{f"HAS_{key}": name in cotangents for key, name in differentiable.items()},
                BETA=jsd_beta,
                ACC=precision(products.dtype)["ACC"],
                BN=config.BN,
                BV=config.BV,
                num_warps=config.warps,
            )
    return out


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
    """`divergence` in plain torch, differentiable in `products`."""
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
