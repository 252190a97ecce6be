r"""The backward of `linear_stats` up to its matrix products: recompute a slice of logits, write C,
the coefficient of `coefficient`,

for a vocabulary slice W_s [Vs, D] that starts at row v_start of W; g_x [N] are the cotangents of
the row statistics. The caller then forms two plain products with cuBLAS,

    dH += C W_s        dW_s = C^T h        (db_s = sum_n C)

so that each slice of dW is finished by one product and no fp32 [V, D] buffer exists.

One matrix product, 2 N Vs D FLOP, and N Vs elements written. Products that were kept are read by
`kept_coefficients` instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient import coefficient, load_grads, load_saved, row_arguments
from .launch_table import launch
from .online import statistics_reference
from .tile import (
    Config,
    block_order,
    chip_of,
    described,
    inverse_temperature,
    logit_arguments,
    matrix_arguments,
    on_device_of,
    operands,
    raw_reference,
    raw_tile,
    transform,
    transform_reference,
)


@triton.jit
def coefficients_kernel(
    # Descriptors with TMA. Not one tuple: triton 3.6 prepares only those that are arguments
    # themselves (`wrap_handle_tensordesc` of its driver).
    hidden_ptr,
    weight_ptr,
    lora_ptr,
    strides,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    rows_ptr,
    out_ptr,
    stride_on,
    v_start,
    N,
    V_slice,
    V,
    LOGIT: tl.constexpr,
    GRADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write one [BN, BV] tile of C."""
    BN: tl.constexpr = TILE.BN
    BV: tl.constexpr = TILE.BV
    ACC: tl.constexpr = TILE.ACC
    i_n, i_v = block_order(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(V_slice, BV), TILE.GROUP)
    v_first = i_v * BV
    n_first = i_n.to(tl.int64) * BN
    o_n = n_first + tl.arange(0, BN)
    o_v = v_first + tl.arange(0, BV)
    m_n = o_n < N
    m_v = o_v < V_slice
    b_a = raw_tile(hidden_ptr, weight_ptr, lora_ptr, strides, i_n, v_first, N, V_slice, TILE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_v, mask=m_v, other=0.0)
        b_a += bias.to(ACC)[None, :]
    # The rows' numbers are loaded after the product, whose tile leaves few registers: 178 of 255
    # a thread are taken with TMA at 128 x 256 on sm_90, 230 with pointers (bench.account).
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, LOGIT, BN, ACC)
    b_z, b_slope = transform(b_a, cooling, LOGIT)
    # Counted from the slice and in int32: a label is compared with every column of the tile.
    labels = (tl.load(labels_ptr + o_n, mask=m_n, other=-1) - v_start).to(tl.int32)
    saved = load_saved(rows_ptr, o_n, m_n, GRADS, BN, ACC)
    grads = load_grads(rows_ptr, o_n, m_n, BN, ACC)
    b_c = coefficient(b_z, b_slope, o_v[None, :] == labels[:, None], saved, grads, V, GRADS)
    # int64 in the block's base alone: n_first is, and offsets inside a block fit int32.
    out_ptrs = out_ptr + n_first * stride_on + v_first
    out_ptrs += tl.arange(0, BN)[:, None] * stride_on + tl.arange(0, BV)[None, :]
    tl.store(out_ptrs, b_c.to(out_ptr.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])


def linear_coefficients(
    hidden: Tensor,  # [N, D (+ R)]
    weight_slice: Tensor,  # [Vs, D]
    labels: Tensor,  # [N]
    bias_slice: Tensor | None = None,  # [Vs]
    *,
    v_start: int,
    vocab_size: int,
    lse: Tensor,  # [N]
    logps: Tensor,  # [N]
    lse_rest: Tensor | None = None,  # [N]
    entropy: Tensor | None = None,  # [N]
    grad_logps: Tensor | None = None,  # [N]
    grad_lse: Tensor | None = None,  # [N]
    grad_mean_logit: Tensor | None = None,  # [N]
    grad_entropy: Tensor | None = None,  # [N]
    lora_slice: Tensor | None = None,  # [Vs, R]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,  # [N, Vs]
    config: Config | None = None,
) -> Tensor:
    """Return d loss / d (h W_s^T + b_s) [N, Vs] from the cotangents of the row statistics.

    Args:
        hidden, weight_slice, bias_slice, lora_slice, softcap, logit_scale, temperature: as in
            `linear_stats`, the slices cut to the rows [v_start, v_start + Vs) of the vocabulary.
        labels: [N] int64 in [0, vocab_size), numbered in the whole vocabulary.
        vocab_size: V, the whole vocabulary.
        lse, logps, lse_rest, entropy: [N] as `linear_stats` returned them; `lse_rest` takes the
            rounding of lse out of every p_v, `entropy` is needed with its cotangent only.
        grad_logps, grad_lse, grad_mean_logit, grad_entropy: [N] cotangents, None for zero.
        out_dtype: dtype of the result; None for the dtype of `hidden`.
        out: buffer to write, with unit stride along its rows; None allocates one.
        config: launch configuration; None asks the table.

    Returns:
        C [N, Vs], rounded once from fp32 (fp64 inputs: fp64).
    """
    N, (V_slice, D) = hidden.shape[0], weight_slice.shape
    assert hidden.shape[1] == D + (0 if lora_slice is None else lora_slice.shape[1])
    assert weight_slice.dtype == hidden.dtype
    assert grad_entropy is None or entropy is not None, "grad_entropy needs the entropy"
    if out is None:
        out = hidden.new_empty((N, V_slice), dtype=out_dtype or hidden.dtype)
    assert out.shape == (N, V_slice)
    assert out.stride(-1) == 1
    assert out_dtype in (None, out.dtype)
    if N == 0 or V_slice == 0:
        return out
    matrices = operands(hidden, weight_slice, lora_slice)
    beyond = (softcap, grad_lse, grad_mean_logit, grad_entropy)
    chip = chip_of(hidden.device)
    config = config or launch(
        "coefficients_kernel",
        chip,
        hidden.dtype,
        rich=any(x is not None for x in beyond),
        width=D,
        described=described(matrices),
    )
    num_n, num_v = triton.cdiv(N, config.BN), triton.cdiv(V_slice, config.BV)
    rows = row_arguments(
        lse=lse,
        lse_rest=lse_rest,
        logps=logps,
        entropy=entropy,
        grad_logps=grad_logps,
        grad_lse=grad_lse,
        grad_mean_logit=grad_mean_logit,
        grad_entropy=grad_entropy,
    )
    with on_device_of(hidden):
        coefficients_kernel[(num_n * num_v,)](
            bias_ptr=None if bias_slice is None else bias_slice.contiguous(),
            labels_ptr=labels.contiguous(),
            **rows,
            out_ptr=out,
            stride_on=out.stride(0),
            v_start=v_start,
            N=N,
            V_slice=V_slice,
            V=vocab_size,
            **matrix_arguments(config, matrices),
            **logit_arguments(softcap, logit_scale, temperature),
        )
    return out


def linear_coefficients_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    lora: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    **grads: Tensor,
) -> Tensor:
    """Return C [N, V] over the whole vocabulary by autograd through dense fp32 (fp64) logits.

    `grads` are the cotangents under the names of the statistics: `logps`, `lse`, ...
    """
    raw = raw_reference(hidden, weight, lora).detach().requires_grad_()
    with torch.enable_grad():
        z = transform_reference(raw, bias, softcap, logit_scale, temperature)
        stats = statistics_reference(z, labels, grads)
        return torch.autograd.grad(list(stats.values()), raw, list(grads.values()))[0]
