r"""Statistics of softmax(z), z = transform(h W^T + b), for every row of h, in one pass over V.

    h [N, D], W [V, D], y [N]  ->  lse, logps = z_y - lse, entropy, log sum p^2, top1, mean z: [N]

One matrix product, 2NVD FLOP. The [N, V] logits exist only as [BN, BV] accumulator tiles, fp32 from
the tensor cores to the log-sum-exp, each folded into seven numbers a row (`online`).

The vocabulary is cut into S splits so that few rows still fill the chip. Stage one writes the
state of every (row, split), 28 S N bytes at most; stage two merges the S states of a row in a fixed
order. Every output has one writer and no atomic is used: equal inputs give equal bits.

Memory traffic: W is read N / (BN * group) times, h once per BV columns but from L2 (`block_order`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_table import launch
from .online import (
    ACCUMULATED,
    STATE,
    absorb,
    check_names,
    empty_state,
    finish,
    flags,
    merge,
    pointers,
    statistics_reference,
    store_statistics,
)
from .tile import (
    Config,
    acc_dtype,
    block_order,
    blocks_of,
    chip_of,
    described,
    inverse_temperature,
    on_device_of,
    operands,
    precision,
    raw_reference,
    raw_tile,
    transform,
    transform_arguments,
    transform_reference,
)


@triton.jit
def split_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    state_ptr,
    stride_hn,
    stride_wv,
    N,
    V,
    num_splits,
    lora_ptr,
    temperature_ptr,
    stride_lv,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_LOG_P2: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    WANT_MEAN_LOGIT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """State of one row block over one split of BLOCKS vocabulary blocks -> state_ptr [7, S, N]."""
    i_n, i_s = block_order(tl.program_id(0), tl.cdiv(N, BN), num_splits, GROUP)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    labels = tl.load(labels_ptr + o_n, mask=m_n, other=0).to(tl.int32)
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, HAS_TEMPERATURE, BN, ACC)
    state = empty_state(BN, ACC)
    for block in range(BLOCKS):
        # A block wholly past V (end of the last split) re-reads the last row and counts nothing.
        v_first = (i_s * BLOCKS + block) * BV
        b_a = raw_tile(
            hidden_ptr,
            weight_ptr,
            lora_ptr,
            stride_hn,
            stride_wv,
            stride_lv,
            i_n,
            v_first,
            N,
            V,
            D,
            R,
            BN,
            BV,
            BD,
            TMA,
            DOT,
            ACC,
        )
        o_v = v_first + tl.arange(0, BV)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + o_v, mask=o_v < V, other=0.0)
            b_a += bias.to(ACC)[None, :]
        b_z, _ = transform(b_a, cooling, SOFTCAP, INNER, OUTER, HAS_TEMPERATURE)
        state = absorb(
            state, b_z, o_v, labels, V, WANT_ENTROPY, WANT_LOG_P2, WANT_TOP1, WANT_MEAN_LOGIT
        )
    label, high, mass, slope, square, before, total = state
    member = tl.cast(num_splits, tl.int64) * N
    out_ptrs = state_ptr + i_s.to(tl.int64) * N + o_n
    tl.store(out_ptrs, label, mask=m_n)
    tl.store(out_ptrs + member, high, mask=m_n)
    tl.store(out_ptrs + 2 * member, mass, mask=m_n)
    if WANT_ENTROPY:
        tl.store(out_ptrs + 3 * member, slope, mask=m_n)
    if WANT_LOG_P2:
        tl.store(out_ptrs + 4 * member, square, mask=m_n)
    if WANT_TOP1:
        tl.store(out_ptrs + 5 * member, before, mask=m_n)
    if WANT_MEAN_LOGIT:
        tl.store(out_ptrs + 6 * member, total, mask=m_n)


@triton.jit
def merge_kernel(
    state_ptr,
    lse_ptr,
    lse_rest_ptr,
    logps_ptr,
    entropy_ptr,
    log_p2_ptr,
    top1_ptr,
    mean_logit_ptr,
    N,
    V,
    num_splits,
    WANT_LSE: tl.constexpr,
    WANT_LSE_REST: tl.constexpr,
    WANT_LOGPS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_LOG_P2: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    WANT_MEAN_LOGIT: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    """Merge the S states of BN rows and write their statistics; BS >= S is a power of two."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_s = tl.arange(0, BS).to(tl.int64)
    m_n = o_n < N
    m_ns = m_n[:, None] & (o_s[None, :] < num_splits)
    member = tl.cast(num_splits, tl.int64) * N
    in_ptrs = state_ptr + o_s[None, :] * N + o_n[:, None]
    unused = tl.zeros([BN, BS], dtype=ACC)
    slope, square, before, total = unused, unused, unused, unused
    label = tl.load(in_ptrs, mask=m_ns, other=0.0)
    high = tl.load(in_ptrs + member, mask=m_ns, other=float("-inf"))
    mass = tl.load(in_ptrs + 2 * member, mask=m_ns, other=0.0)
    if WANT_ENTROPY:
        slope = tl.load(in_ptrs + 3 * member, mask=m_ns, other=0.0)
    if WANT_LOG_P2:
        square = tl.load(in_ptrs + 4 * member, mask=m_ns, other=0.0)
    if WANT_TOP1:
        before = tl.load(in_ptrs + 5 * member, mask=m_ns, other=float("-inf"))
    if WANT_MEAN_LOGIT:
        total = tl.load(in_ptrs + 6 * member, mask=m_ns, other=0.0)
    statistics = finish(merge(label, high, mass, slope, square, before, total), V)
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


