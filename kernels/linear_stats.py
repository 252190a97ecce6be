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
    NEG_INF,
    STATE,
    State,
    absorb,
    accumulated,
    check_names,
    empty_state,
    finish,
    merge,
    pointers,
    statistics_reference,
    store_statistics,
)
from .tile import (
    Config,
    acc_dtype,
    block_order,
    chip_of,
    described,
    inverse_temperature,
    logit_arguments,
    matrix_arguments,
    on_device_of,
    operands,
    precision,
    raw_reference,
    raw_tile,
    transform,
    transform_reference,
)


@triton.jit
def split_kernel(
    # Descriptors with TMA. Not one tuple: triton 3.6 prepares only those that are arguments
    # themselves (`wrap_handle_tensordesc` of its driver).
    hidden_ptr,
    weight_ptr,
    lora_ptr,
    strides,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    state_ptr,
    N,
    V,
    num_splits,
    BLOCKS: tl.constexpr,
    LOGIT: tl.constexpr,
    WANT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the states of one row block over one split of BLOCKS vocabulary blocks.

    state_ptr is [7, S, N], S = num_splits; members that WANT does not ask for are not written.
    """
    BN: tl.constexpr = TILE.BN
    BV: tl.constexpr = TILE.BV
    ACC: tl.constexpr = TILE.ACC
    i_n, i_s = block_order(tl.program_id(0), tl.cdiv(N, BN), num_splits, TILE.GROUP)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    # int32: a label is compared with every column of every tile, in one register instead of two.
    labels = tl.load(labels_ptr + o_n, mask=m_n, other=0).to(tl.int32)
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, LOGIT, BN, ACC)
    state = empty_state(BN, ACC)
    # BLOCKS tiles a program, so that seven numbers a row are written once a split and not once a
    # tile. Not flattened with the loop over D: with TMA that spills 416 bytes on sm_90
    # (bench/NOTES.md).
    for block in range(BLOCKS):
        # A block wholly past V (end of the last split) re-reads the last row and counts nothing.
        v_first = (i_s * BLOCKS + block) * BV
        b_a = raw_tile(hidden_ptr, weight_ptr, lora_ptr, strides, i_n, v_first, N, V, TILE)
        o_v = v_first + tl.arange(0, BV)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + o_v, mask=o_v < V, other=0.0)
            b_a += bias.to(ACC)[None, :]
        b_z, _ = transform(b_a, cooling, LOGIT)
        state = absorb(state, b_z, o_v, labels, V, WANT)
    # int64: 7 S N passes 2^31 at 2.4M tokens of 128 splits.
    member = tl.cast(num_splits, tl.int64) * N
    out_ptrs = state_ptr + i_s.to(tl.int64) * N + o_n
    for i in tl.static_range(len(state)):
        if i < 3 or WANT[i]:
            tl.store(out_ptrs + i * member, state[i], mask=m_n)


@triton.jit
def load_member(in_ptrs, m_ns, EMPTY: tl.constexpr, WANTED: tl.constexpr, ACC: tl.constexpr):
    """Return a member [BN, BS] of the states, EMPTY where there is no split, or unused zeros."""
    if WANTED:
        return tl.load(in_ptrs, mask=m_ns, other=EMPTY)
    else:
        return tl.zeros(in_ptrs.shape, dtype=ACC)


@triton.jit
def merge_kernel(
    state_ptr,
    statistics_ptr,
    N,
    V,
    num_splits,
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
    # All S states of a row at once and summed in a fixed order: equal inputs give equal bits.
    in_ptrs = state_ptr + o_s[None, :] * N + o_n[:, None]
    want = statistics_ptr
    state = State(
        load_member(in_ptrs, m_ns, 0.0, True, ACC),
        load_member(in_ptrs + member, m_ns, NEG_INF, True, ACC),
        load_member(in_ptrs + 2 * member, m_ns, 0.0, True, ACC),
        load_member(in_ptrs + 3 * member, m_ns, 0.0, want.entropy is not None, ACC),
        load_member(in_ptrs + 4 * member, m_ns, 0.0, want.log_p2 is not None, ACC),
        load_member(in_ptrs + 5 * member, m_ns, NEG_INF, want.top1 is not None, ACC),
        load_member(in_ptrs + 6 * member, m_ns, 0.0, want.mean_logit is not None, ACC),
    )
    store_statistics(finish(merge(state), V), statistics_ptr, o_n, m_n)


def blocks_per_split(num_n: int, num_v: int, programs: int) -> int:
    """Return the vocabulary blocks per split: the largest power of two that leaves `programs`.

    A power of two, because the count is constexpr: ten kernels cover every N.
    """
    blocks = 1 << (num_v.bit_length() - 1)
    while blocks > 1 and num_n * triton.cdiv(num_v, blocks) < programs:
        blocks //= 2
    return blocks


def _programs_wanted(device: torch.device) -> int:
    """Return how many programs `split_kernel` is to have at least."""
    if device.type != "cuda":
        return 1
    # Four a multiprocessor keep the last, partly filled wave below a fifth of the run.
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
    r"""Return the rows' statistics of softmax(z), $z = \mathrm{softcap}((hW^T + b)\,s) / T$.

    Without autograd.

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
    BS = triton.next_power_of_2(num_splits)
    # 1024 states a program: 8 a thread for each of four warps' 128.
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
            WANT=accumulated(want),
            **matrix_arguments(config, matrices),
            **logit_arguments(softcap, logit_scale, temperature),
        )
        merge_kernel[(triton.cdiv(N, BN),)](
            state,
            pointers(out),
            N=N,
            V=V,
            num_splits=num_splits,
            ACC=precision(hidden.dtype)["ACC"],
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
    """Return `linear_stats` with dense logits in plain torch; 16-bit inputs widen to fp32 first."""
    raw = raw_reference(hidden, weight, lora)
    z = transform_reference(raw, bias, softcap, logit_scale, temperature)
    return statistics_reference(z, labels, want)