def blocks_per_split(num_n: int, num_v: int, programs: int) -> int:
    """Vocabulary blocks per split: the largest power of two that leaves `programs` to run.

    A power of two, because the count is constexpr: ten kernels cover every N.
    """
    blocks = 1 << (num_v.bit_length() - 1)
    while blocks > 1 and num_n * triton.cdiv(num_v, blocks) < programs:
        blocks //= 2
    return blocks


def _programs_wanted(device: torch.device) -> int:
    """Four programs a multiprocessor keep the last, partly filled wave below a fifth of the run."""
    if device.type != "cuda":
        return 1
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def linear_stats(
    hidden: Tensor,  # [N, D (+ R)]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,  # [V]
    *,
    lora: Tensor | None = None,  # [V, R]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    want: Iterable[str] = ("logps", "lse"),
    config: Config | None = None,
    blocks: int | None = None,
) -> dict[str, Tensor]:
    r"""Per-row statistics of softmax(z), $z = \mathrm{softcap}((hW^T + b)\,s) / T$. No autograd.

    Args:
        hidden: [N, D] fp16, bf16, fp32 or fp64; any row stride.
        weight: [V, D] of the same dtype; any row stride.
        labels: [N] int64, every one in [0, V): a label outside makes its row meaningless.
        bias: [V], any floating dtype, or None.
        lora: B [V, R] of a low-rank delta, or None. The last R columns of `hidden` meet it.
        softcap: c of c tanh(x / c), or None.
        logit_scale: s.
        temperature: T, or [N] of the rows in the dtype of the result.
        want: names out of `online.STATISTICS`.
        config, blocks: launch configuration and vocabulary blocks per split; None asks the table.

    Returns:
        name -> [N] fp32 (fp64 for fp64 inputs). `top1` is 1 where the first argmax is the label.

    Raises:
        ValueError: `want` names no statistic.
    """
    want = check_names(want)
    N, (V, D) = hidden.shape[0], weight.shape
    assert hidden.shape[1] == D + (0 if lora is None else lora.shape[1])
    assert weight.dtype == hidden.dtype
    assert labels.shape == (N,)
    acc = acc_dtype(hidden.dtype)
    out = {name: hidden.new_empty(N, dtype=acc) for name in want}
    if N == 0:
        return out
    matrices = operands(hidden, weight, lora)
    config = config or launch(
        "split_kernel",
        chip_of(hidden.device),
        hidden.dtype,
        rich=softcap is not None or not set(want).isdisjoint(ACCUMULATED),
        width=D,
        described=described(matrices),
    )
    num_n, num_v = triton.cdiv(N, config.BN), triton.cdiv(V, config.BV)
    blocks = blocks or blocks_per_split(num_n, num_v, _programs_wanted(hidden.device))
    num_splits = triton.cdiv(num_v, blocks)
    state = hidden.new_empty((STATE, num_splits, N), dtype=acc)
    kinds = precision(hidden.dtype)
    BS = triton.next_power_of_2(num_splits)
    BN = max(1, 1024 // BS)
    with on_device_of(hidden):
        split_kernel[(num_n * num_splits,)](
            bias_ptr=None if bias is None else bias.contiguous(),
            labels_ptr=labels.contiguous(),
            state_ptr=state,
            N=N,
            V=V,
            num_splits=num_splits,
            BLOCKS=blocks,
            HAS_BIAS=bias is not None,
            **(matrices | blocks_of(config, matrices)),
            **transform_arguments(softcap, logit_scale, temperature),
            **flags(want, ACCUMULATED),
            **kinds,
        )
        merge_kernel[(triton.cdiv(N, BN),)](
            state,
            **pointers(out),
            N=N,
            V=V,
            num_splits=num_splits,
            **flags(want),
            ACC=kinds["ACC"],
            BN=BN,
            BS=BS,
        )
    return out


def linear_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    lora: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    want: Iterable[str] = ("logps", "lse"),
) -> dict[str, Tensor]:
    """`linear_stats` with dense logits in plain torch; 16-bit inputs widen to fp32 first."""
    raw = raw_reference(hidden, weight, lora)
    z = transform_reference(raw, bias, softcap, logit_scale, temperature)
    return statistics_reference(z, labels, want)
